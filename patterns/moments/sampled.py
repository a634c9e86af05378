"""Moments from positions sampled in each image, at a fraction of the cost of all positions.

Neighboring positions of an image have nearly the same inputs, so a few of them, drawn uniformly, estimate E[x], E[xy]
and the other means nearly as well as all. Every sum is n/N of the whole in expectation, and the estimators are ratios
of sums. The patches are gathered by index, so no input is unfolded, and the sums over them are matrix products.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from patterns.moments.accumulator import Accumulator
from patterns.moments.moments import Moments, RequiredSums
from patterns.moments.patch_gathering import PatchGatherer, flatten_positions, gather_positions
from patterns.moments.position_sampling import PositionSampler
from patterns.operators.operator import Inputs, Operator, Shape

# How many samples, and elements of patches, are gathered before they are summed, on a CPU and on a GPU. Matrix
# products of fewer samples are slow, each converts sums as large as the weights to float64, and on a GPU the number
# of launches counts.
BLOCK_LIMITS = ((1024, 2**23), (8192, 2**25))
# Elements of products that are computed before they are summed, on a CPU (what its caches hold) and on a GPU.
PRODUCT_ELEMENTS = (2**19, 2**25)


class SampledAccumulator:
    """Accumulator of the moments of one operator over batches, from sampled positions of each image."""

    def __init__(self, operator: Operator, required: RequiredSums, sampler: PositionSampler) -> None:
        """Start with sums of 0.

        Args:
            operator: The operator.
            required: The large sums to take.
            sampler: The sampler that selects the positions.
        """
        self._operator, self._sampler, self._gatherer = operator, sampler, PatchGatherer(operator)
        size = operator.groups * operator.inputs_per_neuron
        rows, elements = BLOCK_LIMITS[operator.weight.device.type == "cuda"]
        self._block = max(1, min(rows, elements // size))
        self._sums = Accumulator(operator, required, GatheredLayout(operator.groups))
        self._x = self._z = operator.weight.new_empty(0)
        self.reset()

    def reset(self) -> None:
        """Set the sums to 0 and drop the gathered samples."""
        self._sums.reset()
        self._count = 0

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the current sums by name. Later batches change these tensors in place."""
        self.flush()
        return self._sums.tensors()

    def moments(self) -> Moments:
        """Return a copy of the current moments on the CPU."""
        self.flush()
        return self._sums.moments()

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
        outputs = flatten_positions(z, op.operator_type.axis)
        sampled = self._sampler.sample(op.name, outputs.shape[1])
        count = sampled.numel()
        if self._count + count > len(self._x):
            self.flush()
            if len(self._x) < count:
                size = max(count, self._block)
                self._x, self._z = self._gatherer.allocate(inputs, size), z.new_empty(size, op.neurons)
        rows = slice(self._count, self._count + count)
        self._gatherer.gather(inputs, sampled, self._x[rows])
        gather_positions(outputs, sampled, self._z[rows])
        self._count += count
        if self._count >= self._block:
            self.flush()

    def flush(self) -> None:
        """Add the gathered samples to the sums."""
        if self._count:
            self._sums.update((self._x[: self._count],), self._z[: self._count])
            self._count = 0


@dataclass(frozen=True)
class GatheredLayout:
    """Layout of gathered patches (n, T, G, D/T) and their outputs (n, K)."""

    groups: int
    axis: int = 1

    def weight_gradient(self, inputs: Inputs, grad: Tensor, weight_shape: Shape) -> Tensor:
        """Return Σ g·x over samples for each neuron, in the weight's shape."""
        (x,) = inputs
        if self.groups == 1:
            gradient = (grad.T @ x.flatten(1)).unflatten(1, (x.shape[1], -1))
        elif self.groups == grad.shape[1]:  # a batched product of a vector and a thin matrix is slower than this
            rows = max(1, PRODUCT_ELEMENTS[x.is_cuda] // x[0].numel())
            chunks = zip(grad.split(rows), x.split(rows))
            gradient = torch.stack([(g[:, None, :, None] * c).sum(0) for g, c in chunks]).sum(0).transpose(0, 1)
        else:
            gradient = torch.einsum("ngk,ntgc->gktc", grad.unflatten(1, (self.groups, -1)), x).flatten(0, 1)
        return gradient.mT.reshape(weight_shape)

    def input_sum(self, inputs: Inputs, output_shape: Shape, weight_shape: Shape) -> Tensor:
        """Return Σ x over samples, shape (G, D)."""
        return inputs[0].sum(0).permute(1, 2, 0).flatten(1)
