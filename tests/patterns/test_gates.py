"""Smooth gates: their factors, their moments against brute force, and the spellings of activations."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patterns import Explainer, Gate, Moments, Observer, SmoothGate, accumulate, choose, quality, solve, trace
from patterns.estimation.observer import accumulate_patches
from patterns.moments.accumulator import Accumulator
from patterns.moments.moments import RequiredSums
from patterns.operators.gates import FACTORS, gated
from tests.oracles import Neuron
from tests.patterns.cases import FIXED, Case, fixed

# The activation in torch of each smooth gate.
ACTIVATIONS: dict[SmoothGate, Callable[[Tensor], Tensor]] = {
    SmoothGate("gelu"): F.gelu,
    SmoothGate("gelu-tanh"): lambda z: F.gelu(z, approximate="tanh"),
    SmoothGate("silu", (1.0,)): F.silu,
    SmoothGate("silu", (1.702,)): lambda z: z * torch.sigmoid(1.702 * z),
    SmoothGate("hardswish"): F.hardswish,
    SmoothGate("mish"): F.mish,
    SmoothGate("elu", (1.0, 1.0, 1.0)): F.elu,
    SmoothGate("elu", (0.5, 1.0, 1.0)): lambda z: F.elu(z, 0.5),
    SmoothGate("elu", (1.6732632423543772, 1.0507009873554805, 1.0)): F.selu,
    SmoothGate("elu", (2.0, 1.0, 0.5)): lambda z: F.celu(z, 2.0),
    SmoothGate("leaky-relu", (0.1,)): lambda z: F.leaky_relu(z, 0.1),
}
every_gate = pytest.mark.parametrize("gate", ACTIVATIONS, ids=str)


def test_every_factor_is_tested() -> None:
    assert {gate.name for gate in ACTIVATIONS} | {"prelu"} == set(FACTORS)


@every_gate
def test_factor_is_the_activation_divided_by_its_input(gate: SmoothGate) -> None:
    z = torch.linspace(-9, 9, 1000, dtype=torch.float64)  # without 0
    expected = ACTIVATIONS[gate](z) / z
    torch.testing.assert_close(gate.factor(z), expected, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(gate.activate(z), ACTIVATIONS[gate](z), rtol=1e-9, atol=1e-13)
    weights = gate.weight_function(0, z.device)(z)
    assert float(weights.min()) >= 0
    assert float(weights.max()) <= 1 + 1e-12
    near = torch.tensor([1e-9, -1e-9], dtype=torch.float64)
    torch.testing.assert_close(gate.factor(near), ACTIVATIONS[gate](near) / near, rtol=1e-6, atol=0)
    assert bool(gate.factor(torch.zeros(1)).isfinite().all())


def weights_of(gate: SmoothGate, z: Tensor) -> Tensor:
    """The weights by dividing f(z) by z, for z that are not 0."""
    factor = ACTIVATIONS[gate](z) / z
    largest = {"elu": 1.7580993408473766 if gate.parameters[:1] == (1.6732632423543772,) else 1.0}
    return factor / largest.get(gate.name, 1.0)


def gate_case(name: str, gate: SmoothGate) -> Case:
    return replace(fixed(name, "none"), gate=gate)  # type: ignore[arg-type]


def brute_force(case: Case, gate: SmoothGate) -> dict[str, Tensor]:
    """The sums over the gate's side, patch after patch."""
    rows: dict[str, list[Tensor]] = {"n": [], "y": [], "yy": [], "x": [], "xy": []}
    for k, neuron in enumerate(replace(case, gate=None).neurons):
        bias = 0.0 if case.bias is None else float(case.bias[k])
        m = weights_of(gate, neuron.y + bias)
        rows["n"].append(m.sum())
        rows["y"].append((m * neuron.y).sum())
        rows["yy"].append((m * neuron.y**2).sum())
        rows["x"].append((m[:, None] * neuron.x).sum(0))
        rows["xy"].append((m[:, None] * neuron.x * neuron.y[:, None]).sum(0))
    return {name: torch.stack(values) for name, values in rows.items()}


