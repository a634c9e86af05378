"""No method leaves the range of its dtype at any depth: no infinities, no NaN, no maps that underflow."""

import copy
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from patterns import (
    Explainer,
    Explanation,
    Moments,
    Network,
    Operator,
    accumulate,
    choose,
    solve,
    trace,
)
from patterns.attribution import gradient_scaling
from tests.patterns.networks import PASSES, build, randomize, relative
from tests.patterns.test_scales import deep, patterns_of

pytestmark = pytest.mark.full

FOUND_FROM_DATA = "patternnet", "patternattribution"
FROM_WEIGHTS = "gradient", "gradient-x-input", "deconvnet", "guided-backprop"
TARGETS = torch.tensor([1, 4, 0])


def cast(network: Network, dtype: torch.dtype) -> Network:
    """Copy the network into a dtype."""
    return Network(copy.deepcopy(network.module).to(dtype), network.input_shape, network.output_shape)


def linear_patterns(network: Network, inputs: Tensor) -> dict[str, Tensor]:
    moments = accumulate(network, inputs.split(3))
    solved = {name: solve(op, moments[name], ["linear"]).patterns for name, op in network.operators.items()}
    return choose(network, solved, "linear")


def assert_same_maps(found: Explanation, expected: Explanation, cosine: float, size: float) -> None:
    """Compare each sample's map: it is finite, not zero, and has the expected direction and size."""
    for method, maps in found.maps.items():
        for f, e in zip(maps.double().flatten(1), expected.maps[method].double().flatten(1)):
            assert f.isfinite().all(), method
            assert f.abs().max() > 0, method
            assert torch.dot(f / f.norm(), e / e.norm()) > cosine, method
            difference = found.exponents[method] - expected.exponents[method]
            assert float(f.norm() / e.norm()) * 2.0**difference == pytest.approx(1, abs=size), method


def signed(shrunk: float = 1.0) -> tuple[Network, Tensor]:
    """A deep network with weights of both signs, whose dense blocks pass on little except their biases."""
    network, inputs = deep()
    assert {"plain.0", "reduce.0", "last"} <= set(network.operators)
    generator = torch.Generator().manual_seed(4)
    for name, operator in network.operators.items():
        if name.startswith("plain"):
            operator.weight.mul_(torch.randn(operator.weight.shape, generator=generator).sign())
        elif name.startswith("reduce"):
            operator.weight.mul_(shrunk)
            assert operator.bias is not None
            operator.bias.abs_().add_(0.1)
        elif name == "last":
            operator.weight.abs_()  # without positive weights a DeconvNet's map is 0
    return network, inputs


def test_scaling_changes_no_bit_of_any_method(monkeypatch: pytest.MonkeyPatch) -> None:
    network, inputs = signed()
    patterns = patterns_of(network, 3.0)
    monkeypatch.setattr(gradient_scaling, "SAFE_DIGITS", 10_000)
    unscaled = Explainer(network, patterns, PASSES)(inputs)
    monkeypatch.setattr(gradient_scaling, "SAFE_DIGITS", 1)
    scaled = Explainer(network, patterns, PASSES)(inputs)
    for method, maps in scaled.maps.items():
        assert unscaled.exponents[method] == 0
        assert scaled.exponents[method] != 0
        assert maps.abs().amax() > 0
        assert torch.equal(maps * 2.0 ** scaled.exponents[method], unscaled.maps[method]), method


def test_gradients_below_the_range_of_float32_equal_those_in_float64() -> None:
    network, inputs = signed(shrunk=2.0**-12)
    found = Explainer(cast(network, torch.float32), None, FROM_WEIGHTS)(inputs.float(), TARGETS)
    expected = Explainer(network, None, FROM_WEIGHTS)(inputs, TARGETS)
    assert all(exponent < -150 for exponent in found.exponents.values())
    assert_same_maps(found, expected, cosine=1 - 1e-9, size=1e-4)
    assert relative(found.maps["deconvnet"], found.maps["guided-backprop"]) > 1e-3


ARCHITECTURES = "tf_efficientnet_lite4", "densenet201", "resnet152"


