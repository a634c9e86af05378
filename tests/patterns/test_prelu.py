"""PReLUs with a slope for each channel: their moments against brute force, and conservation of relevance."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from patterns import Explainer, Observer, SmoothGate, accumulate, trace
from patterns.estimation.observer import accumulate_patches
from tests.patterns.cases import FIXED, fixed
from tests.patterns.test_gates import IMAGES, gate_case

SLOPES = (0.25, -0.5, 3.0, 0.0, 1.0, 0.1)  # a negative one has weight 0, a large one is divided by


@pytest.mark.parametrize("name", [n for n in FIXED if n.startswith(("conv", "linear"))])
def test_every_neuron_has_the_sums_of_its_own_slope(name: str) -> None:
    plain = fixed(name, "none")
    slopes = (SLOPES * len(plain.weight))[: len(plain.weight)]
    case = gate_case(name, SmoothGate("prelu", slopes))
    found = case.moments().open
    assert found is not None
    for k, (neuron, slope) in enumerate(zip(plain.neurons, slopes)):
        z = neuron.y + (0.0 if case.bias is None else case.bias[k])
        m = (z > 0) + (z <= 0) * torch.tensor(max(slope, 0.0), dtype=torch.float64)
        m = m / max(slope, 1.0)
        expected = {"n": m.sum(), "y": (m * neuron.y).sum(), "yy": (m * neuron.y**2).sum()}
        expected |= {"x": (m[:, None] * neuron.x).sum(0), "xy": (m[:, None] * neuron.x * neuron.y[:, None]).sum(0)}
        for field, value in expected.items():
            torch.testing.assert_close(getattr(found, field)[k], value, rtol=1e-10, atol=1e-12, msg=(field, k))


@pytest.mark.parametrize("slope", [0.25, -0.5, 3.0])
def test_one_slope_for_all_neurons_has_the_sums_of_a_leaky_rectifier(slope: float) -> None:
    case = gate_case("linear" if "linear" in FIXED else next(iter(FIXED)), SmoothGate("leaky-relu", (slope,)))
    several = replace(case, gate=SmoothGate("prelu", (slope,) * len(case.weight)))  # type: ignore[arg-type]
    for found, expected in zip(several.moments().tensors().values(), case.moments().tensors().values()):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def prelu(bias: bool, slopes: tuple[float, ...] = SLOPES[:4]) -> nn.Sequential:
    """Return a network with several PReLUs, whose slopes differ between channels."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, bias=bias), nn.PReLU(4), nn.Conv2d(4, 4, 3, bias=bias), nn.PReLU(4), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 4, bias=bias), nn.PReLU(4), nn.Linear(4, 3, bias=bias))
    for module in model:
        if isinstance(module, nn.PReLU):
            module.weight.data = torch.tensor(slopes)
    return model.double().requires_grad_(False)


def test_prelu_conserves_relevance_without_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patterns.attribution.backward_weights.EPSILON", 0.0)
    network = trace(prelu(bias=False), IMAGES[:2])
    assert [op.gate for op in network.operators.values()][:3] == [SmoothGate("prelu", SLOPES[:4])] * 3
    explainer = Explainer(network, dict.fromkeys(network.operators), ["gradient-x-input", "patternattribution"])
    found = explainer(IMAGES)
    for maps in found.maps.values():
        torch.testing.assert_close(maps.flatten(1).sum(1), found.scores.max(1).values, rtol=1e-12, atol=0)


def test_prelu_has_the_models_outputs_and_gradient_and_the_sums_of_its_samples_anywhere() -> None:
    model = prelu(bias=True)
    network = trace(model, IMAGES[:2])
    assert torch.equal(network.module(IMAGES), model(IMAGES))
    torch.testing.assert_close(network.until("0").module(IMAGES), model[:2](IMAGES), rtol=1e-12, atol=0)
    assert str(network.operators["0"].gate) == "prelu -0.5 to 3"
    leaf = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    explainer = Explainer(network, None, ["gradient", "gradient-x-input", "integrated-gradients", "lrp-z"])
    maps = explainer(IMAGES, 1).maps
    torch.testing.assert_close(maps["gradient"], gradient, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(maps["gradient-x-input"], gradient * IMAGES, rtol=1e-12, atol=1e-14)
    exact = accumulate(network, [IMAGES])["0"].tensors()
    patches = accumulate_patches(network, [IMAGES], ["0"], positions=36)["0"].moments.tensors()
    sampled = Observer(network, positions=35)
    sampled.update(IMAGES)
    for name, values in exact.items():
        torch.testing.assert_close(patches[name], values, rtol=1e-9, atol=1e-9)
    few = sampled.moments()["0"].tensors()
    torch.testing.assert_close(few["open.n"] * 36 / 35, exact["open.n"], rtol=0.05, atol=0)


def test_slopes_of_tokens_channels_reach_the_layer_before_a_transposition() -> None:
    torch.manual_seed(0)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.slopes, self.out = nn.Linear(8, 6), nn.PReLU(6), nn.Linear(6, 2)
            self.slopes.weight.data = torch.tensor(SLOPES)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.slopes(self.layer(x).transpose(1, 2)).mean(2))

    model, x = Tokens(), torch.randn(3, 5, 8, dtype=torch.float64)
    network = trace(model, x[:2])
    gate = network.operators["layer"].gate
    assert isinstance(gate, SmoothGate)
    assert gate.name == "prelu"
    torch.testing.assert_close(network.until("layer").module(x), model.slopes(model.layer(x).transpose(1, 2)))
    z = model.layer(x)
    slopes = model.slopes.weight.clamp(min=0)
    weights = torch.where(z > 0, torch.ones(()).double(), slopes) / model.slopes.weight.clamp(min=1)
    opened = accumulate(network, [x])["layer"].open
    assert opened is not None
    torch.testing.assert_close(opened.n, weights.sum((0, 1)), rtol=1e-10, atol=0)
