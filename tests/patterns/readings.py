"""Ways to write linear operations, and the additions, scales and average pools that tracing makes of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patterns import Network, trace
from patterns.operators.operator import Addition, AveragePool, OperatorType, Scale
from tests.patterns.networks import randomize
from tests.patterns.small import FunctionModel


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(normal(*shape, seed=7) + 0.2)


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 1)


IMAGE, TOKENS = (5, 4, 6, 6), (5, 7, 4)
Reading = tuple[Callable[[FunctionModel, Tensor], Tensor], tuple[int, ...], dict[str, object], list[OperatorType]]
READINGS: dict[str, Reading] = {
    "difference": (lambda m, x: m.a(x) - m.b(x), IMAGE, {"a": conv(), "b": conv()}, [Addition((1.0, -1.0))]),
    "difference with alpha": (
        lambda m, x: torch.sub(m.a(x), m.b(x), alpha=2), IMAGE, {"a": conv(), "b": conv()}, [Addition((1.0, -2.0))]
    ),
    "sum with alpha, in place": (
        lambda m, x: m.a(x).add_(m.b(x), alpha=0.5), IMAGE, {"a": conv(), "b": conv()}, [Addition((1.0, 0.5))]
    ),
    "several terms": (
        lambda m, x: m.a(x) + m.b(x) + x + m.a(x).relu(), IMAGE, {"a": conv(), "b": conv()},
        [Addition((1.0, 1.0, 1.0, 1.0))],
    ),
    "a difference of sums": (
        lambda m, x: m.a(x) - (m.b(x) - 2 * x), IMAGE, {"a": conv(), "b": conv()}, [Scale(), Addition((1.0, -1.0, 1.0))]
    ),
    "a sum that others use too": (
        lambda m, x: (s := m.a(x) + x) + s.relu(), IMAGE, {"a": conv()}, [Addition((1.0, 1.0)), Addition((1.0, 1.0))]
    ),
    "sum of tokens": (lambda m, x: m.a(x) + x.relu(), TOKENS, {"a": linear()}, [Addition((1.0, 1.0), 2)]),
    "sum of permuted": (
        lambda m, x: (y := x.permute(0, 2, 3, 1)) + m.a(y), IMAGE, {"a": linear()}, [Addition((1.0, 1.0), 3)]
    ),
    "sum of permuted back": (
        lambda m, x: m.a(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + x, IMAGE, {"a": linear()}, [Addition((1.0, 1.0))]
    ),
    "sum of flattened": (
        lambda m, x: m.a(x).flatten(2).transpose(1, 2) + x.flatten(2).mT.relu(), IMAGE, {"a": conv()},
        [Addition((1.0, 1.0), 2)],
    ),
    "number": (lambda m, x: x * 0.5, IMAGE, {}, [Scale()]),
    "negative": (lambda m, x: -x, IMAGE, {}, [Scale()]),
    "constant minus value": (lambda m, x: 1 - x, IMAGE, {}, [Scale()]),
    "tensor minus value": (lambda m, x: m.p - x, IMAGE, {"p": parameter(4, 1, 1)}, [Scale()]),
    "quotient": (lambda m, x: x / m.p, TOKENS, {"p": parameter(4)}, [Scale(2)]),
    "layer scale": (lambda m, x: m.p * x, IMAGE, {"p": parameter(4, 1, 1)}, [Scale()]),
    "folded": (lambda m, x: m.a(x) * m.p / 2, TOKENS, {"a": linear(), "p": parameter(4)}, []),
    "affine in one call": (
        lambda m, x: torch.addcmul(m.q, m.p, x), TOKENS, {"p": parameter(4), "q": parameter(1, 1, 4)}, [Scale(2)]
    ),
    "positions": (lambda m, x: x * m.p, IMAGE, {"p": parameter(6, 6)}, [Scale(2)]),
    "every value": (lambda m, x: m.a(x) / m.p, IMAGE, {"a": conv(), "p": parameter(4, 6, 6)}, [Scale()]),
    "rows of channels": (lambda m, x: m.p * x, IMAGE, {"p": parameter(1, 4, 6, 1)}, [Scale()]),
    "a channel times several": (lambda m, x: x[:, :1] * m.p, IMAGE, {"p": parameter(3, 1, 6)}, [Scale()]),
    "a value times several": (
        lambda m, x: x.mean(1, True) * m.p, TOKENS, {"p": parameter(3, 1)}, [AveragePool((7,), (7,), (0,)), Scale()]
    ),
    "mean of tokens": (lambda m, x: x.mean(1), TOKENS, {}, [AveragePool((7,), (7,), (0,))]),
    "mean of channels last": (
        lambda m, x: x.permute(0, 2, 3, 1).mean((1, 2)), IMAGE, {}, [AveragePool((6, 6), (6, 6), (0, 0))]
    ),
    "mean of rows": (lambda m, x: x.mean(2), IMAGE, {}, [AveragePool((1, 6), (1, 6), (0, 0))]),
    "mean of columns, kept": (
        lambda m, x: x.permute(0, 2, 3, 1).mean(2, keepdim=True), IMAGE, {}, [AveragePool((1, 6), (1, 6), (0, 0))]
    ),
    "mean of channels": (lambda m, x: x.mean(1), IMAGE, {}, [AveragePool((1, 4), (1, 4), (0, 0))]),
    "sum of positions": (
        lambda m, x: x.sum((2, 3)), IMAGE, {}, [Scale(), AveragePool((6, 6), (6, 6), (0, 0))]
    ),
    "sum of tokens over their channels": (
        lambda m, x: x.sum(-1, keepdim=True), TOKENS, {}, [Scale(), AveragePool((4,), (4,), (0,))]
    ),
    "sum of a stack": (
        lambda m, x: torch.stack([m.a(x), x, m.b(x)]).sum(0), IMAGE, {"a": conv(), "b": conv()},
        [Addition((1.0, 1.0, 1.0))],
    ),
    "mean of a stack": (
        lambda m, x: torch.stack([m.a(x), x], -1).mean(-1) - x, IMAGE, {"a": conv()}, [Addition((0.5, 0.5, -1.0))]
    ),
    "matrix on the left": (lambda m, x: m.p @ x, IMAGE, {"p": parameter(5, 6)}, []),
    "a matrix for each channel, on the left": (lambda m, x: m.p @ x, IMAGE, {"p": parameter(4, 5, 6)}, []),
    "a matrix for each channel, on the right": (lambda m, x: x @ m.p, IMAGE, {"p": parameter(1, 4, 6, 5)}, []),
    "vector": (lambda m, x: x @ m.p, TOKENS, {"p": parameter(4)}, []),
    "einsum over a middle dimension": (
        lambda m, x: torch.einsum("nchw,hk->nwkc", x, m.p), IMAGE, {"p": parameter(6, 5)}, []
    ),
    "einsum over two dimensions, in groups": (
        lambda m, x: torch.einsum("wchk, nchw -> nkw", m.p, x), IMAGE, {"p": parameter(6, 4, 6, 3)}, []
    ),
    "patches": (lambda m, x: F.unfold(m.a(x), 2, stride=2), IMAGE, {"a": conv()}, []),
    "split": (
        lambda m, x: torch.cat([part.relu() for part in m.a(x).split([1, 3], 1)], 1), IMAGE, {"a": conv()}, []
    ),
    "chunks": (lambda m, x: torch.cat([x, *m.a(x).chunk(2, 1)[::-1]], 1), IMAGE, {"a": conv()}, []),
    "copies of channels": (lambda m, x: m.a(x).repeat_interleave(2, 1), IMAGE, {"a": conv()}, []),
    "channel shuffle": (lambda m, x: F.channel_shuffle(m.a(x), 2)[:, 1:], IMAGE, {"a": conv()}, []),
    "leaky": (lambda m, x: F.leaky_relu(m.a(x), 0.3), TOKENS, {"a": linear()}, []),
    "prelu": (lambda m, x: m.b(m.a(x)), IMAGE, {"a": conv(), "b": nn.PReLU(4)}, []),
    "padded 1d": (lambda m, x: F.pad(m.a(x), (1, 2), "reflect"), TOKENS, {"a": nn.Conv1d(7, 3, 2)}, []),
    "padded 3d": (lambda m, x: F.pad(x, (1, 0, 0, 1, 2, 0), "replicate"), (3, 2, 3, 2, 4), {}, []),
    "norm 1d": (lambda m, x: m.a(x), TOKENS, {"a": nn.BatchNorm1d(7)}, [Scale()]),
    "norm 3d": (lambda m, x: m.a(x), (3, 2, 3, 2, 4), {"a": nn.BatchNorm3d(2)}, [Scale()]),
    "sum of a list": (lambda m, x: sum([m.a(x), x]), IMAGE, {"a": conv()}, [Addition((1.0, 1.0))]),  # type: ignore[arg-type, return-value]
    "between two": (
        lambda m, x: torch.lerp(m.a(x), x, 0.3), IMAGE, {"a": conv()}, [Scale(), Addition((1.0, 1.0))]
    ),
    "between two by channel": (
        lambda m, x: torch.lerp(m.a(x), x, m.p), TOKENS, {"a": linear(), "p": parameter(4)},
        [Scale(2), Addition((1.0, 1.0), 2)],
    ),
}  # fmt: skip
RESIZED: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "nearest": (IMAGE, {"scale_factor": 2}),
    "nearest 1d": (TOKENS, {"size": 7, "mode": "nearest"}),
    "nearest 3d": ((3, 2, 3, 2, 4), {"size": (4, 5, 3), "mode": "nearest"}),
    "nearest-exact": (IMAGE, {"size": (4, 9), "mode": "nearest-exact"}),
    "nearest-exact 1d": (TOKENS, {"size": 7, "mode": "nearest-exact"}),
    "nearest-exact 3d": ((3, 2, 3, 2, 4), {"size": (4, 5, 3), "mode": "nearest-exact"}),
    "linear": (TOKENS, {"size": 9, "mode": "linear"}),
    "bilinear": (IMAGE, {"size": (4, 9), "mode": "bilinear"}),
    "bilinear, corners aligned": (IMAGE, {"scale_factor": 1.5, "mode": "bilinear", "align_corners": True}),
    "bilinear, smoothed": (IMAGE, {"size": (3, 4), "mode": "bilinear", "antialias": True}),
    "bicubic": (IMAGE, {"size": (4, 9), "mode": "bicubic"}),
    "bicubic, smoothed": (IMAGE, {"size": (3, 4), "mode": "bicubic", "antialias": True}),
    "trilinear": ((3, 2, 3, 2, 4), {"size": (4, 5, 3), "mode": "trilinear"}),
}
READINGS |= {
    f"resized, {name}": (lambda m, x, options=options: F.interpolate(x, **options), shape, {}, [])  # type: ignore[misc]
    for name, (shape, options) in RESIZED.items()
}


@dataclass(frozen=True)
class TracedReading:
    """An operation followed by a linear layer that makes scores: the model, its network, and inputs."""

    model: nn.Module
    network: Network
    inputs: Tensor


@cache
def trace_reading(name: str) -> TracedReading:
    """Build and trace a model in float64 with random weights, once per process."""
    forward, shape, members, _ = READINGS[name]
    torch.manual_seed(0)
    for member in members.values():
        if isinstance(member, nn.Conv1d | nn.Conv2d | nn.Linear):
            member.reset_parameters()
        elif isinstance(member, nn.BatchNorm1d | nn.BatchNorm3d):
            randomize(member)
    model, x = FunctionModel(forward, **members).double(), normal(*shape)  # type: ignore[arg-type]
    scored = nn.Sequential(model, nn.Flatten(), nn.Linear(model(x)[0].numel(), 3)).double().requires_grad_(False)
    return TracedReading(scored, trace(scored, x[:2]), x)
