"""The methods of other papers equal zennit's, and their rules hold after every rectifier."""

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from zennit.attribution import Gradient
from zennit.composites import DeconvNet, GuidedBackprop, LayerMapComposite
from zennit.core import Composite
from zennit.layer import Sum
from zennit.rules import Epsilon, Norm, Pass
from zennit.torchvision import ResNetCanonizer, VGGCanonizer
from zennit.types import Activation, AvgPool, Linear

from patterns import METHODS, Explainer, trace
from patterns.attribution import explainer
from tests.patterns.networks import relative, traced

ARCHITECTURES = ["vgg11", "resnet18"]
TINY = 1e-300  # keeps zennit's z / z finite where z = 0, and changes no other digit
OTHERS = "gradient", "gradient-x-input", "deconvnet", "guided-backprop"


def lrp_z() -> Composite:
    """Return LRP-z for every linear layer, sum and mean, with zennit's rules for gates and max pooling."""
    rules = [(Activation, Pass()), (Sum, Norm(TINY)), (AvgPool, Norm(TINY)), (Linear, Epsilon(TINY))]
    return LayerMapComposite(rules)


ORACLES: dict[str, Callable[[], Composite | None]] = {
    "gradient": lambda: None,
    "gradient-x-input": lrp_z,
    "deconvnet": DeconvNet,
    "guided-backprop": GuidedBackprop,
}


def without_epsilon(model: nn.Module) -> nn.Module:
    """Return the same function without epsilon: zennit folds it, but keeps it in the norm left as an identity."""
    model = copy.deepcopy(model.eval())
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_var is not None
            norm.running_var += norm.eps
            norm.eps = 0.0
    return model


