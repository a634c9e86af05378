"""Where the neurons of an operator look: which inputs each output position meets with each weight."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from patterns.errors import UserError
from patterns.operators.operator import (
    Addition,
    AveragePool,
    Convolution,
    Linear,
    Operator,
    Scale,
    Shape,
    TransposedConvolution,
)


@dataclass(frozen=True)
class ReceptiveField:
    """Where a neuron looks, along each dimension.

    taps: where in the window the weights look, in units of the dilation and in the weights' order.
    before, after: zeros around the input; negative numbers crop.  spacing: how far its values are, zeros being between.
    """

    taps: tuple[range, ...]
    stride: Shape
    dilation: Shape
    before: Shape
    after: Shape
    spacing: Shape

    def reshape_along(self, sizes: Shape) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each dimension of an input of these sizes: the index that a position meets with a tap, int64
        (positions, taps), and whether it lies outside, bool; the index is any then.
        """
        for i, (size, spacing) in enumerate(zip(sizes, self.spacing)):
            taps, whole = torch.tensor(self.taps[i]) * self.dilation[i], (size - 1) * spacing + 1
            count = (whole + self.before[i] + self.after[i] - int(taps.max()) - 1) // self.stride[i] + 1
            at = torch.arange(count)[:, None] * self.stride[i] - self.before[i] + taps
            beyond = (at < 0) | (at >= whole) | (at % spacing != 0)
            yield at.div(spacing, rounding_mode="floor").clamp(0, size - 1), beyond

    def indices(self, sizes: Shape) -> tuple[Tensor, Tensor | None]:
        """The same of all dimensions at once, positions, taps and indices flattened; None where nothing is outside."""
        index, outside = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.bool)
        for size, (at, beyond) in zip(sizes, self.indices_by_dimension(sizes)):
            index = (index[:, None, :, None] * size + at[:, None]).flatten(2).flatten(0, 1)
            outside = (outside[:, None, :, None] | beyond[:, None]).flatten(2).flatten(0, 1)
        return index, outside if bool(outside.any()) else None


def find_receptive_field(operator: Operator) -> ReceptiveField | None:
    """Where an operator's neurons look, None where at their own position. UserError where nobody can say."""
    kernel, ones = operator.weight.shape[2:], (1,) * len(operator.weight.shape[2:])
    taps = tuple(range(k) for k in kernel)
    match operator.operator_type:
        case Convolution(stride, padding, dilation):
            if set(kernel) == set(stride) == {1} and not any(padding):
                return None
            return ReceptiveField(taps, stride, dilation, padding, padding, ones)
        case TransposedConvolution(stride, padding, more, dilation):
            # A convolution of stride 1 over the input with zeros between, its weights back to front.
            before = tuple(d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding))
            after = tuple(b + m for b, m in zip(before, more))
            return ReceptiveField(tuple(t[::-1] for t in taps), ones, dilation, before, after, stride)
        case AveragePool(_, stride, padding):
            return ReceptiveField(taps, stride, ones, padding, padding, ones)
        case Linear() | Scale() | Addition():
            return None
    kind = type(operator.operator_type).__name__
    raise UserError(operator.name, f"the patches of {kind} cannot be sampled", "Leave it out of the operators.")


def mean_overlap(operator: Operator) -> Tensor:
    """How many output positions see an input that a weight meets, on average; float64, of the weight's shape
    but for its first two dimensions, which are 1.

    The stride decides which weights meet an input together, and at borders there are fewer positions.
    """
    window, sizes = find_receptive_field(operator), operator.input_shapes[0][1:]
    if window is None:
        return torch.ones([1] * operator.weight.dim(), dtype=torch.float64)
    counts = torch.ones(1, 1, dtype=torch.float64)
    for size, (at, beyond) in zip(sizes, window.indices_by_dimension(sizes)):
        positions = torch.bincount(at[~beyond], minlength=size)[at]
        mean = (positions * ~beyond).sum(0).double() / (~beyond).sum(0).clamp(min=1)
        counts = counts[..., None] * mean.clamp(min=1)
    return counts
