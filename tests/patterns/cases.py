"""Operators of every type with inputs, and the patches that their neurons see."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from patterns import Gate, Moments, Operator
from patterns.moments.accumulator import Accumulator
from patterns.moments.moments import RequiredSums
from patterns.operators.operator import (
    Addition,
    AveragePool,
    Convolution,
    Linear,
    OperatorType,
    Scale,
    TransposedConvolution,
)
from tests.oracles import (
    Neuron,
    channel_patches,
    linear_patches,
    neurons,
    positions_seeing,
    transposed_patches,
    window_patches,
)

GATES = {"relu": Gate(0.0, float("inf")), "relu6": Gate(0.0, 6.0), "none": None}
Shape = tuple[int, ...]
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """An operator with inputs; `unfold` returns the patches of inputs for each group, (samples, D)."""

    operator_type: OperatorType
    weight: Tensor
    inputs: Inputs
    unfold: Callable[..., list[Tensor]]
    bias: Tensor | None = None
    gate: Gate | None = None

    @cached_property
    def operator(self) -> Operator:
        shapes = tuple(tuple(x.shape[1:]) for x in self.inputs)
        output = tuple(self.operator_type.forward(self.inputs, self.weight, self.bias).shape[1:])
        return Operator("it", self.operator_type, self.weight, self.bias, shapes, output, "", self.gate)

    @property
    def limits(self) -> tuple[float, float] | None:
        return self.gate and (self.gate.low, self.gate.high)

    @cached_property
    def neurons(self) -> list[Neuron]:
        return neurons(self.unfold(*self.inputs), self.weight, self.bias, self.limits)

    @cached_property
    def groups(self) -> list[list[Neuron]]:
        """The neurons by group; the neurons of a group see the same inputs."""
        size = len(self.neurons) // self.operator.groups
        return [self.neurons[start : start + size] for start in range(0, len(self.neurons), size)]

    @cached_property
    def seeing(self) -> Tensor:
        """The number of positions that see an input that a weight meets, (K, D), counted one by one."""
        counts = torch.stack(positions_seeing(self.unfold, self.operator.input_shapes))
        return counts.repeat_interleave(len(self.weight) // len(counts), 0)

    def moments(self, wanted: RequiredSums | None = None, inputs: Inputs | None = None) -> Moments:
        inputs = self.inputs if inputs is None else inputs
        accumulator = Accumulator(self.operator, wanted or RequiredSums())
        accumulator.update(inputs, self.operator(*inputs))
        return accumulator.moments()

    def batches(self, sizes: list[int]) -> list[Inputs]:
        return list(zip(*(x.split(sizes) for x in self.inputs)))


# --- one case for each way in which an operator type can see its inputs -------------------------------


def convolution(weight: Tensor, x: Tensor, stride: Shape, padding: Shape, dilation: Shape, groups: int = 1) -> Case:
    def unfold(x: Tensor) -> list[Tensor]:
        return window_patches(x, tuple(weight.shape[2:]), stride, padding, dilation, groups)

    return Case(Convolution(stride, padding, dilation, groups), weight, (x,), unfold)


def transposed(
    weight: Tensor, x: Tensor, stride: Shape, padding: Shape, output_padding: Shape, dilation: Shape, groups: int = 1
) -> Case:
    def unfold(x: Tensor) -> list[Tensor]:
        return transposed_patches(x, tuple(weight.shape[2:]), stride, padding, output_padding, dilation, groups)

    return Case(TransposedConvolution(stride, padding, output_padding, dilation, groups), weight, (x,), unfold)


def linear(weight: Tensor, x: Tensor) -> Case:
    return Case(Linear(), weight, (x,), linear_patches)


def scale(weight: Tensor, x: Tensor, axis: int = 1) -> Case:
    return Case(Scale(axis), weight, (x,), lambda x: channel_patches(x, axis=axis))


def addition(coefficients: tuple[float, ...], inputs: Inputs, axis: int = 1) -> Case:
    weight = inputs[0].new_tensor([coefficients]).repeat(inputs[0].shape[axis], 1)
    return Case(Addition(coefficients, axis), weight, inputs, lambda *inputs: channel_patches(*inputs, axis=axis))


def average_pool(kernel: Shape, stride: Shape, padding: Shape, x: Tensor) -> Case:
    channels, ones = x.shape[1], (1,) * len(kernel)

    def unfold(x: Tensor) -> list[Tensor]:
        return window_patches(x, kernel, stride, padding, ones, channels)

    weight = x.new_full((channels, 1, *kernel), 1 / torch.tensor(kernel).prod().item())
    return Case(AveragePool(kernel, stride, padding), weight, (x,), unfold)


def normal(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def values(*shape: int, seed: int = 0) -> Tensor:
    """Correlated, skewed values on both sides of 0 with a mean other than 0; the seed changes only the noise."""
    common, noise = normal(*shape, seed=1), normal(*shape, seed=seed + 2)
    return 2 * common + noise.relu() * (seed + 1) + noise.roll(1, -1) + 0.3


FIXED: dict[str, Callable[[], Case]] = {
    "linear": lambda: linear(normal(4, 6), values(40, 6)),
    "linear on tokens": lambda: linear(normal(4, 5), values(9, 5, 5)),
    "linear on a grid of tokens": lambda: linear(normal(4, 5), values(7, 3, 3, 5)),
    "more neurons than inputs": lambda: linear(normal(5, 3), values(30, 3)),
    "conv1d": lambda: convolution(normal(3, 2, 3), values(7, 2, 11), (2,), (1,), (2,)),
    "conv2d": lambda: convolution(normal(4, 2, 2, 3), values(7, 2, 6, 5), (2, 1), (1, 2), (1, 2)),
    "conv2d with gaps": lambda: convolution(normal(3, 2, 1, 2), values(7, 2, 6, 7), (3, 3), (0, 0), (1, 1)),
    "conv2d in groups": lambda: convolution(normal(6, 2, 2, 1), values(7, 4, 4, 5), (1, 2), (0, 1), (2, 1), 2),
    "conv2d depthwise": lambda: convolution(normal(3, 1, 3, 2), values(7, 3, 6, 5), (1, 2), (1, 0), (1, 1), 3),
    "conv3d": lambda: convolution(normal(3, 1, 2, 1, 2), values(7, 1, 3, 4, 4), (1, 2, 1), (0, 1, 1), (2, 1, 1)),
    "transposed conv1d": lambda: transposed(normal(3, 2, 3), values(7, 2, 6), (2,), (1,), (1,), (1,)),
    "transposed conv2d in groups": lambda: transposed(
        normal(4, 1, 2, 3), values(7, 2, 3, 3), (1, 2), (0, 1), (0, 1), (2, 1), 2
    ),
    "scale": lambda: scale(normal(3, 1), values(7, 3, 4)),
    "scale of tokens": lambda: scale(normal(4, 1), values(7, 5, 4), 2),
    "addition": lambda: addition((1.0, 0.5), (values(7, 3, 4, 2), values(7, 3, 4, 2, seed=1))),
    "addition of three": lambda: addition((1.0, -1.0, 2.0), tuple(values(7, 5, 3, seed=i) for i in range(3)), 2),
    "average pool 1d": lambda: average_pool((3,), (2,), (1,), values(7, 3, 9)),
    "average over an image": lambda: average_pool((2, 1), (1, 1), (0, 0), values(60, 3, 2, 1)),
    "average pool 2d": lambda: average_pool((2, 3), (2, 1), (1, 0), values(7, 3, 5, 6)),
    "a dead and a constant neuron": lambda: linear(
        normal(4, 6) * torch.tensor([[1.0], [1.0], [0.0], [1.0]]), values(40, 6)
    ),
}  # fmt: skip


def fixed(name: str, gate: str) -> Case:
    """A case of the table with this gate, and with a bias if its operator type can have one."""
    case = FIXED[name]()
    bias = (
        None if isinstance(case.operator_type, Addition | AveragePool) else torch.linspace(-0.5, 0.5, len(case.weight))
    )
    if bias is not None and name == "a dead and a constant neuron":
        bias[0] = -1000.0
    return replace(case, gate=GATES[gate], bias=bias if bias is None else bias.double())


# --- any case -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Numbers:
    """A source of random numbers. On a grid every output is exact, and many outputs equal a limit of the gate."""

    generator: torch.Generator
    dtype: torch.dtype
    grid: bool

    def __call__(self, *shape: int, shift: float = 0.0) -> Tensor:
        if self.grid:
            return torch.randint(-4, 5, shape, generator=self.generator).to(self.dtype) / 2
        return torch.randn(shape, generator=self.generator, dtype=self.dtype) + shift


@st.composite
def drawn_numbers(draw: st.DrawFn) -> Numbers:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return Numbers(generator, draw(st.sampled_from([torch.float32, torch.float64])), draw(st.booleans()))


def each(draw: st.DrawFn, dims: int, low: int, high: int) -> Shape:
    return tuple(draw(st.integers(low, high)) for _ in range(dims))


@st.composite
def convolutions(draw: st.DrawFn, random: Numbers) -> Case:
    dims = draw(st.integers(1, 3))
    kernel, stride, dilation = each(draw, dims, 1, 3), each(draw, dims, 1, 3), each(draw, dims, 1, 2)
    padding = each(draw, dims, 0, 2)
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel)]
    sizes = [max(1, span - 2 * p) + draw(st.integers(0, 3)) for span, p in zip(spans, padding)]
    groups, inner, outer = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    x = random(draw(st.integers(1, 3)), groups * inner, *sizes, shift=0.5)
    return convolution(random(groups * outer, inner, *kernel), x, stride, padding, dilation, groups)


@st.composite
def transposed_convolutions(draw: st.DrawFn, random: Numbers) -> Case:
    dims = draw(st.integers(1, 3))
    kernel, stride, dilation = each(draw, dims, 1, 3), each(draw, dims, 1, 3), each(draw, dims, 1, 2)
    padding = tuple(draw(st.integers(0, min(1, d * (k - 1)))) for d, k in zip(dilation, kernel))
    output_padding = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation))
    groups, inner, outer = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    x = random(2, groups * inner, *each(draw, dims, 2, 3), shift=0.5)
    return transposed(random(groups * outer, inner, *kernel), x, stride, padding, output_padding, dilation, groups)


@st.composite
def linears(draw: st.DrawFn, random: Numbers) -> Case:
    k, d = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    leading = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    return linear(random(k, d), random(*leading, d, shift=0.5))


@st.composite
def along_an_axis(draw: st.DrawFn, random: Numbers) -> Case:
    """Scales and additions whose channels are in any dimension."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)))
    axis = draw(st.integers(1, len(shape) - 1))
    if draw(st.booleans()):
        return scale(random(shape[axis], 1), random(*shape, shift=0.5), axis)
    coefficients = tuple(draw(st.lists(st.sampled_from([1.0, -1.0, 0.5]), min_size=2, max_size=4)))
    return addition(coefficients, tuple(random(*shape, shift=0.5) for _ in coefficients), axis)


