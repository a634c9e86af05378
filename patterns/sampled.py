"""Moments from positions sampled in each image: a fit for a fraction of what all positions cost.

Neighbouring positions of an image see nearly the same, so a few of them, drawn uniformly, tell nearly as much of E[x],
E[xy] and the rest as all: every sum is n/N of the whole in expectation, and the estimators are ratios of them. Their
patches are gathered by index, so no input is unfolded, and what is then summed is a matrix product.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from patterns.moments import Accumulator, Moments, Wanted
from patterns.operators import Inputs, Operator, Shape
from patterns.patches import Draw, Gatherer, chosen, per_image

# Samples that are gathered before they are summed, and elements of patches at most, on a CPU and on a GPU: matrix
# products of fewer are slow, each brings sums as large as the weights to float64, and on a GPU the launches count.
BLOCK = ((1024, 2**23), (8192, 2**25))


class SampledAccumulator:
    """Moments of one operator from some positions of each image, those of `draw`, grown batch by batch."""

    def __init__(self, operator: Operator, wanted: Wanted, draw: Draw) -> None:
        self._operator, self._draw, self._gather = operator, draw, Gatherer(operator)
        size = operator.groups * operator.inputs_per_neuron
        rows, elements = BLOCK[operator.weight.device.type == "cuda"]
        self._block = max(1, min(rows, elements // size))
        self._sums = Accumulator(of_patches(operator), wanted)
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
        outputs = per_image(z, op.kind.axis)
        drawn = self._draw.of(op.name, outputs.shape[1])
        rows = drawn.numel()
        if self._count + rows > len(self._x):
            self.settle()
            self._make_room(max(rows, self._block), outputs.dtype)
        taken = slice(self._count, self._count + rows)
        x = self._gather(inputs, drawn)
        self._x[taken].view(x.shape).copy_(x)
        self._z[taken].view(*drawn.shape, -1).copy_(chosen(outputs, drawn))
        self._count += rows
        if self._count >= self._block:
            self.settle()

    def _make_room(self, rows: int, dtype: torch.dtype) -> None:
        """Memory for so many samples, of this dtype or float32, whichever is wider."""
        if len(self._x) < rows:
            op, dtype = self._operator, torch.promote_types(dtype, torch.float32)
            device = op.weight.device
            self._x = torch.empty(rows, op.groups, op.inputs_per_neuron, dtype=dtype, device=device)
            self._z = torch.empty(rows, op.neurons, dtype=dtype, device=device)

    def settle(self) -> None:
        """Sum what was gathered."""
        if self._count:
            self._sums.update((self._x[: self._count],), self._z[: self._count])
            self._count = 0


def of_patches(operator: Operator) -> Operator:
    """An operator that takes the patches of another."""
    shapes = ((operator.groups, operator.inputs_per_neuron),), (operator.neurons,)
    kind = Gathered(operator.groups)
    return Operator(operator.name, kind, operator.weight, operator.bias, *shapes, operator.source, operator.gate)


@dataclass(frozen=True)
class Gathered:
    """The kind of an operator that takes patches: inputs (n, G, D), outputs (n, K). No model has it."""

    groups: int
    axis: int = 1

    def forward(self, inputs: Inputs, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = torch.einsum("ngd,gkd->ngk", inputs[0], self._by_group(weight)).flatten(1)
        return z if bias is None else z + bias

    def weight_gradient(self, inputs: Inputs, grad: Tensor, weight_shape: Shape) -> Tensor:
        (x,) = inputs
        if grad.shape[1] == self.groups:  # many products of a vector and a thin matrix, each slower than its numbers
            return (grad[..., None] * x).sum(0).reshape(weight_shape)
        return (grad.T.unflatten(0, (self.groups, -1)) @ x.movedim(1, 0)).reshape(weight_shape)

    def input_sum(self, inputs: Inputs, output_shape: Shape, weight_shape: Shape) -> Tensor:
        return inputs[0].sum(0)

    def input_gradient(self, grad: Tensor, weight: Tensor, input_shapes: tuple[Shape, ...]) -> Inputs:
        return (torch.einsum("ngk,gkd->ngd", grad.unflatten(1, (self.groups, -1)), self._by_group(weight)),)

    def _by_group(self, weight: Tensor) -> Tensor:
        return weight.flatten(1).unflatten(0, (self.groups, -1))
