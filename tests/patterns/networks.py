"""Well-known architectures with random batch norm statistics, each traced once per process."""

from dataclasses import dataclass
from functools import cache

import timm
import torch
import torchvision
from torch import Tensor, nn

from patterns import METHODS, Network, trace

SIZE = 64


@dataclass(frozen=True)
class Traced:
    model: nn.Module
    network: Network
    inputs: Tensor


@cache
def traced(name: str) -> Traced:
    """Build and trace a model in float64 with random weights and batch norms, and draw three inputs."""
    torch.manual_seed(len(name))
    model = build(name).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            randomize(module)
    inputs = torch.randn(3, 3, SIZE, SIZE, dtype=torch.float64)
    return Traced(model, trace(model, inputs[:2], name=name), inputs)


def build(name: str) -> nn.Module:
    if name.startswith("tf_"):
        return timm.create_model(name, num_classes=10)
    if not name.startswith("vgg"):
        return getattr(torchvision.models, name)(num_classes=10)
    with torch.device("meta"):  # a narrow head instead of VGG's head of 120 million weights
        model = getattr(torchvision.models, name)(init_weights=False)
        head = nn.Linear(512 * 7 * 7, 48), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(48, 10)
        model.classifier = nn.Sequential(*head)
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()
    return model


def randomize(norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) -> None:
    """Draw the statistics and affine parameters of a batch norm; a fifth of the scales are negative."""
    k = norm.num_features
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(torch.randn(k) * 0.3)
    norm.running_var.copy_(torch.rand(k) + 0.5)
    if norm.affine:
        signs = torch.where(torch.rand(k) < 0.2, -1.0, 1.0)
        with torch.no_grad():
            norm.weight.copy_(signs * (torch.rand(k) + 0.5))
            norm.bias.copy_(torch.randn(k) * 0.3)


PASSES = [name for name, method in METHODS.items() if method.backward is not None]


def relative(found: Tensor, expected: Tensor) -> float:
    """Return ‖found - expected‖ / ‖expected‖ over the whole tensors."""
    assert found.shape == expected.shape
    assert expected.norm() > 0
    return float((found.double() - expected.double()).norm() / expected.double().norm())
