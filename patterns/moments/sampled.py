"""Moments from positions sampled in each image: a fit for a fraction of what all positions cost.

Neighbouring positions of an image see nearly the same, so a few of them, drawn uniformly, tell nearly as much of E[x],
E[xy] and the rest as all: every sum is n/N of the whole in expectation, and the estimators are ratios of them. Their
patches are gathered by index, so no input is unfolded, and what is then summed is a matrix product.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from patterns.moments.moments import Accumulator, Moments, RequiredSums
from patterns.moments.patch_gathering import PatchGatherer, flatten_positions, gather_positions
from patterns.moments.position_sampling import PositionSampler
from patterns.operators.operator import Inputs, Operator, Shape

# Samples that are gathered before they are summed, and elements of patches at most, on a CPU and on a GPU: matrix
# products of fewer are slow, each brings sums as large as the weights to float64, and on a GPU the launches count.
BLOCK = ((1024, 2**23), (8192, 2**25))
# Products that are taken before they are summed: on a CPU, what its caches hold.
PRODUCTS = (2**19, 2**25)


class SampledAccumulator:
    """Moments of one operator from some positions of each image, those of `draw`, grown batch by batch."""

    def __init__(self, operator: Operator, wanted: RequiredSums, draw: PositionSampler) -> None:
        self._operator, self._draw, self._gather = operator, draw, PatchGatherer(operator)
        size = operator.groups * operator.inputs_per_neuron
        rows, elements = BLOCK[operator.weight.device.type == "cuda"]
        self._block = max(1, min(rows, elements // size))
        self._sums = Accumulator(operator, wanted, Gathered(operator.groups))
        self._x = self._z = operator.weight.new_empty(0)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._sums.reset()
        self._count = 0

    def tensors(self) -> Mapping[str, Tensor]:
        """The sums so far by name: the very tensors that later batches change."""
        self.settle()
        return self._sums.tensors()

    def moments(self) -> Moments:
        """The moments so far: a copy on the CPU."""
        self.settle()
        return self._sums.moments()

    @torch.no_grad()
    def update(self, inputs: Inputs, z: Tensor) -> None:
        """Add a batch: the operator's inputs, and its outputs z = y + b in the model's own layout."""
        op = self._operator
        if not z.numel():
            return
        outputs = flatten_positions(z, op.operator_type.axis)
        drawn = self._draw.of(op.name, outputs.shape[1])
        rows = drawn.numel()
        if self._count + rows > len(self._x):
            self.settle()
            if len(self._x) < rows:
                room = max(rows, self._block)
                self._x, self._z = self._gather.empty(inputs, room), z.new_empty(room, op.neurons)
        taken = slice(self._count, self._count + rows)
        self._gather(inputs, drawn, self._x[taken])
        gather_positions(outputs, drawn, self._z[taken])
        self._count += rows
        if self._count >= self._block:
            self.settle()

    def settle(self) -> None:
        """Sum what was gathered."""
        if self._count:
            self._sums.update((self._x[: self._count],), self._z[: self._count])
            self._count = 0


@dataclass(frozen=True)
class Gathered:
    """Patches (n, T, G, D/T), tap by tap as they are gathered, and outputs (n, K)."""

    groups: int
    axis: int = 1

    def weight_gradient(self, inputs: Inputs, grad: Tensor, weight_shape: Shape) -> Tensor:
        (x,) = inputs
        if self.groups == 1:
            gradient = (grad.T @ x.flatten(1)).unflatten(1, (x.shape[1], -1))
        elif self.groups == grad.shape[1]:  # many products of a vector and a thin matrix, each slower than its numbers
            rows = max(1, PRODUCTS[x.is_cuda] // x[0].numel())
            parts = zip(grad.split(rows), x.split(rows))
            gradient = torch.stack([(g[:, None, :, None] * part).sum(0) for g, part in parts]).sum(0).transpose(0, 1)
        else:
            gradient = torch.einsum("ngk,ntgc->gktc", grad.unflatten(1, (self.groups, -1)), x).flatten(0, 1)
        return gradient.mT.reshape(weight_shape)

    def input_sum(self, inputs: Inputs, output_shape: Shape, weight_shape: Shape) -> Tensor:
        return inputs[0].sum(0).permute(1, 2, 0).flatten(1)
