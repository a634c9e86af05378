"""Operators followed by a ReLU, with any number of images for them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import prod

import pytest
import torch
from torch import Tensor

from patterns import Gate, Operator
from patterns.moments.gram import PatchAccumulator, PatchMoments
from patterns.moments.position_sampling import PositionSampler
from patterns.operators.operator import (
    Addition,
    AveragePool,
    Convolution,
    Linear,
    OperatorType,
    Scale,
    TransposedConvolution,
)
from tests.oracles import Neuron, channel_patches, linear_patches, neurons, window_patches

RELU = (0.0, float("inf"))
ALL = 10**6  # more positions than any image here has
ESTIMATORS = ["filter", "random", "linear", "two-component", "two-component-own-mean"]


@dataclass(frozen=True)
class Case:
    """An operator followed by a ReLU, with images for it."""

    operator: Operator
    shapes: tuple[tuple[int, ...], ...]
    unfold: Callable[..., list[Tensor]]

    def inputs(self, images: int, seed: int) -> tuple[Tensor, ...]:
        """Return correlated, skewed inputs with a mean other than 0."""
        generator = torch.Generator().manual_seed(seed)
        common = torch.randn(images, *self.shapes[0], generator=generator, dtype=torch.float64)
        noise = [torch.randn(images, *shape, generator=generator, dtype=torch.float64) for shape in self.shapes]
        return tuple((i + 1) * (common + n).relu() + 0.5 * n.roll(1, -1) + 0.3 for i, n in enumerate(noise))

    def moments(self, inputs: tuple[Tensor, ...], positions: int = ALL, seed: int = 0) -> PatchMoments:
        draw = PositionSampler(positions, seed)
        accumulator = PatchAccumulator(self.operator, draw)
        draw.start_pass(torch.arange(len(inputs[0])))
        accumulator.update(inputs, self.operator(*inputs))
        return accumulator.moments()

    def neurons(self, inputs: tuple[Tensor, ...]) -> list[Neuron]:
        return neurons(self.unfold(*inputs), self.operator.weight, self.operator.bias, RELU)


def drawn(seeds: Tensor, name: str, available: int, positions: int, seed: int = 0, call: int = 0) -> Tensor:
    """Return the positions that are sampled at one call of an operator."""
    draw = PositionSampler(positions, seed)
    draw.start_pass(seeds)
    return [draw.sample(name, available) for _ in range(call + 1)][-1]


def case(
    operator_type: OperatorType, weight: Tensor, *shapes: tuple[int, ...], unfold: Callable[..., list[Tensor]]
) -> Case:
    bias = (
        None if isinstance(operator_type, Addition | AveragePool) else torch.linspace(-0.5, 0.5, len(weight)).double()
    )
    return Case(Operator("it", operator_type, weight, bias, (), (), "", Gate(*RELU)), shapes, unfold)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def convolution(
    weight: Tensor,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int = 1,
) -> Case:
    def unfold(x: Tensor) -> list[Tensor]:
        return window_patches(x, tuple(weight.shape[2:]), stride, padding, dilation, groups)

    return case(Convolution(stride, padding, dilation, groups), weight, shape, unfold=unfold)


def transposed(
    weight: Tensor,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    more: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int = 1,
) -> Case:
    kernel = tuple(weight.shape[2:])
    sizes = [
        (n - 1) * s - 2 * p + d * (k - 1) + m + 1
        for n, s, p, d, k, m in zip(shape[1:], stride, padding, dilation, kernel, more)
    ]

    def unfold(x: Tensor) -> list[Tensor]:
        """Output position o sees input i through tap k if o = i · stride - padding + k · dilation."""
        rows = torch.zeros(len(x), *sizes, shape[0], *kernel, dtype=torch.float64)
        everywhere = [product(range(o), range(k)) for o, k in zip(sizes, kernel)]
        for pairs in product(*everywhere):
            spots = [divmod(o + p - k * d, s) for (o, k), p, d, s in zip(pairs, padding, dilation, stride)]
            if all(rest == 0 and 0 <= i < n for (i, rest), n in zip(spots, shape[1:])):
                out, tap = zip(*pairs)
                rows[(slice(None), *out, slice(None), *tap)] = x[(..., *(i for i, _ in spots))]
        return [g.flatten(len(sizes) + 1).flatten(0, -2) for g in rows.chunk(groups, len(sizes) + 1)]

    return case(TransposedConvolution(stride, padding, more, dilation, groups), weight, shape, unfold=unfold)


def average_pool(
    kernel: tuple[int, ...], shape: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]
) -> Case:
    weight = torch.full((shape[0], 1, *kernel), 1 / prod(kernel), dtype=torch.float64)

    def unfold(x: Tensor) -> list[Tensor]:
        return window_patches(x, kernel, stride, padding, (1,) * len(kernel), shape[0])

    return case(AveragePool(kernel, stride, padding), weight, shape, unfold=unfold)


CASES: dict[str, Callable[[], Case]] = {
    "linear": lambda: case(Linear(), normal(4, 7), (7,), unfold=linear_patches),
    "linear on tokens": lambda: case(Linear(), normal(4, 5), (3, 2, 5), unfold=linear_patches),
    "conv1d": lambda: convolution(normal(3, 2, 3), (2, 9), (2,), (1,), (2,)),
    "conv2d": lambda: convolution(normal(4, 2, 2, 3), (2, 6, 5), (2, 1), (1, 2), (1, 2)),
    "pointwise": lambda: convolution(normal(4, 6, 1, 1), (6, 4, 5), (1, 1), (0, 0), (1, 1)),
    "grouped": lambda: convolution(normal(6, 2, 2, 1), (4, 4, 5), (1, 2), (0, 1), (2, 1), 2),
    "depthwise": lambda: convolution(normal(3, 1, 3, 2), (3, 6, 5), (1, 2), (1, 0), (1, 1), 3),
    "conv3d": lambda: convolution(normal(3, 1, 2, 1, 2), (1, 3, 4, 4), (1, 2, 1), (0, 1, 1), (2, 1, 1)),
    "transposed": lambda: transposed(normal(3, 2, 3), (2, 6), (2,), (1,), (1,), (1,)),
    "transposed in groups": lambda: transposed(normal(4, 1, 2, 3), (2, 3, 3), (1, 2), (0, 1), (0, 1), (2, 1), 2),
    "addition": lambda: case(
        Addition((1.0, 0.5)), torch.tensor([[1.0, 0.5]] * 3).double(), (3, 4, 2), (3, 4, 2), unfold=channel_patches
    ),
    "average pool": lambda: average_pool((2, 3), (3, 5, 6), (2, 1), (1, 0)),
    "average pool 1d": lambda: average_pool((3,), (3, 9), (2,), (1,)),
    "average pool 3d": lambda: average_pool((2, 1, 2), (2, 3, 3, 4), (1, 2, 1), (1, 0, 1)),
    "transposed 3d": lambda: transposed(
        normal(2, 1, 2, 1, 2), (1, 2, 2, 2), (1, 2, 1), (0, 0, 1), (0, 1, 0), (2, 1, 1)
    ),
    "addition of tokens": lambda: case(
        Addition((1.0, -2.0), 2), torch.tensor([[1.0, -2.0]] * 3).double(), (4, 3), (4, 3),
        unfold=partial(channel_patches, axis=2),
    ),
}  # fmt: skip
# Operators of one input per neuron, which have no distractor.
SCALES: dict[str, Callable[[], Case]] = {
    "scale": lambda: case(Scale(), normal(3, 1), (3, 4), unfold=channel_patches),
    "scale of tokens": lambda: case(Scale(2), normal(4, 1), (3, 4), unfold=partial(channel_patches, axis=2)),
}
IMAGES = {"linear": 120, "linear on tokens": 40}
every_operator_type = pytest.mark.parametrize("name", CASES)
