"""Patches of an operator's inputs at some of its output positions."""

from functools import lru_cache, reduce
from math import prod

import torch
from torch import Tensor

from patterns.operators.operator import Addition, Inputs, Operator, Shape
from patterns.operators.receptive_fields import window_of


class PatchGatherer:
    """An operator's inputs at some of its output positions. UserError for a kind whose patches cannot be gathered.

    taps: T, the places in a neuron's window or the terms of an addition; D/T inputs of a neuron lie at each.
    """

    def __init__(self, operator: Operator) -> None:
        self._operator, self._window = operator, window_of(operator)
        self._looks: dict[Shape, tuple[Tensor, Tensor | None]] = {}  # by the input's sizes: index, and 1 where inside
        shape = operator.weight.shape
        self.taps = shape[1] if isinstance(operator.operator_type, Addition) else prod(shape[2:])

    def empty(self, inputs: Inputs, samples: int) -> Tensor:
        """Memory for the inputs of so many samples (n, T, G, D/T)."""
        op, dtype = self._operator, reduce(torch.promote_types, (x.dtype for x in inputs))
        shape = samples, self.taps, op.groups, op.inputs_per_neuron // self.taps
        return torch.empty(shape, dtype=dtype, device=inputs[0].device)

    def __call__(self, inputs: Inputs, positions: Tensor, out: Tensor) -> None:
        """Write the inputs to `out` (N·P, T, G, D/T), contiguous, image by image.

        inputs: the operator's, batch first.  positions: int64 (N, P), each an index into the output's positions of
        its image, flattened.
        """
        kind, x, out = self._operator.operator_type, inputs[0], out.flatten(2)
        if self._window is not None:
            self._windows(x, positions, out)
        elif isinstance(kind, Addition):
            shape = torch.broadcast_shapes(*(i.shape for i in inputs))
            for term, x in enumerate(inputs):
                gather_positions(flatten_positions(x.expand(shape), kind.axis), positions, out[:, term])
        else:
            gather_positions(flatten_positions(x, kind.axis), positions, out[:, 0])

    def by_group(self, inputs: Inputs, positions: Tensor) -> Tensor:
        """The same as (G, N·P, D)."""
        out = self.empty(inputs, positions.numel())
        self(inputs, positions, out)
        return out.permute(2, 0, 3, 1).flatten(2)

    def _windows(self, x: Tensor, positions: Tensor, out: Tensor) -> None:
        """Of x (N, C, *sizes), written out without zeros around it: what lies outside is known by its place."""
        assert self._window is not None
        sizes = tuple(x.shape[2:])
        if sizes not in self._looks:
            index, outside = self._window.looks(sizes)
            self._looks[sizes] = index.to(x.device), None if outside is None else outside.logical_not().to(x)
        index, inside = self._looks[sizes]
        gather_positions(x.flatten(2).mT, index[positions].flatten(1), out.flatten(0, 1))
        if inside is not None:
            out.mul_(inside[positions].flatten(0, 1)[..., None])  # masks are slow on CPUs


def gather_positions(values: Tensor, positions: Tensor, out: Tensor) -> Tensor:
    """Values (N, positions, C) at some positions (N, P) of each image, in `out` (N·P, C)."""
    images, available = values.shape[:2]
    # As in channels_last, where each position's numbers are copied at once.
    if values.is_contiguous() and values.dtype == out.dtype:
        rows = positions + multiples(available, images, values.device)
        return torch.index_select(values.flatten(0, 1), 0, rows.flatten(), out=out)
    out.unflatten(0, positions.shape).copy_(values[multiples(1, images, values.device), positions])
    return out


@lru_cache
def multiples(step: int, count: int, device: torch.device) -> Tensor:
    """0, step, …, int64 (count, 1): made once, since a pass asks for them some hundred times."""
    return torch.arange(count, device=device)[:, None] * step


def flatten_positions(values: Tensor, axis: int) -> Tensor:
    """(N, *…) with neurons or inputs along `axis` → (N, positions, that dimension)."""
    moved = values.movedim(axis, -1)
    return moved.reshape(len(moved), prod(moved.shape[1:-1]), moved.shape[-1])
