"""Small models written as functions, and their networks."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from patterns import Gate, Network, trace
from tests.patterns.networks import relative


class Calls(nn.Module):
    """A model of some layers and the function that is its forward pass."""

    def __init__(self, forward: Callable[["Calls", Tensor], object], **layers: nn.Module) -> None:
        super().__init__()
        self.call = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> object:
        return self.call(self, x)


def image(batch: int = 2, channels: int = 3, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, channels, size, size, generator=generator, dtype=torch.float64)


def network_of(model: nn.Module, example: Tensor | None = None) -> Network:
    return trace(model.double(), image() if example is None else example)


def gates_of(model: nn.Module) -> dict[str, Gate | None]:
    return {name: operator.gate for name, operator in network_of(model).operators.items()}


def conv(inner: int = 3, outer: int = 4) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, 3, padding=1)


def assert_same_outputs(model: nn.Module, network: Network, *batches: Tensor) -> None:
    with torch.no_grad():
        for batch in batches:
            assert relative(network.module(batch), model(batch)) < 1e-10
