"""Receptive fields: which inputs each output position of an operator meets with each weight."""

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
    """The receptive field of an operator's neurons, along each spatial dimension.

    Attributes:
        taps: Offsets of the weights within the window, in units of the dilation and in the order of the weights.
        stride: Distance between the windows of neighboring output positions.
        dilation: Distance between neighboring weights.
        before: Zeros in front of the input; negative numbers crop it.
        after: Zeros behind the input; negative numbers crop it.
        spacing: Distance between neighboring input values, with zeros between them.
    """

    taps: tuple[range, ...]
    stride: Shape
    dilation: Shape
    before: Shape
    after: Shape
    spacing: Shape

    def indices_by_dimension(self, sizes: Shape) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for each dimension the input indices that the output positions meet with the taps.

        Args:
            sizes: Spatial sizes of the input.

        Yields:
            The indices, int64 (positions, taps), and whether they lie outside of the input, bool (positions, taps). An
            index outside has an arbitrary valid value.
        """
        for i, (size, spacing) in enumerate(zip(sizes, self.spacing)):
            taps, extent = torch.tensor(self.taps[i]) * self.dilation[i], (size - 1) * spacing + 1
            count = (extent + self.before[i] + self.after[i] - int(taps.max()) - 1) // self.stride[i] + 1
            index = torch.arange(count)[:, None] * self.stride[i] - self.before[i] + taps
            outside = (index < 0) | (index >= extent) | (index % spacing != 0)
            yield index.div(spacing, rounding_mode="floor").clamp(0, size - 1), outside

    def indices(self, sizes: Shape) -> tuple[Tensor, Tensor | None]:
        """Return the input indices that the output positions meet with the taps, for all dimensions at once.

        Positions, taps and indices are flattened.

        Args:
            sizes: Spatial sizes of the input.

        Returns:
            The indices, int64 (positions, taps), and whether they lie outside of the input; None if no index does.
        """
        index, outside = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.bool)
        for size, (at, beyond) in zip(sizes, self.indices_by_dimension(sizes)):
            index = (index[:, None, :, None] * size + at[:, None]).flatten(2).flatten(0, 1)
            outside = (outside[:, None, :, None] | beyond[:, None]).flatten(2).flatten(0, 1)
        return index, outside if bool(outside.any()) else None


def find_receptive_field(operator: Operator) -> ReceptiveField | None:
    """Return the receptive field of an operator; None if each neuron reads only its own position.

    Raises:
        UserError: If the operator type has no known receptive field.
    """
    kernel, ones = operator.weight.shape[2:], (1,) * len(operator.weight.shape[2:])
    taps = tuple(range(k) for k in kernel)
    match operator.operator_type:
        case Convolution(stride, padding, dilation):
            if set(kernel) == set(stride) == {1} and not any(padding):
                return None
            return ReceptiveField(taps, stride, dilation, padding, padding, ones)
        case TransposedConvolution(stride, padding, output_padding, dilation):
            # A convolution of stride 1 over the input with zeros between its values, with the weights reversed.
            before = tuple(d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding))
            after = tuple(b + extra for b, extra in zip(before, output_padding))
            return ReceptiveField(tuple(t[::-1] for t in taps), ones, dilation, before, after, stride)
        case AveragePool(_, stride, padding):
            return ReceptiveField(taps, stride, ones, padding, padding, ones)
        case Linear() | Scale() | Addition():
            return None
    what = f"patches of operator type {type(operator.operator_type).__name__} cannot be sampled"
    raise UserError(operator.name, what, "Leave the operator out.")


def mean_overlap(operator: Operator) -> Tensor:
    """Return for each weight the mean number of windows that contain an input that the weight multiplies.

    The stride decides how many windows overlap. Inputs at the borders are in fewer windows.

    Returns:
        float64, in the weight's shape except for the first two dimensions, which are 1.
    """
    window, sizes = find_receptive_field(operator), operator.input_shapes[0][1:]
    if window is None:
        return torch.ones([1] * operator.weight.dim(), dtype=torch.float64)
    counts = torch.ones(1, 1, dtype=torch.float64)
    for size, (index, outside) in zip(sizes, window.indices_by_dimension(sizes)):
        positions = torch.bincount(index[~outside], minlength=size)[index]
        mean = (positions * ~outside).sum(0).double() / (~outside).sum(0).clamp(min=1)
        counts = counts[..., None] * mean.clamp(min=1)
    return counts