@cache
def deep_architecture(name: str) -> tuple[Network, dict[str, Moments], Tensor]:
    """Return a network in float32 with random batch norm statistics, its moments, and inputs."""
    torch.manual_seed(0)
    model = build(name).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            randomize(module)
    inputs = torch.randn(6, 3, 32, 32)
    network = trace(model, inputs[:2])
    return network, accumulate(network, inputs.split(3)), inputs


class Rounded(Operator):
    """An operator in float64 whose outputs are rounded as in another dtype."""

    def __init__(self, operator: Operator, dtype: torch.dtype) -> None:
        shapes = operator.input_shapes, operator.output_shape
        super().__init__(
            operator.name, operator.operator_type, operator.weight, operator.bias, *shapes, "", operator.gate
        )
        self.double()
        self.narrow = copy.deepcopy(operator).to(dtype)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.narrow(*(x.to(self.narrow.weight.dtype) for x in inputs)).double()


def rounded(network: Network, dtype: torch.dtype) -> Network:
    """Return the network in float64 with the values, and therefore the gates, of another dtype."""
    module = network.rewrite(lambda operator: Rounded(operator, dtype))
    return Network(module, network.input_shape, network.output_shape)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "choice"),
    product(ARCHITECTURES, (torch.float32, torch.bfloat16), ("linear", "default", "multivariate")),
)
def test_maps_of_deep_architectures_are_those_of_a_backward_pass_in_float64(
    name: str, dtype: torch.dtype, choice: str
) -> None:
    network, moments, inputs = deep_architecture(name)
    solved = {n: solve(op, moments[n], choice).patterns for n, op in network.operators.items()}
    patterns, x = choose(network, solved, choice), inputs[:3].to(dtype)
    found = Explainer(cast(network, dtype), patterns, FOUND_FROM_DATA)(x, TARGETS)
    expected = Explainer(rounded(network, dtype), patterns, FOUND_FROM_DATA)(x.double(), TARGETS)
    if choice != "multivariate":  # its magnitudes stay in range without scaling
        assert found.exponents["patternnet"] > 200, "float32 would not overflow without scaling"
    cosine, size = (1 - 1e-9, 1e-4) if dtype == torch.float32 else (0.9, 0.5)
    assert_same_maps(found, expected, cosine, size)


# --- half precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("growth", [30.0, 1 / 30])
def test_maps_of_a_deep_network_in_bfloat16_are_those_in_float64(growth: float) -> None:
    network, inputs = deep()
    patterns = patterns_of(network, growth)
    found = Explainer(cast(network, torch.bfloat16), patterns, FOUND_FROM_DATA)(inputs.bfloat16(), TARGETS)
    expected = Explainer(network, patterns, FOUND_FROM_DATA)(inputs, TARGETS)
    assert abs(found.exponents["patternnet"]) > 150
    assert_same_maps(found, expected, cosine=0.9999, size=0.2)


class Shallow(nn.Module):
    """A model whose gates no rounding flips: half of the channels are always open, and half are always closed."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)
        randomize(self.norm)
        with torch.no_grad():
            self.one.bias.copy_(torch.tensor([9.0, -9.0]).repeat(4))
            self.norm.bias.copy_(torch.tensor([50.0, 50.0, -50.0, -50.0]).repeat(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu()
        return self.head((self.norm(self.two(x)).relu() + x[:, :, 1:-1:2, 1:-1:2]).mean((2, 3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_method_in_half_precision_is_that_in_float64_if_no_gate_flips(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    inputs = torch.randn(9, 3, 13, 13).to(dtype)
    network = trace(Shallow().to(dtype), inputs[:2])
    wide = cast(network, torch.float64)  # outputs far from 0 hardly vary in half precision
    patterns = linear_patterns(wide, inputs.double())
    found = Explainer(network, patterns, PASSES)(inputs[:3], TARGETS)
    expected = Explainer(wide, patterns, PASSES)(inputs[:3].double(), TARGETS)
    assert_same_maps(found, expected, cosine=0.999, size=0.05)
