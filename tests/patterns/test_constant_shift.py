"""Networks whose first bias absorbs a shift of the input: which can, and what stays the same."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from patterns import Explainer, Network, UserError, accumulate, solve, trace
from patterns.evaluation import absorb_shift, cosine, find_shift_obstacle, shift_sensitivity
from tests.patterns.chains import normal, relu_network

pytestmark = pytest.mark.full


def test_shifted_network_gives_the_same_output_for_shifted_inputs() -> None:
    network, x, shift = relu_network(), normal(20, 6), 3 * normal(6, seed=1)
    other = absorb_shift(network, shift)
    torch.testing.assert_close(other.module(x + shift), network.module(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(other.module(x), network.module(x))


def test_convolution_without_padding_absorbs_a_constant_per_channel_only() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double()
    x = normal(5, 2, 4, 4)
    network = trace(model, x)
    shift = torch.tensor([2.0, -1.0]).double()[:, None, None].expand(2, 4, 4)
    torch.testing.assert_close(absorb_shift(network, shift).module(x + shift), network.module(x))
    with pytest.raises(UserError, match="no bias can absorb") as caught:
        absorb_shift(network, normal(2, 4, 4))
    assert caught.value.where == "0"


def test_refitted_linear_patterns_equal_those_before_the_shift() -> None:
    network, x, shift = relu_network(), normal(400, 6), 3 * normal(6, seed=1)
    other = absorb_shift(network, shift)

    def patterns(of: Network, inputs: Tensor, choice: str) -> dict[str, Tensor]:
        moments = accumulate(of, [inputs])
        return {n: next(iter(solve(op, moments[n], choice).patterns.values())) for n, op in of.operators.items()}

    carried, refitted = patterns(network, x, "linear"), patterns(other, x + shift, "linear")
    for name, pattern in carried.items():
        torch.testing.assert_close(refitted[name], pattern, rtol=1e-9, atol=1e-9)
    methods = ["patternnet", "patternattribution"]
    truth = Explainer(network, carried, methods)(x[:5]).maps
    for chosen in (carried, refitted):
        found = Explainer(other, chosen, methods)(x[:5] + shift).maps
        for method in methods:
            torch.testing.assert_close(found[method], truth[method], rtol=1e-9, atol=1e-9)
    # The paper's two-component form changes (tests/patterns/test_invariance.py states by how much).
    two = [patterns(of, inputs, "two-component")["0"] for of, inputs in ((network, x), (other, x + shift))]
    assert float(cosine(*two).min()) < 0.99


def test_shift_is_reshaped_like_the_operators_input() -> None:
    torch.manual_seed(0)
    x, shift = normal(5, 2, 3), normal(2, 3, seed=1)
    network = trace(nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).double(), x)
    torch.testing.assert_close(absorb_shift(network, shift).module(x + shift), network.module(x))


class Patches(nn.Module):
    """A linear layer over patches of 2×2 pixels, as in a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(12, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.reshape(-1, 3, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return self.head(torch.relu(self.embed(patches)).mean(1))


class Skipping(nn.Module):
    """A convolution whose input is also added to its output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((torch.relu(self.conv(x)) + x).mean((2, 3)))


class Twice(nn.Module):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.relu(self.layer(x))).mean((2, 3))


def headed(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))


ABSORBING = {
    "convolution without padding": lambda: headed(nn.Conv2d(3, 4, 3, stride=2)),
    "convolution without bias": lambda: headed(nn.Conv2d(3, 4, 3, bias=False)),
    "patches": Patches,
    "linear layer": lambda: headed(nn.Flatten(), nn.Linear(192, 4)),
    "batch norm before padding": lambda: headed(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1)),
}
NOT_ABSORBING = {
    "convolution with padding": (lambda: headed(nn.Conv2d(3, 4, 3, padding=1)), "at each position"),
    "explicit padding": (lambda: headed(nn.ZeroPad2d(1), nn.Conv2d(3, 4, 3)), "has no bias"),
    "rectifier first": (lambda: headed(nn.ReLU(), nn.Conv2d(3, 4, 3)), "has no bias"),
    "max pooling first": (lambda: headed(nn.MaxPool2d(2), nn.Conv2d(3, 4, 3)), "has no bias"),
    "average pooling first": (lambda: headed(nn.AvgPool2d(2), nn.Conv2d(3, 4, 3)), "average pooling have no bias"),
    "skip connection": (Skipping, "2 operations read the input"),
    "two calls": (Twice, "is called 2 times"),
}


def traced(make: Callable[[], nn.Module], dtype: torch.dtype) -> tuple[Network, Tensor]:
    torch.manual_seed(0)
    model, x = make(), normal(5, 3, 8, 8).float()
    model(x)  # shapes of lazy layers
    return trace(model.to(dtype), x.to(dtype)), x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ABSORBING)
def test_network_without_an_obstacle_absorbs_any_constant_per_channel(name: str, dtype: torch.dtype) -> None:
    network, x = traced(ABSORBING[name], dtype)
    assert find_shift_obstacle(network) is None
    shift = torch.tensor([3.0, -20.0, 0.5], dtype=dtype)[:, None, None]
    outputs, found = network.module(x), absorb_shift(network, shift).module(x + shift)
    error = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(found, outputs, rtol=error, atol=error)
    assert not torch.allclose(network.module(x + shift), outputs, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", NOT_ABSORBING)
def test_obstacle_is_reported(name: str) -> None:
    make, reason = NOT_ABSORBING[name]
    network, _ = traced(make, torch.float32)
    assert reason in (find_shift_obstacle(network) or "")
    with pytest.raises(UserError, match=reason):
        absorb_shift(network, torch.ones(3, 1, 1))


def test_sensitivity_is_the_relative_change() -> None:
    maps, others = normal(4, 2, 3, 3), normal(4, 2, 3, 3, seed=1)
    found = shift_sensitivity(maps, others)
    for value, m, other in zip(found.tolist(), maps.numpy(), others.numpy()):
        assert value == pytest.approx(np.linalg.norm(other - m) / np.linalg.norm(m), rel=1e-12)
    torch.testing.assert_close(shift_sensitivity(1e-200 * maps, 1e-200 * others), found)
    assert shift_sensitivity(maps, maps).tolist() == [0] * 4
    assert bool(shift_sensitivity(0 * maps, others).isnan().all())
    with pytest.raises(ValueError, match="shifted maps of shape"):
        shift_sensitivity(maps, others[:1])


def test_gradient_is_insensitive_and_gradient_times_input_is_not() -> None:
    network, x, shift = relu_network(), normal(20, 6), 3 * normal(6, seed=1)
    methods = ["gradient", "gradient-x-input"]
    before = Explainer(network, None, methods)(x).maps
    after = Explainer(absorb_shift(network, shift), None, methods)(x + shift).maps
    change = {method: shift_sensitivity(before[method], after[method]) for method in methods}
    assert float(change["gradient"].max()) < 1e-12
    gradient = before["gradient"]
    expected = (gradient * shift).norm(dim=1) / (gradient * x).norm(dim=1)
    torch.testing.assert_close(change["gradient-x-input"], expected)