@st.composite
def average_pools(draw: st.DrawFn, random: Numbers) -> Case:
    dims = draw(st.integers(1, 3))
    kernel = tuple(draw(st.sampled_from([2, 4])) for _ in range(dims))  # powers of two make 1/k exact
    padding = tuple(draw(st.integers(0, size // 2)) for size in kernel)
    x = random(draw(st.integers(1, 3)), draw(st.integers(1, 3)), *each(draw, dims, 4, 5), shift=0.5)
    return average_pool(kernel, each(draw, dims, 1, 3), padding, x)


STRATEGIES: dict[str, Callable[[Numbers], Any]] = {
    "convolution": convolutions,
    "transposed_convolution": transposed_convolutions,
    "linear": linears,
    "scale or addition": along_an_axis,
    "average_pool": average_pools,
}


@st.composite
def any_case(draw: st.DrawFn, strategy: str | None = None) -> Case:
    """Any operator of any type, or of one strategy, with any gate, and with or without a bias."""
    random = draw(drawn_numbers())
    case = draw(STRATEGIES[strategy or draw(st.sampled_from(sorted(STRATEGIES)))](random))
    biased = not isinstance(case.operator_type, Addition | AveragePool) and draw(st.booleans())
    bias = random(len(case.weight)) if biased else None
    return replace(case, bias=bias, gate=GATES[draw(st.sampled_from(sorted(GATES)))])
