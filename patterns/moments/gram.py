"""Moments with the Gram matrix Σxxᵀ, over patches at positions sampled from each image.

The quality of a pattern needs Σxxᵀ, the one sum that is no weight gradient: here patches are written
out, but only at the sampled positions, gathered by index. Everything that enters the quality of an
operator is summed over the same patches.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from patterns.moments import moments as sums
from patterns.moments.moments import Moments, RequiredSums, moments_bytes
from patterns.moments.patch_gathering import PatchGatherer, flatten_positions, gather_positions
from patterns.moments.position_sampling import PositionSampler
from patterns.operators.operator import Inputs, Operator

# Elements of patches written out at a time: 64 MiB of float64.
PATCH_ELEMENTS = 2**23
SUMS = RequiredSums()


@dataclass(frozen=True)
class PatchMoments:
    """Sums over sampled patches, those of second order in x included; a commutative monoid under `+`.

    moments: the sums of `Moments` over the sampled patches, Σx and Σxy among them.
    xx: Σxxᵀ of the inputs that a group of neurons shares, float64, shape (G, D, D).
    """

    moments: Moments
    xx: Tensor

    def __add__(self, other: "PatchMoments") -> "PatchMoments":
        return PatchMoments(self.moments + other.moments, self.xx + other.xx)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.moments.nbytes + self.xx.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """The sums as named tensors: those of `Moments.tensors`, and `xx`."""
        return {**self.moments.tensors(), "xx": self.xx}

    @staticmethod
    def from_tensors(named: Mapping[str, Tensor]) -> "PatchMoments":
        """The inverse of `tensors`. KeyError where a sum is missing, ValueError where one is not known."""
        return PatchMoments(Moments.from_tensors({k: t for k, t in named.items() if k != "xx"}), named["xx"])


def zero_patch_moments(operator: Operator) -> PatchMoments:
    """The neutral element: the sums of no patches, on the operator's device."""
    d = operator.inputs_per_neuron
    xx = torch.zeros((operator.groups, d, d), dtype=torch.float64, device=operator.weight.device)
    return PatchMoments(sums.zero_moments(operator, SUMS), xx)


def patch_moments_bytes(operator: Operator) -> int:
    """Bytes of an operator's PatchMoments, known before any data is read."""
    return moments_bytes(operator, SUMS) + 8 * operator.groups * operator.inputs_per_neuron**2


class PatchAccumulator:
    """PatchMoments of one operator, grown in place batch by batch.

    Patches and outputs y = wᵀx are taken to float64 before anything is multiplied, whatever the model's
    precision: the sampled patches are few, and the small eigenvalues of Cov[x] and the exact kernel of
    Cov[d] (wᵀd = 0) survive neither float32 sums nor outputs rounded to float32. Activations with a
    mean of m deviations lose m² of 2⁵³. The gate alone is the model's own.

    draw: which positions count.
    """

    def __init__(self, operator: Operator, draw: PositionSampler) -> None:
        self._operator, self._draw, self._gather = operator, draw, PatchGatherer(operator)
        self.reset()

    def reset(self) -> None:
        """Forget all sums."""
        self._sums = zero_patch_moments(self._operator)

    def settle(self) -> None:
        """Sum what waits: nothing does."""

    def tensors(self) -> dict[str, Tensor]:
        """The sums so far by name: the very tensors that the next batch changes."""
        return self._sums.tensors()

    def moments(self) -> PatchMoments:
        """The sums so far: a copy on the CPU."""
        return PatchMoments.from_tensors({name: t.to("cpu", copy=True) for name, t in self.tensors().items()})

    @torch.no_grad()
    def update(self, inputs: Inputs, z: Tensor) -> None:
        """Add a batch: the operator's inputs, and its outputs z = y + b in the model's own layout."""
        op = self._operator
        if not z.numel():
            return
        drawn = self._draw.of(op.name, z[0].numel() // op.neurons)
        gate = None if op.gate is None else flatten_positions(op.gate.open(z), op.operator_type.axis)
        images = max(1, PATCH_ELEMENTS // (drawn.shape[1] * op.groups * op.inputs_per_neuron))
        for start in range(0, len(z), images):
            part = slice(start, start + images)
            x = self._gather.by_group(tuple(i[part] for i in inputs), drawn[part]).double()
            mask = (
                None
                if gate is None
                else gather_positions(gate[part], drawn[part], gate.new_empty(x.shape[1], op.neurons))
            )
            self._add(x, None if mask is None else mask.mT.double())

    def _add(self, x: Tensor, mask: Tensor | None) -> None:
        """Add patches (G, n, D), and where they open the gate, (K, n)."""
        weight = self._operator.weight.double().flatten(1).unflatten(0, (len(x), -1))
        y = (weight @ x.mT).flatten(0, 1)
        total, opened = self._sums.moments.total, self._sums.moments.open
        self._sums.xx.baddbmm_(x.mT, x)
        add(total, torch.full_like(total.n, x.shape[1]), y, y, x.sum(1), x)
        if opened is not None and mask is not None:
            x_open = (mask.unflatten(0, (len(x), -1)) @ x).flatten(0, 1)
            add(opened, mask.sum(1).long(), y, mask * y, x_open, x)


def add(into: sums.Sums, n: Tensor, y: Tensor, y_chosen: Tensor, x_sum: Tensor, x: Tensor) -> None:
    """Add n samples: y (K, n), the same with 0 for what is not chosen, Σx of the chosen, patches (G, n, D)."""
    into.n.add_(n)
    into.y.add_(y_chosen.sum(1))
    into.yy.add_((y * y_chosen).sum(1))
    sums.required(into.x).add_(x_sum)
    sums.required(into.xy).add_((y_chosen.unflatten(0, (len(x), -1)) @ x).flatten(0, 1))
