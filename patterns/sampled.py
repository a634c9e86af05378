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
# Products that are taken before they are summed: what a CPU's caches hold. On a GPU each launch counts.
PRODUCTS = 2**19


class SampledAccumulator:
    """Moments of one operator from some positions of each image, those of `draw`, grown batch by batch."""

    def __init__(self, operator: Operator, wanted: Wanted, draw: Draw) -> None:
        self._operator, self._draw, self._gather = operator, draw, Gatherer(operator)
        size = operator.groups * operator.inputs_per_neuron
        rows, elements = BLOCK[operator.weight.device.type == "cuda"]
        self._block = max(1, min(rows, elements // size))
        self._sums = Accumulator(of_patches(operator, self._gather.taps), wanted)
        self._x = self._z = operator.weight.new_empty(0)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._sums.reset()
        self._count = 0

    def tensors(self) -> Mapping[str, Tensor]:
        """The sums so far by name."""
        self.settle()
        return {name: self._in_order(t) for name, t in self._sums.tensors().items()}

    def moments(self) -> Moments:
        """The moments so far: a copy on the CPU."""
        return Moments.from_tensors({name: t.to("cpu", copy=True) for name, t in self.tensors().items()})

    def _in_order(self, total: Tensor) -> Tensor:
        """A sum, its D inputs tap by tap, as one in the order of the operator's weight."""
        return total if total.dim() == 1 else total.unflatten(1, (self._gather.taps, -1)).mT.flatten(1)

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
            if len(self._x) < rows:
                room = max(rows, self._block)
                self._x, self._z = self._gather.empty(inputs, room), z.new_empty(room, op.neurons)
        taken = slice(self._count, self._count + rows)
        self._gather(inputs, drawn, self._x[taken])
        chosen(outputs, drawn, self._z[taken])
        self._count += rows
        if self._count >= self._block:
            self.settle()

    def settle(self) -> None:
        """Sum what was gathered."""
        if self._count:
            self._sums.update((self._x[: self._count],), self._z[: self._count])
            self._count = 0


def of_patches(operator: Operator, taps: int) -> Operator:
    """An operator that takes the patches of another, as they are gathered: each neuron's inputs tap by tap."""
    weight = operator.weight.flatten(1).unflatten(1, (-1, taps)).mT
    shapes = ((taps, operator.groups, weight.shape[2]),), (operator.neurons,)
    kind = Gathered(operator.groups)
    return Operator(operator.name, kind, weight, operator.bias, *shapes, operator.source, operator.gate)


@dataclass(frozen=True)
class Gathered:
    """The kind of an operator that takes patches: inputs (n, T, G, D/T), weight (K, T, D/T), outputs (n, K).

    No model has it.
    """

    groups: int
    axis: int = 1

    def forward(self, inputs: Inputs, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = torch.einsum("ntgc,gktc->ngk", inputs[0], weight.unflatten(0, (self.groups, -1))).flatten(1)
        return z if bias is None else z + bias

    def weight_gradient(self, inputs: Inputs, grad: Tensor, weight_shape: Shape) -> Tensor:
        (x,) = inputs
        if self.groups == 1:
            return (grad.T @ x.flatten(1)).view(weight_shape)
        if self.groups == grad.shape[1]:  # many products of a vector and a thin matrix, each slower than its numbers
            rows = max(1, PRODUCTS // x[0].numel())
            parts = zip(grad.split(rows), x.split(rows))
            return torch.stack([(g[:, None, :, None] * part).sum(0) for g, part in parts]).sum(0).transpose(0, 1)
        return torch.einsum("ngk,ntgc->gktc", grad.unflatten(1, (self.groups, -1)), x).flatten(0, 1)

    def input_sum(self, inputs: Inputs, output_shape: Shape, weight_shape: Shape) -> Tensor:
        return inputs[0].sum(0).transpose(0, 1).flatten(1)

    def input_gradient(self, grad: Tensor, weight: Tensor, input_shapes: tuple[Shape, ...]) -> Inputs:
        by_group = grad.unflatten(1, (self.groups, -1)), weight.unflatten(0, (self.groups, -1))
        return (torch.einsum("ngk,gktc->ntgc", *by_group),)
