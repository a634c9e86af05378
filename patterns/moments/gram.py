"""Moments with the Gram matrix Σxxᵀ, over patches at sampled positions.

The quality of a pattern needs Σxxᵀ, the only sum that is not a weight gradient. So the patches are written out here,
at the sampled positions only. All sums that enter the quality of an operator are taken over the same patches.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patterns.moments.moments import Moments, RequiredSums, Sums, pair, require, sums_bytes, zero_moments
from patterns.moments.patch_gathering import PatchGatherer, flatten_positions, gather_positions
from patterns.moments.position_sampling import PositionSampler
from patterns.operators.operator import Inputs, Operator

PATCH_ELEMENTS = 2**23  # elements of patches that are written out at once: 64 MiB of float64
ALL_SUMS = RequiredSums()


@dataclass(frozen=True)
class PatchMoments:
    """Moments of sampled patches, including Σxxᵀ. Patch moments of different data add up with `+`.

    Attributes:
        moments: The moments of the sampled patches, with all large sums.
        xx: Σxxᵀ for each group of neurons that share their inputs, float64, shape (G, D, D).
        squared: Σ(m·y)² with the weights m of a smooth gate, float64, shape (K,). None for other operators; for a
            rectifier it is Σy² over the open gate.

    Example:
        >>> import torch, patterns
        >>> network = patterns.trace(torch.nn.Linear(3, 2), torch.zeros(2, 3))
        >>> found = patterns.accumulate_patches(network, [torch.eye(3)], ["linear.0"])["linear.0"]
        >>> torch.equal(found.xx[0], torch.eye(3, dtype=torch.float64))
        True
    """

    moments: Moments
    xx: Tensor
    squared: Tensor | None = None

    def __add__(self, other: "PatchMoments") -> "PatchMoments":
        squared = pair(self.squared, other.squared, "one side has a smooth gate, the other has not")
        return PatchMoments(self.moments + other.moments, self.xx + other.xx, squared and squared[0] + squared[1])

    @property
    def nbytes(self) -> int:
        """Number of bytes of the sums."""
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name: those of `Moments.tensors`, `xx` and `squared`."""
        squared = {} if self.squared is None else {"squared": self.squared}
        return {**self.moments.tensors(), "xx": self.xx, **squared}

    @staticmethod
    def from_tensors(named: Mapping[str, Tensor]) -> "PatchMoments":
        """Return the moments with these sums; the inverse of `tensors`.

        Args:
            named: The sums by name.

        Raises:
            KeyError: If a sum is missing.
            ValueError: If a name is unknown.
        """
        own = {"xx", "squared"}
        moments = Moments.from_tensors({k: t for k, t in named.items() if k not in own})
        return PatchMoments(moments, named["xx"], named.get("squared"))


def zero_patch_moments(operator: Operator) -> PatchMoments:
    """Return the moments of no patches, on the operator's device."""
    d = operator.inputs_per_neuron
    xx = torch.zeros((operator.groups, d, d), dtype=torch.float64, device=operator.weight.device)
    moments = replace(zero_moments(operator, ALL_SUMS), tokens=None)
    smooth = operator.gate is not None and operator.gate.is_smooth
    return PatchMoments(moments, xx, torch.zeros_like(moments.total.y) if smooth else None)


def patch_moments_bytes(operator: Operator) -> int:
    """Return the bytes of an operator's `PatchMoments`, before any data is read.

    Args:
        operator: The operator.

    Example:
        >>> import torch, patterns
        >>> from patterns.moments import moments_bytes
        >>> operator = patterns.trace(torch.nn.Linear(3, 2), torch.zeros(2, 3)).operators["linear.0"]
        >>> patch_moments_bytes(operator) - moments_bytes(operator, RequiredSums()) == 8 * 3 * 3
        True
    """
    squared = operator.neurons if operator.gate is not None and operator.gate.is_smooth else 0
    return sums_bytes(operator, ALL_SUMS) + 8 * (operator.groups * operator.inputs_per_neuron**2 + squared)


class PatchAccumulator:
    """Accumulator of the `PatchMoments` of one operator over batches.

    Patches are converted to float64, and y = wᵀx is computed from them, whatever the model's precision: the sampled
    patches are few, and neither the small eigenvalues of Cov[x] nor the exact kernel of Cov[d] (wᵀd = 0) survive
    float32 sums or outputs rounded to float32. Activations with a mean of m deviations lose m² of 2⁵³. Only the
    gate is computed from the model's own outputs.
    """

    def __init__(self, operator: Operator, sampler: PositionSampler) -> None:
        """Start with sums of 0; `sampler` selects the positions of each image."""
        self._operator, self._sampler, self._gatherer = operator, sampler, PatchGatherer(operator)
        self.reset()

    def reset(self) -> None:
        """Set the sums to 0."""
        self._sums = zero_patch_moments(self._operator)

    def flush(self) -> None:
        """Do nothing: this accumulator does not buffer."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the current sums by name. The next `update` changes these tensors in place."""
        return self._sums.tensors()

    def moments(self) -> PatchMoments:
        """Return a copy of the current moments on the CPU."""
        return PatchMoments.from_tensors({name: t.to("cpu", copy=True) for name, t in self.tensors().items()})

    @torch.no_grad()
    def update(self, inputs: Inputs, z: Tensor) -> None:
        """Add a batch.

        Args:
            inputs: The operator's inputs.
            z: The operator's outputs y + b, in the model's layout.
        """
        op = self._operator
        if not z.numel():
            return
        sampled = self._sampler.sample(op.name, z[0].numel() // op.neurons)
        gate = None
        if op.gate is not None:
            axis = op.operator_type.axis
            gate = flatten_positions(op.gate.weight_function(axis, z.device)(z), axis)
        images = max(1, PATCH_ELEMENTS // (sampled.shape[1] * op.groups * op.inputs_per_neuron))
        for start in range(0, len(z), images):
            chunk = slice(start, start + images)
            x = self._gatherer.gather_by_group(tuple(i[chunk] for i in inputs), sampled[chunk]).double()
            mask = None
            if gate is not None:
                out = gate.new_empty(x.shape[1], op.neurons)
                mask = gather_positions(gate[chunk], sampled[chunk], out).mT.double()
            self._add(x, mask)

    def _add(self, x: Tensor, mask: Tensor | None) -> None:
        """Add patches (G, n, D), given the weights of the gate, (K, n)."""
        weight = self._operator.weight.double().flatten(1).unflatten(0, (len(x), -1))
        y = (weight @ x.mT).flatten(0, 1)
        total, opened = self._sums.moments.total, self._sums.moments.open
        self._sums.xx.baddbmm_(x.mT, x)
        add_samples(total, torch.full_like(total.n, x.shape[1]), y, y, x.sum(1), x)
        if opened is not None and mask is not None:
            x_open = (mask.unflatten(0, (len(x), -1)) @ x).flatten(0, 1)
            add_samples(opened, mask.sum(1).to(opened.n.dtype), y, mask * y, x_open, x)
            if self._sums.squared is not None:
                self._sums.squared.add_((mask * y).square().sum(1))


def add_samples(sums: Sums, n: Tensor, y: Tensor, y_masked: Tensor, x_sum: Tensor, x: Tensor) -> None:
    """Add n samples, given y (K, n), y times the gate's weights, Σx times these weights, and patches (G, n, D)."""
    sums.n.add_(n)
    sums.y.add_(y_masked.sum(1))
    sums.yy.add_((y * y_masked).sum(1))
    require(sums.x).add_(x_sum)
    require(sums.xy).add_((y_masked.unflatten(0, (len(x), -1)) @ x).flatten(0, 1))
