"""Digests distinguish models by every number that their forward pass uses, and by nothing else."""

import hashlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from patterns import digest, trace
from tests.patterns.small import conv, image

pytestmark = pytest.mark.full


class Scaled(nn.Module):
    """A convolution times a number that is stored in one of several places."""

    def __init__(self, place: str, value: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.place = conv(), place
        if place in ("buffer", "non-persistent buffer"):
            self.register_buffer("scale", torch.tensor(value), persistent=place == "buffer")
        elif place == "parameter":
            self.scale = nn.Parameter(torch.tensor(value))
        elif place == "list":
            self.scales = [torch.tensor(value)]
        elif place == "number":
            self.scale = value
        else:
            self.scale = torch.tensor(value)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * (self.scales[0] if self.place == "list" else self.scale)


STATE, CONSTANTS = ["parameter", "buffer", "non-persistent buffer"], ["attribute", "list", "number"]


def digests(model: nn.Module) -> tuple[str, str]:
    model = model.double()
    return digest(model), trace(model, image()).constants


@pytest.mark.parametrize("place", STATE + CONSTANTS)
def test_every_number_changes_a_digest(place: str) -> None:
    one, same, other = (digests(Scaled(place, value)) for value in (0.5, 0.5, 0.75))
    assert one == same
    assert (one[0] != other[0]) == (place in STATE)
    assert (one[1] != other[1]) == (place in CONSTANTS)


def test_tensors_in_closures_change_the_digest_of_constants() -> None:
    class Closed(nn.Module):
        def __init__(self, scale: Tensor) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.call = conv(), lambda y: y * scale

        def forward(self, x: Tensor) -> Tensor:
            return self.call(self.conv(x))

    one, other = (digests(Closed(torch.tensor([value]))) for value in (0.5, 0.75))
    assert one[0] == other[0]
    assert one[1] != other[1]


def test_digest_of_an_ordinary_model_is_that_of_its_state_dict_as_in_version_0_2() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 3))
    state = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        state.update(f"{name}/{value.dtype}/{tuple(value.shape)}/".encode())
        state.update(value.numpy().tobytes())
    assert digest(model) == f"sha256:{state.hexdigest()}"


class Extra(nn.Module):
    def get_extra_state(self) -> dict[str, int]:
        return {"epoch": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


UNUSUAL: dict[str, Callable[[], Tensor | None]] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
    "complex": lambda: torch.exp(1j * torch.linspace(0, 3, 4)),
    "conjugated": lambda: torch.exp(1j * torch.linspace(0, 3, 4)).conj(),
    "eight bits": lambda: torch.zeros(4, dtype=torch.float8_e4m3fn),
    "brain floats": lambda: torch.ones(4, dtype=torch.bfloat16),
    "booleans": lambda: torch.ones(4, dtype=torch.bool),
    "empty": lambda: torch.zeros(0),
    "a number": lambda: torch.tensor(2),
    "expanded": lambda: torch.ones(1).expand(4),
    "nothing": lambda: None,
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_buffers_of_every_type_and_layout_have_a_digest(name: str) -> None:
    model = Extra()
    model.register_buffer("value", UNUSUAL[name]())
    assert digest(model) == digest(model)
    assert (digest(model) != digest(Extra())) == (name != "nothing")