def zennit(method: str, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return zennit's map; the output gradient of LRP is the target's value, that of the others 1."""
    composite = ORACLES[method]()
    if composite is not None:
        composite.canonizers = [VGGCanonizer() if isinstance(model, torchvision.models.VGG) else ResNetCanonizer()]
    one_hot = F.one_hot(targets, 10).to(inputs)
    with Gradient(without_epsilon(model), composite) as attributor:
        return attributor(inputs, lambda z: one_hot * z if method == "gradient-x-input" else one_hot)[1].detach()


@pytest.mark.full
@pytest.mark.cases
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("method", OTHERS)
def test_method_of_another_paper_equals_zennits(name: str, method: str) -> None:
    it = traced(name)
    inputs, targets = it.inputs[:2], torch.tensor([3, 7])
    found = Explainer(it.network, None, [method])(inputs, targets).maps[method]
    expected = zennit(method, it.model, inputs, targets)
    for f, e in zip(found, expected):
        assert relative(f, e) < 1e-12


# --- every rectifier ------------------------------------------------------------------------------

# Each with its slope, written independently.
RECTIFIERS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (F.relu, lambda z: (z > 0).double()),
    "relu in place": (lambda z: z.relu_(), lambda z: (z > 0).double()),
    "relu6": (F.relu6, lambda z: ((z > 0) & (z < 6)).double()),
    "hardtanh": (F.hardtanh, lambda z: ((z > -1) & (z < 1)).double()),
    "hardtanh in place": (lambda z: F.hardtanh_(z, -2, 0.5), lambda z: ((z > -2) & (z < 0.5)).double()),
    "clamp": (lambda z: z.clamp(-0.5, 2), lambda z: ((z > -0.5) & (z < 2)).double()),
    "clamp from below": (lambda z: z.clamp(min=0.25), lambda z: (z > 0.25).double()),
    "clamp from above": (lambda z: z.clamp(max=0.25), lambda z: (z < 0.25).double()),
    "leaky relu": (lambda z: F.leaky_relu(z, 0.2), lambda z: torch.where(z > 0, z.new_tensor(1), z.new_tensor(0.2))),
    "prelu": (
        lambda z: F.prelu(z, torch.tensor([0.3], dtype=torch.float64)),
        lambda z: torch.where(z > 0, z.new_tensor(1), z.new_tensor(0.3)),
    ),
}


class Twice(nn.Module):
    """Three linear layers with rectifiers after two of them; the first rectifier has two readers."""

    def __init__(self, rectify: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rectify = rectify
        self.one, self.two, self.three = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.rectify(self.one(x))
        return self.three(self.rectify(self.two(x)) + x)


@pytest.mark.full
@pytest.mark.cases
@pytest.mark.parametrize("rectifier", RECTIFIERS)
def test_rules_hold_after_every_rectifier(rectifier: str) -> None:
    torch.manual_seed(2)
    rectify, slope = RECTIFIERS[rectifier]
    model, x = Twice(rectify).double().requires_grad_(False), 4 * torch.randn(6, 5, dtype=torch.float64)
    targets = torch.tensor([0, 1, 2, 3, 0, 1])
    found = Explainer(trace(model, x), None, OTHERS)(x, targets)
    z1 = model.one(x)
    z2 = model.two(rectify(z1.clone()))
    rules: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "gradient": lambda g, z: g * slope(z),
        "deconvnet": lambda g, z: g.clamp(min=0),
        "guided-backprop": lambda g, z: g.clamp(min=0) * slope(z),
    }
    for method, rule in rules.items():
        above = model.three.weight[targets]
        expected = rule(above + rule(above, z2) @ model.two.weight, z1) @ model.one.weight
        torch.testing.assert_close(found.maps[method], expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(found.maps["gradient-x-input"], found.maps["gradient"] * x)
    torch.testing.assert_close(found.scores, model(x), rtol=1e-12, atol=1e-14)


# --- shared passes ---------------------------------------------------------------------------------


def small() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    layers = nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 4)
    return nn.Sequential(*layers).double(), torch.randn(3, 2, 6, 6, dtype=torch.float64)


@pytest.mark.full
@pytest.mark.parametrize(
    ("methods", "passes"),
    [(["gradient", "gradient-x-input"], 1), (["gradient-x-input"], 1), (OTHERS, 3), (["gradient", "deconvnet"], 2)],
)
def test_methods_with_the_same_backward_pass_share_it(
    methods: list[str], passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = small()
    explainer = Explainer(trace(model, x), None, methods)
    calls: list[int] = []
    backward = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or backward(*a, **k))  # type: ignore[func-returns-value]
    assert list(explainer(x).maps) == list(methods)
    assert len(calls) == passes


@pytest.mark.full
def test_method_with_plain_rectifiers_does_not_change_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small()
    network = trace(model, x)
    found = Explainer(network, None, OTHERS)(x).maps

    def fail(*_: object) -> None:
        raise AssertionError("rectifiers were replaced")

    monkeypatch.setattr(explainer, "insert_rules", fail)
    alone = Explainer(network, None, ["gradient", "gradient-x-input"])(x).maps
    for method, maps in alone.items():
        assert torch.equal(maps, found[method])
    with pytest.raises(AssertionError, match="rectifiers were replaced"):
        Explainer(network, None, ["guided-backprop"])


def test_attributions_sum_to_the_score_of_a_linear_layer_and_signals_do_not() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5, bias=False)).double().requires_grad_(False)
    x, pattern = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(5, 48, dtype=torch.float64)
    pattern /= (model[1].weight * pattern).sum(1, keepdim=True)
    settings = {"lrp-z.epsilon": 1e-12, "lrp-epsilon-plus-flat.epsilon": 1e-12}
    found = Explainer(trace(model, x), {"1": pattern}, list(METHODS), settings=settings)(x, [1, 3], seeds=[1, 2])
    scores = model(x)[[0, 1], [1, 3]]
    for method, maps in found.maps.items():
        error = float(((maps.flatten(1).sum(1) - scores) / scores).abs().max())
        assert (error < 1e-4) == (METHODS[method].is_attribution and method != "random"), (method, error)
