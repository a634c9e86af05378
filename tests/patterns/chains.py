"""Chains of linear layers with and without rectifiers, and random tensors by seed."""

import torch
from torch import Tensor, nn

from patterns import Network, trace


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=seeded(seed), dtype=torch.float64)


def chain(*weights: Tensor) -> Network:
    """Return linear layers without bias or rectifier, in the order of the weights."""
    layers = []
    for weight in weights:
        layer = nn.Linear(*reversed(weight.shape), bias=False).double()
        layer.weight.data = weight
        layers.append(layer)
    return trace(nn.Sequential(*layers), torch.zeros(2, weights[0].shape[1], dtype=torch.float64))


def relu_network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    layers = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)
    return trace(nn.Sequential(*layers).double(), torch.zeros(2, 6, dtype=torch.float64))
