"""Small models written as functions, and their traced networks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patterns import Gate, Network, trace
from tests.patterns.networks import relative


class FunctionModel(nn.Module):
    """A model with some layers and parameters, and a function as its forward pass."""

    def __init__(
        self, forward: Callable[["FunctionModel", Tensor], object], **members: nn.Module | nn.Parameter
    ) -> None:
        super().__init__()
        self.call = forward
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


def image(batch: int = 2, channels: int = 3, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, channels, size, size, generator=generator, dtype=torch.float64)


def trace_network(model: nn.Module, example: Tensor | None = None) -> Network:
    return trace(model.double(), image() if example is None else example)


def trace_gates(model: nn.Module) -> dict[str, Gate | None]:
    return {name: operator.gate for name, operator in trace_network(model).operators.items()}


def conv(inner: int = 3, outer: int = 4) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, 3, padding=1)


def assert_same_outputs(model: nn.Module, network: Network, *batches: Tensor) -> None:
    with torch.no_grad():
        for batch in batches:
            assert relative(network.module(batch), model(batch)) < 1e-10


def varied_model() -> nn.Module:
    """A model with 3×3, 1×1 and depthwise convolutions, batch norm, an addition, both pools and two rectifiers."""

    def forward(m: FunctionModel, x: Tensor) -> Tensor:
        x = F.relu(m.norm(m.first(x)))  # type: ignore[operator]
        x = x + F.hardtanh(m.depthwise(m.mix(x)), 0.0, 6.0)  # type: ignore[operator]
        x = F.adaptive_avg_pool2d(F.max_pool2d(x, 2), 2)
        return m.last(x.flatten(1))  # type: ignore[operator, no-any-return]

    torch.manual_seed(0)
    layers = {
        "first": nn.Conv2d(3, 8, 3, padding=1),
        "norm": nn.BatchNorm2d(8),
        "mix": nn.Conv2d(8, 8, 1),
        "depthwise": nn.Conv2d(8, 8, 3, padding=1, groups=8),
        "last": nn.Linear(32, 5),
    }
    return FunctionModel(forward, **layers).double().eval()
