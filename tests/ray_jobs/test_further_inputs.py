"""Models with further inputs, which have the same value for every sample."""

from pathlib import Path

import numpy as np
import pytest
import torch

from patterns import UserError
from ray_jobs.config import ModelConfig
from ray_jobs.config.parsing import parse_input
from ray_jobs.models import loading

CODE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.out = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, time, pixels, offset=None, double=False):
        hidden = torch.relu(self.conv(pixels)) + time[:, None, None, None]
        if offset is not None:
            hidden = hidden + offset[..., None, None]
        scores = self.out(hidden.mean((2, 3)))
        return 2 * scores if double else scores


def net():
    return Net()


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(192, 5)

    def forward(self, x, scale):
        return self.out(x.flatten(1)) * scale


def plain():
    torch.manual_seed(1)
    return Plain()
"""
IMAGES = torch.rand(3, 3, 8, 8)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "m.py").write_text(CODE)
    return tmp_path / "m.py"


def load(file: Path, name: str, *inputs: str) -> loading.LoadedModel:
    pairs = tuple(map(parse_input, inputs))
    return loading.load(ModelConfig(spec=f"{file}:{name}", image_size=8, resize=8, inputs=pairs))


def test_inputs_have_their_values_for_every_sample(file: Path, tmp_path: Path) -> None:
    offset = np.array([1.0, -2.0, 3.0, 0.5])
    np.save(tmp_path / "time.npy", np.float64(0.25))
    np.save(tmp_path / "offset.npy", offset)
    given = f"time={tmp_path / 'time.npy'}", f"offset={tmp_path / 'offset.npy'}", "double=true"
    loaded = load(file, "net", *given)
    model = type(loaded.model).forward
    shifted = torch.tensor(offset, dtype=torch.float32).expand(3, 4)
    expected = model(loaded.model, torch.full((3,), 0.25), IMAGES, shifted, True)
    torch.testing.assert_close(loaded.network.module(IMAGES), expected)
    torch.testing.assert_close(load(file, "plain", "scale=3").network.module(IMAGES),
                               load(file, "plain", "scale=1.5").network.module(IMAGES) * 2)  # fmt: skip


def test_another_value_is_another_model(file: Path, tmp_path: Path) -> None:
    constants = []
    for value in (0.25, 0.5):
        np.save(tmp_path / "time.npy", np.float32(value))
        constants.append(load(file, "net", f"time={tmp_path / 'time.npy'}").network.constants)
    assert constants[0] != constants[1]


@pytest.mark.parametrize(
    ("inputs", "what"),
    [
        (("tame=1",), "the model has no input 'tame'"),
        (("time=1", "pixels=1", "offset=1", "double=1"), "all inputs have fixed values"),
        (("time=fast",), "'fast' is not a value"),
        (("time=missing.npy",), "missing.npy"),
    ],
)
def test_wrong_inputs_are_rejected(file: Path, inputs: tuple[str, ...], what: str) -> None:
    with pytest.raises(UserError) as caught:
        load(file, "net", *inputs)
    assert what in f"{caught.value.where} {caught.value.what}"


@pytest.mark.parametrize("text", ["time", "=1", "a b=1", "time="])
def test_text_that_is_no_input_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="not an input"):
        parse_input(text)
