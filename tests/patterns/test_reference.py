"""Methods that zennit computes on a traced network equal those of zennit and captum on the model itself."""

from collections.abc import Callable
from functools import cache
from typing import Any

import captum.attr
import pytest
import torch
import torchvision
from torch import Tensor, nn
from zennit.attribution import Gradient, IntegratedGradients, SmoothGrad
from zennit.canonizers import Canonizer
from zennit.composites import EpsilonPlusFlat
from zennit.torchvision import ResNetCanonizer, VGGCanonizer

from patterns import METHODS, Explainer, Network, UserError, trace
from tests.patterns.networks import randomize, relative

pytestmark = pytest.mark.full

ONES = torch.eye(10, dtype=torch.float64)
TARGETS = torch.tensor([3, 7, 0])


@cache
def model_of(name: str) -> nn.Module:
    torch.manual_seed(2)
    model = getattr(torchvision.models, name)(num_classes=10).double().eval()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            randomize(part)
            # zennit keeps epsilon in the norms that it has merged, which would scale all values that pass them.
            part.eps = 0.0
    return model


def images(size: int = 32) -> Tensor:
    return torch.randn(3, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@cache
def network_of(model: nn.Module) -> Network:
    return trace(model, images())


def explain_by(method: str, model: nn.Module, x: Tensor, settings: dict[str, float] | None = None) -> Tensor:
    return Explainer(network_of(model), None, [method], settings=settings)(x, TARGETS).maps[method]


@pytest.mark.parametrize(
    ("name", "canonizer"),
    [
        ("resnet18", ResNetCanonizer),
        pytest.param("vgg11_bn", VGGCanonizer, marks=pytest.mark.slow),
    ],
)
def test_lrp_on_the_traced_network_equals_zennits_on_the_model(name: str, canonizer: Callable[[], Canonizer]) -> None:
    model, x = model_of(name), images(64)
    settings = {"lrp-epsilon-plus-flat.epsilon": 1e-4}
    explainer = Explainer(trace(model, x), None, ["lrp-epsilon-plus-flat"], settings=settings)
    found = explainer(x, TARGETS).maps["lrp-epsilon-plus-flat"]
    with Gradient(model, EpsilonPlusFlat(epsilon=1e-4, canonizers=[canonizer()])) as attributor:
        _, expected = attributor(x.clone(), lambda scores: scores * ONES[TARGETS])
    assert relative(found, expected) < 1e-10


def test_lrp_z_without_its_stabilizer_is_gradient_times_input() -> None:
    model, x = model_of("resnet18"), images()
    found = explain_by("lrp-z", model, x, {"lrp-z.epsilon": 1e-300})
    assert relative(found, explain_by("gradient-x-input", model, x)) < 1e-8


def test_integrated_gradients_equal_zennits_and_captums() -> None:
    model, x = model_of("resnet18"), images()
    found = explain_by("integrated-gradients", model, x, {"integrated-gradients.steps": 7})
    _, direct = IntegratedGradients(model, n_iter=7)(x.clone(), ONES[TARGETS])
    assert relative(found, direct) < 1e-10
    # captum computes its steps (sevenths) in float32, so the last digits differ.
    captums = captum.attr.IntegratedGradients(model).attribute(x, target=TARGETS, n_steps=7, method="riemann_right")
    assert relative(found, captums) < 1e-6


def test_smoothgrad_equals_zennits_with_noise_from_each_samples_seed() -> None:
    model, x = model_of("resnet18"), images()
    settings = {"smoothgrad.samples": 3, "smoothgrad.noise": 0.2}
    explainer = Explainer(network_of(model), None, ["smoothgrad"], settings=settings)
    found = explainer(x, TARGETS, [5, 6, 7]).maps["smoothgrad"]
    for k, seed in enumerate([5, 6, 7]):
        generator = torch.Generator().manual_seed(seed)
        noises = [torch.randn(3, 32, 32, generator=generator).double() for _ in range(2)]
        scale = 0.2 * (x[k].max() - x[k].min())
        gradients = []
        for step in (noises[0], noises[1], torch.zeros(3, 32, 32)):
            noisy = (x[k] + scale * step)[None].requires_grad_()
            gradients.append(torch.autograd.grad(model(noisy)[0, TARGETS[k]], noisy)[0][0])
        assert relative(found[k], torch.stack(gradients).mean(0)) < 1e-10


def test_smoothgrad_of_one_sample_has_no_noise() -> None:
    model, x = model_of("resnet18"), images()
    settings = {"smoothgrad.samples": 1}
    network = network_of(model)
    found = Explainer(network, None, ["smoothgrad", "gradient"], settings=settings)(x, TARGETS).maps
    assert relative(found["smoothgrad"], found["gradient"]) < 1e-10
    _, direct = SmoothGrad(model, n_iter=1)(x.clone(), ONES[TARGETS])
    assert relative(found["smoothgrad"], direct) < 1e-10


class CalledTwice(nn.Module):
    """A layer that is called twice, a difference, a product with a constant and an unfolded batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.norm, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3, 10)
        randomize(self.norm)

    def forward(self, x: Tensor) -> Tensor:
        once = torch.relu(self.twice(x))
        x = torch.relu(0.5 * self.twice(once) - 2 * once + x)
        return self.head(self.norm(x).mean((2, 3)))


def test_lrp_covers_operations_without_a_layer() -> None:
    torch.manual_seed(4)
    model, x = CalledTwice().double().eval(), images()
    found = explain_by("lrp-z", model, x, {"lrp-z.epsilon": 1e-300})
    assert relative(found, explain_by("gradient-x-input", model, x)) < 1e-8


RANDOM = ("random", "smoothgrad")
FEW = {"smoothgrad": {"smoothgrad.samples": 2}, "integrated-gradients": {"integrated-gradients.steps": 2}}


@pytest.mark.parametrize("method", [m for m in METHODS if not METHODS[m].needs_patterns])
def test_map_of_a_sample_does_not_depend_on_its_batch(method: str) -> None:
    x, settings = images(), FEW.get(method, {})
    explainer = Explainer(network_of(model_of("resnet18")), None, [method], settings=settings)
    seeds = [11, 12, 13]
    together = explainer(x, TARGETS, seeds).maps[method]
    for k in range(3):
        alone = explainer(x[k : k + 1], TARGETS[k : k + 1], seeds[k : k + 1]).maps[method][0]
        assert relative(alone, together[k]) < 1e-10
    if method in RANDOM:
        assert relative(explainer(x, TARGETS, [21, 22, 23]).maps[method], together) > 1e-3


def test_random_map_is_standard_normal() -> None:
    x = torch.zeros(50, 3, 64, 64, dtype=torch.float64)
    network = trace(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 10)).double(), x)
    maps = Explainer(network, None, ["random"])(x, seeds=range(50)).maps["random"].flatten(1)
    deviation = maps.numel() ** -0.5
    assert abs(maps.mean()) < 5 * deviation
    assert abs(maps.var() - 1) < 5 * 2**0.5 * deviation
    assert abs(torch.corrcoef(maps) - torch.eye(50)).max() < 6 * maps.shape[1] ** -0.5


def test_explaining_leaves_no_hook_and_no_graph() -> None:
    x, network = images(), network_of(model_of("resnet18"))
    explainer = Explainer(network, None, ["lrp-z", "lrp-epsilon-plus-flat", "guided-backprop"])
    explanation = explainer(x, TARGETS)
    assert not any(m.requires_grad for m in explanation.maps.values())
    assert not explanation.scores.requires_grad
    hooked: list[Any] = [explainer.network.module, *explainer.network.operators.values()]
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in hooked)


@pytest.mark.parametrize(
    ("methods", "settings", "parameter", "what", "remedy"),
    [
        (["lrp-q"], {}, "methods", "no method 'lrp-q'", "Choose from gradient"),
        (["gradient:linear"], {}, "methods", "no method 'gradient:linear'", "patternnet:ESTIMATOR"),
        (["patternnet:"], {}, "methods", "no method 'patternnet:'", "patternnet:ESTIMATOR"),
        (["lrp-z"], {"smoothgrad.noise": 1}, "settings", "no setting 'smoothgrad.noise'", "lrp-z.epsilon"),
        (["gradient"], {"lrp-z.epsilon": 1}, "settings", "no setting 'lrp-z.epsilon'", "no settings"),
        (["smoothgrad"], {"smoothgrad.samples": 2.5}, "settings", "smoothgrad.samples=2.5", "a whole number above 0"),
        (["smoothgrad"], {"smoothgrad.noise": float("nan")}, "settings", "smoothgrad.noise=nan", "a number above 0"),
        (["lrp-z"], {"lrp-z.epsilon": -1}, "settings", "lrp-z.epsilon=-1", "a number above 0"),
    ],
)
def test_wrong_methods_and_settings_are_rejected(
    methods: list[str], settings: dict[str, float], parameter: str, what: str, remedy: str
) -> None:
    with pytest.raises(UserError) as caught:
        Explainer(trace(nn.Linear(4, 2), torch.zeros(1, 4)), None, methods, settings=settings)
    error = caught.value
    assert (error.where, error.parameter) == ("", parameter)
    assert what in error.what
    assert remedy in error.remedy


def test_sobel_needs_images() -> None:
    with pytest.raises(UserError, match="needs images") as caught:
        Explainer(trace(nn.Linear(4, 2), torch.zeros(1, 4)), None, ["sobel"])
    assert caught.value.parameter == "methods"
