"""Patches of an operator's inputs at given output positions."""

from functools import lru_cache, reduce
from math import prod

import torch
from torch import Tensor

from patterns.operators.operator import Addition, Inputs, Operator, Shape
from patterns.operators.receptive_fields import find_receptive_field


class PatchGatherer:
    """Gatherer of an operator's inputs at given output positions.

    Attributes:
        taps: T, the number of positions in a neuron's window, or of terms of an addition. A patch has D/T inputs at
            each tap.
    """

    def __init__(self, operator: Operator) -> None:
        """Prepare for an operator. Raise UserError if its patches cannot be gathered."""
        self._operator, self._receptive_field = operator, find_receptive_field(operator)
        # By the sizes of the input: the index of each tap, and 1 if the tap is inside of the input.
        self._indices: dict[Shape, tuple[Tensor, Tensor | None]] = {}
        shape = operator.weight.shape
        self.taps = shape[1] if isinstance(operator.operator_type, Addition) else prod(shape[2:])

    def allocate(self, inputs: Inputs, samples: int) -> Tensor:
        """Return uninitialized memory for patches (samples, T, G, D/T), in the widest dtype of the inputs."""
        op, dtype = self._operator, reduce(torch.promote_types, (x.dtype for x in inputs))
        shape = samples, self.taps, op.groups, op.inputs_per_neuron // self.taps
        return torch.empty(shape, dtype=dtype, device=inputs[0].device)

    def gather(self, inputs: Inputs, positions: Tensor, out: Tensor) -> None:
        """Write patches to `out`, image by image.

        Args:
            inputs: The operator's inputs, with the batch first.
            positions: Indices into the flattened output positions of each image, int64 (N, P).
            out: Contiguous memory of shape (N·P, T, G, D/T).
        """
        operator_type, x, out = self._operator.operator_type, inputs[0], out.flatten(2)
        if self._receptive_field is not None:
            self._gather_windows(x, positions, out)
        elif isinstance(operator_type, Addition):
            shape = torch.broadcast_shapes(*(i.shape for i in inputs))
            for term, x in enumerate(inputs):
                gather_positions(flatten_positions(x.expand(shape), operator_type.axis), positions, out[:, term])
        else:
            gather_positions(flatten_positions(x, operator_type.axis), positions, out[:, 0])

    def gather_by_group(self, inputs: Inputs, positions: Tensor) -> Tensor:
        """Return patches of shape (G, N·P, D); see `gather`."""
        out = self.allocate(inputs, positions.numel())
        self.gather(inputs, positions, out)
        return out.permute(2, 0, 3, 1).flatten(2)

    def _gather_windows(self, x: Tensor, positions: Tensor, out: Tensor) -> None:
        """Gather windows of x (N, C, *sizes). The padding is not written out; taps outside of x are set to 0."""
        assert self._receptive_field is not None
        sizes = tuple(x.shape[2:])
        if sizes not in self._indices:
            index, outside = self._receptive_field.indices(sizes)
            self._indices[sizes] = index.to(x.device), None if outside is None else outside.logical_not().to(x)
        index, inside = self._indices[sizes]
        gather_positions(x.flatten(2).mT, index[positions].flatten(1), out.flatten(0, 1))
        if inside is not None:
            out.mul_(inside[positions].flatten(0, 1)[..., None])  # masks are slow on CPUs


def gather_positions(values: Tensor, positions: Tensor, out: Tensor) -> Tensor:
    """Write values (N, positions, C) at the given positions (N, P) of each image to `out` (N·P, C), and return it."""
    images, available = values.shape[:2]
    # Contiguous, as in channels_last: the channels of a position are copied at once.
    if values.is_contiguous() and values.dtype == out.dtype:
        rows = positions + multiples(available, images, values.device)
        return torch.index_select(values.flatten(0, 1), 0, rows.flatten(), out=out)
    out.unflatten(0, positions.shape).copy_(values[multiples(1, images, values.device), positions])
    return out


@lru_cache
def multiples(step: int, count: int, device: torch.device) -> Tensor:
    """Return 0, step, 2·step, …, int64 (count, 1). Cached, because a pass needs them some hundred times."""
    return torch.arange(count, device=device)[:, None] * step


def flatten_positions(values: Tensor, axis: int) -> Tensor:
    """Reshape (N, *) with channels along `axis` to (N, positions, channels)."""
    moved = values.movedim(axis, -1)
    return moved.reshape(len(moved), prod(moved.shape[1:-1]), moved.shape[-1])