def weighted_patterns(neuron: Neuron, w: Tensor, g: Tensor) -> dict[str, Tensor]:
    """The patterns of both sides of a gate, from deviations of the samples, which are weighted by g and by 1 - g."""
    rows = {}
    for side, weights in (("positive", g), ("negative", 1 - g)):
        share = (weights / weights.sum())[:, None]
        if not share.isfinite().all():
            continue
        dx, y = neuron.x - (share * neuron.x).sum(0), neuron.y[:, None]
        dy = y - (share * y).sum()
        rows[f"{side}-own-mean"] = (share * dx * dy).sum(0) / (share * dy * dy).sum()
        direction = (share * neuron.x * (y - y.mean())).sum(0)
        rows[side] = direction / (w @ direction)
    return rows


def assert_sums(found: Moments, expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert found.open is not None
    for name, values in expected.items():
        got = getattr(found.open, name)
        assert got.dtype == torch.float64
        assert float((got - values).norm() / values.norm()) < tolerance, name


@every_gate
def test_moments_of_every_operator_are_weighted_sums_over_patches(gate: SmoothGate) -> None:
    for name in FIXED:
        case = gate_case(name, gate)
        biases = torch.zeros(len(case.weight)) if case.bias is None else case.bias
        neurons = fixed(name, "none").neurons
        if any(bool((neuron.y + b == 0).any()) for neuron, b in zip(neurons, biases)):
            continue  # f(z) / z is not defined
        expected = brute_force(case, gate)
        found = case.moments()
        assert_sums(found, expected)
        halves = [case.moments(inputs=batch) for batch in case.batches([1, len(case.inputs[0]) - 1])]
        assert_sums(halves[0] + halves[1], expected)
        solution = solve(case.operator, found, "two-component,two-component-own-mean")
        for k, (neuron, bias) in enumerate(zip(neurons, biases)):
            g = weights_of(gate, neuron.y + bias)
            if g.sum() < 1e-12 * len(g):
                assert solution.flags[k] == "dead"
            elif neuron.y.std() <= 1e-9 * neuron.y.abs().max():
                assert solution.flags[k] == "constant"
            else:
                for row, pattern in weighted_patterns(neuron, case.weight[k].flatten(), g).items():
                    found_row = solution.patterns[row].flatten(1)[k]
                    assert float((found_row - pattern).norm() / pattern.norm()) < 1e-10, (name, k, row)


def test_float32_sums_of_outputs_far_from_zero_are_accurate() -> None:
    gate = SmoothGate("gelu")
    case = gate_case("linear", gate) if "linear" in FIXED else gate_case(next(iter(FIXED)), gate)
    narrow = replace(case, weight=case.weight.float(), inputs=tuple(x.float() for x in case.inputs), bias=None)
    wide = replace(narrow, weight=narrow.weight.double(), inputs=tuple(x.double() for x in narrow.inputs))
    found, expected = narrow.moments().open, wide.moments().open
    assert found is not None
    assert expected is not None
    for name in ("n", "y", "yy", "x", "xy"):
        assert float((getattr(found, name) - getattr(expected, name)).norm() / getattr(expected, name).norm()) < 1e-6


def test_steep_silu_is_relu() -> None:
    for name in FIXED:
        steep, relu = gate_case(name, SmoothGate("silu", (1e6,))), fixed(name, "relu")
        relu = replace(relu, bias=steep.bias)
        if any(bool((n.y.abs() < 1e-3).any()) for n in relu.neurons):
            continue
        one, other = (solve(c.operator, c.moments(), "default").patterns for c in (steep, relu))
        for row, pattern in other.items():
            assert float((one[row] - pattern).abs().max()) < 1e-6 * max(1.0, float(pattern.abs().max())), (name, row)


class Model(nn.Module):
    """A convolution, an activation, and a linear layer, with the same weights for every activation."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.out = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 3)
        self.activation = activation
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.activation(self.conv(x)).flatten(1))


IMAGES = torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
SPELLINGS: dict[str, tuple[SmoothGate, list[Callable[[Tensor], Tensor]]]] = {
    "silu": (
        SmoothGate("silu", (1.0,)),
        [
            F.silu,
            nn.SiLU(inplace=True),
            lambda x: x * torch.sigmoid(x),
            lambda x: x.sigmoid().mul(x),
            lambda x: x / (1 + torch.exp(-x)),
        ],
    ),
    "gelu": (
        SmoothGate("gelu"),
        [
            F.gelu,
            lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
            lambda x: x * (torch.erf(x * 0.7071067811865476) + 1) / 2,
            lambda x: x * torch.special.ndtr(x),
        ],
    ),
    "gelu-tanh": (
        SmoothGate("gelu-tanh"),
        [
            lambda x: F.gelu(x, approximate="tanh"),
            lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
            lambda x: x * 0.5 * (1.0 + torch.tanh(0.7978845608 * x * (1 + 0.044715 * x * x))),
        ],
    ),
    "quick-gelu": (SmoothGate("silu", (1.702,)), [lambda x: x * torch.sigmoid(1.702 * x)]),
    "hardswish": (
        SmoothGate("hardswish"),
        [
            F.hardswish,
            lambda x: x * F.relu6(x + 3) / 6,
            lambda x: x * F.hardsigmoid(x),
            lambda x: x * (x + 3).clamp(0, 6) / 6,
        ],
    ),
    "mish": (SmoothGate("mish"), [F.mish, lambda x: x * torch.tanh(F.softplus(x))]),
    "elu": (SmoothGate("elu", (1.0, 1.0, 1.0)), [F.elu, lambda x: torch.where(x > 0, x, torch.expm1(x))]),
    "selu": (
        SmoothGate("elu", (1.67326324235, 1.05070098736, 1.0)),
        [F.selu, lambda x: 1.0507009873554805 * torch.where(x > 0, x, 1.6732632423543772 * (torch.exp(x) - 1))],
    ),
    "leaky-relu": (
        SmoothGate("leaky-relu", (0.2,)),
        [lambda x: F.leaky_relu(x, 0.2), lambda x: torch.where(x > 0, x, 0.2 * x)],
    ),
}


@pytest.mark.cases
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_an_activation_have_the_same_moments_and_maps(name: str) -> None:
    gate, spellings = SPELLINGS[name]
    found = []
    for activation in spellings:
        model = Model(activation)
        network = trace(model, IMAGES[:2])
        assert network.operators["conv"].gate == gate
        with torch.no_grad():
            torch.testing.assert_close(network.module(IMAGES), model(IMAGES), rtol=1e-6, atol=1e-6)
        moments = accumulate(network, [IMAGES])
        patterns = choose(network, {n: solve(op, moments[n]).patterns for n, op in network.operators.items()})
        methods = ["gradient", "gradient-x-input", "patternnet", "patternattribution"]
        found.append((moments["conv"].tensors(), Explainer(network, patterns, methods)(IMAGES).maps))
    for sums, maps in found[1:]:
        assert all(torch.equal(sums[key], value) for key, value in found[0][0].items())
        assert all(torch.equal(maps[key], value) for key, value in found[0][1].items())


@pytest.mark.parametrize("name", SPELLINGS)
def test_gradient_is_that_of_the_model_and_gradient_x_input_takes_the_factor_as_a_constant(name: str) -> None:
    _, spellings = SPELLINGS[name]
    model = Model(spellings[0])
    explainer = Explainer(trace(model, IMAGES[:2]), None, ["gradient", "gradient-x-input", "guided-backprop"])
    x = IMAGES.clone().requires_grad_()
    classes = model(x).argmax(1)
    (expected,) = torch.autograd.grad(model(x).gather(1, classes[:, None]).sum(), x)
    found = explainer(IMAGES, classes).maps
    torch.testing.assert_close(found["gradient"], expected, rtol=1e-9, atol=1e-9)
    z = model.conv(x)
    scores = model.out((z * (spellings[0](z) / z).detach()).flatten(1))
    (constant,) = torch.autograd.grad(scores.gather(1, classes[:, None]).sum(), x)
    torch.testing.assert_close(found["gradient-x-input"], constant * IMAGES, rtol=1e-8, atol=1e-9)
    assert torch.allclose(constant, expected) == (name == "leaky-relu")


@every_gate
def test_all_methods_run_in_float32(gate: SmoothGate) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5)
    x = torch.randn(4, 3, 8, 8)

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x: Tensor) -> Tensor:
            return layers[2](layers[1](ACTIVATIONS[gate](layers[0](x))))

    network = trace(Layers(), x)
    moments = accumulate(network, [x])
    solved = {name: solve(op, moments[name], "linear,two-component").patterns for name, op in network.operators.items()}
    methods = ["gradient", "guided-backprop", "integrated-gradients", "patternnet", "patternattribution", "lrp-z"]
    found = Explainer(network, choose(network, solved, "paper"), methods)(x, 1).maps
    assert all(bool(maps.isfinite().all()) for maps in found.values())
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(Layers()(leaf)[:, 1].sum(), leaf)
    torch.testing.assert_close(found["gradient"], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "activation",
    [torch.sigmoid, torch.tanh, F.softplus, lambda x: torch.exp(-x * x), lambda x: F.silu(x) + 0.1 * x**2],
)
def test_functions_that_are_no_gates_are_named(activation: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(Exception, match="no pattern is defined for"):
        trace(Model(activation), IMAGES[:2])


def test_usual_gradient_can_still_be_asked_for() -> None:
    network = trace(Model(F.gelu), IMAGES[:2], pass_through=["gelu"])
    assert network.operators["conv"].gate is None


def test_gate_of_an_activation_that_others_read_too_is_mixed() -> None:
    network = trace(Model(lambda x: F.silu(x) + F.relu(x)), IMAGES[:2])
    assert network.operators["conv"].gate is None
    assert network.operators["conv"].mixed_gates


def test_gated_has_no_gradient_of_its_factor() -> None:
    z = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)
    gated(z, "silu", 1.0).sum().backward()
    torch.testing.assert_close(z.grad, torch.sigmoid(z.detach()))


def test_sampled_positions_and_patches_have_the_sums_of_all_positions() -> None:
    network = trace(Model(F.gelu), IMAGES[:2])
    exact = accumulate(network, [IMAGES])["conv"]
    patches = accumulate_patches(network, [IMAGES], ["conv"], positions=36)["conv"]
    sampled = Observer(network, positions=35)
    sampled.update(IMAGES)
    for name, values in exact.tensors().items():
        torch.testing.assert_close(patches.moments.tensors()[name], values, rtol=1e-9, atol=1e-9)
    assert sampled.moments()["conv"].open is not None
    few = sampled.moments()["conv"].tensors()
    torch.testing.assert_close(few["open.n"] * 36 / 35, exact.tensors()["open.n"], rtol=0.05, atol=0)


def test_network_until_an_operator_ends_with_its_activation() -> None:
    model = Model(F.gelu)
    network = trace(model, IMAGES[:2]).until("conv")
    torch.testing.assert_close(network.module(IMAGES), F.gelu(model.conv(IMAGES)))


def test_moments_of_a_rectifier_and_a_smooth_gate_do_not_mix() -> None:
    case = fixed(next(iter(FIXED)), "relu")
    smooth = Accumulator(replace(case, gate=SmoothGate("gelu")).operator, RequiredSums())  # type: ignore[arg-type]
    assert smooth.moments().open is not None
    assert smooth.moments().open.n.dtype == torch.float64  # type: ignore[union-attr]
    assert case.moments().open.n.dtype == torch.int64  # type: ignore[union-attr]
    assert isinstance(case.gate, Gate)


def test_quality_of_two_components_is_that_of_the_written_out_signals() -> None:
    """ρ = 1 - max_v corr(y, vᵀd), with v regressed on the same samples as it is evaluated on."""
    network = trace(Model(F.gelu), IMAGES[:2])
    data = torch.randn(60, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    operator = network.operators["conv"]
    moments = accumulate_patches(network, [data], ["conv"], positions=36)["conv"]
    patterns = solve(operator, moments.moments, "two-component").patterns
    found = quality(patterns, operator.weight, moments, moments)["two-component"]
    x = F.unfold(data, 3).transpose(1, 2).flatten(0, 1)
    w = operator.weight.flatten(1)
    for k in range(operator.neurons):
        y = x @ w[k]
        m = F.gelu(y + operator.bias[k]) / (y + operator.bias[k])  # type: ignore[index]
        a, b = (patterns[row][k].flatten().double() for row in ("positive", "negative"))
        d = x - (m * y)[:, None] * a - ((1 - m) * y)[:, None] * b
        d = d - d.mean(0)
        v = torch.linalg.lstsq(d, (y - y.mean())[:, None], rcond=1e-10, driver="gelsd").solution[:, 0]
        expected = 1 - torch.corrcoef(torch.stack([y, d @ v]))[0, 1]
        assert float(found[k]) == pytest.approx(float(expected), abs=1e-3)
