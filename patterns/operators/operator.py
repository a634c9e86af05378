"""The kinds of linear operators, each seen as a bank of neurons y = wᵀx.

A kind is bilinear in its input and its weight. Everything this project computes follows from that:
the sums Σ g·x over all positions are its *weight gradient* for the output gradient g, so patches are
never unfolded; and an explanation is its *input gradient* with a pattern in the weight's place.

Shapes: `N` samples, `K` neurons, `D` inputs of a neuron, `G` groups of neurons that see the same
inputs. A weight has its operator's own shape, with K first; `weight.flatten(1)` is (K, D).
"""

from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patterns.operators import winograd

Inputs = tuple[Tensor, ...]
Shape = tuple[int, ...]
aten = torch.ops.aten


class Summable(Protocol):
    """Inputs and outputs whose products can be summed. `inputs` are the operator's inputs, samples first."""

    @property
    def axis(self) -> int:
        """The output's dimension that counts the neurons; all others count samples."""
        ...

    def weight_gradient(self, inputs: Inputs, grad: Tensor, weight_shape: Shape) -> Tensor:
        """Σ g·x over samples for each neuron, in the weight's shape; `grad` has the output's shape."""
        ...

    def input_sum(self, inputs: Inputs, output_shape: Shape, weight_shape: Shape) -> Tensor:
        """Σ x over samples, shape (G, D)."""
        ...


class OperatorType(Summable, Protocol):
    """What an operator kind can do."""

    def forward(self, inputs: Inputs, weight: Tensor, bias: Tensor | None) -> Tensor:
        """z = wᵀx + b, just as the model computes it."""
        ...

    def input_gradient(self, grad: Tensor, weight: Tensor, input_shapes: tuple[Shape, ...]) -> Inputs:
        """The gradient of the inputs, for `grad` of the output and this weight."""
        ...


@dataclass(frozen=True)
class Convolution:
    """Convolution over any number of dimensions; weight (K, C/groups, *kernel)."""

    stride: Shape
    padding: Shape
    dilation: Shape
    groups: int = 1
    axis: int = 1

    def forward(self, inputs: Inputs, weight: Tensor, bias: Tensor | None) -> Tensor:
        return aten.convolution(
            *inputs, weight, bias, self.stride, self.padding, self.dilation, False, (0,), self.groups
        )

    def weight_gradient(self, inputs: Inputs, grad: Tensor, weight_shape: Shape) -> Tensor:
        (x,), kernel = inputs, weight_shape[2:]
        if self.groups == prod(kernel) == 1 and not any(self.padding):
            seen: tuple[Any, ...] = (..., *(slice(None, None, step) for step in self.stride))
            return sum_of_products(grad.flatten(2), x[seen].flatten(2)).view(weight_shape)
        if self.groups == weight_shape[0] == x.shape[1] and kernel == x.shape[2:] and not any(self.padding):
            return (grad * x).sum(0)[:, None]  # a mean over whole images
        if x.device.type == "cpu" and len(kernel) == 2:
            plain = self.groups == 1 and set(self.stride) == set(self.dilation) == {1}
            if plain and winograd.is_faster(x, grad, kernel):
                return winograd.weight_gradient(x, grad, kernel, self.padding)
            # oneDNN is fast for small depthwise kernels only; with others on large images, faster in this layout.
            if weight_shape[1] == 1 and min(kernel) > 3 and grad[0, 0].numel() > 10 * prod(kernel):
                x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
        return self._backward(grad, x, x.new_empty(1).expand(weight_shape), (False, True, False))[1]

    def input_sum(self, inputs: Inputs, output_shape: Shape, weight_shape: Shape) -> Tensor:
        return sum_of_patches(self, inputs[0], output_shape, weight_shape)

    def input_gradient(self, grad: Tensor, weight: Tensor, input_shapes: tuple[Shape, ...]) -> Inputs:
        x = grad.new_empty(1).expand(input_shapes[0])
        return (self._backward(grad, x, weight, (True, False, False))[0],)

    def _backward(self, grad: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]) -> list[Tensor]:
        options = (self.stride, self.padding, self.dilation, False, (0,), self.groups)
        return aten.convolution_backward(grad, x, weight, None, *options, mask)


@dataclass(frozen=True)
class TransposedConvolution:
    """A transposed convolution over any number of dimensions; weight (K, C/groups, *kernel), its inputs C channels.

    A neuron is an output channel. Its inputs are those of a convolution over the input with zeros between
    its positions, so an output position that the stride leaves out of reach of some weights sees 0 there.
    """

    stride: Shape
    padding: Shape
    output_padding: Shape
    dilation: Shape
    groups: int = 1
    axis: int = 1

    def forward(self, inputs: Inputs, weight: Tensor, bias: Tensor | None) -> Tensor:
        return aten.convolution(*inputs, swap_channels(weight, self.groups), bias, *self._options())

    def weight_gradient(self, inputs: Inputs, grad: Tensor, weight_shape: Shape) -> Tensor:
        (x,) = inputs
        weight = swap_channels(x.new_empty(1).expand(weight_shape), self.groups)
        gradient = aten.convolution_backward(grad, x, weight, None, *self._options(), (False, True, False))[1]
        return swap_channels(gradient, self.groups)

    def input_sum(self, inputs: Inputs, output_shape: Shape, weight_shape: Shape) -> Tensor:
        return sum_of_patches(self, inputs[0], output_shape, weight_shape)

    def input_gradient(self, grad: Tensor, weight: Tensor, input_shapes: tuple[Shape, ...]) -> Inputs:
        x, weight = grad.new_empty(1).expand(input_shapes[0]), swap_channels(weight, self.groups)
        return (aten.convolution_backward(grad, x, weight, None, *self._options(), (True, False, False))[0],)

    def _options(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, True, self.output_padding, self.groups


def sum_of_products(grad: Tensor, x: Tensor) -> Tensor:
    """Σ g·x, shape (K, C), over images and positions, of (N, K, P) and (N, C, P)."""
    k, c, p = grad.shape[1], *x.shape[1:]
    if k * c <= (k + c) * p:  # each image's products are no more numbers than the image
        return (grad @ x.mT).sum(0)
    return grad.transpose(0, 1).flatten(1) @ x.transpose(0, 1).flatten(1).T


def sum_of_patches(
    kind: Convolution | TransposedConvolution, x: Tensor, output_shape: Shape, weight_shape: Shape
) -> Tensor:
    """Σ x over samples, shape (G, D): a neuron of constant output gradient 1 in each group.

    The gradient is linear in x, so the batch is summed before it.
    """
    ones = x.new_ones((1, kind.groups, *output_shape[2:]))
    shape = (kind.groups, *weight_shape[1:])
    return kind.weight_gradient((x.sum(0, keepdim=True),), ones, shape).flatten(1)


def swap_channels(weight: Tensor, groups: int) -> Tensor:
    """A convolution's weight (K, C/groups, …) as torch's transposed ones have it, (C, K/groups, …), and back."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class Linear:
    """Matrix product with the last dimension; weight (K, D)."""

    axis: int = -1
    groups = 1

    def forward(self, inputs: Inputs, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(inputs[0], weight, bias)

    def weight_gradient(self, inputs: Inputs, grad: Tensor, weight_shape: Shape) -> Tensor:
        return grad.flatten(0, -2).mT @ inputs[0].flatten(0, -2)

    def input_sum(self, inputs: Inputs, output_shape: Shape, weight_shape: Shape) -> Tensor:
        return inputs[0].flatten(0, -2).sum(0, keepdim=True)

    def input_gradient(self, grad: Tensor, weight: Tensor, input_shapes: tuple[Shape, ...]) -> Inputs:
        return (grad @ weight,)


@dataclass(frozen=True)
class Scale:
    """Each channel times its own number: batch norm in inference mode, layer scale; weight (K, 1)."""

    axis: int = 1

    def forward(self, inputs: Inputs, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = inputs[0] * reshape_along(self.axis, weight[:, 0], inputs[0])
        return z if bias is None else z + reshape_along(self.axis, bias, z)

    def weight_gradient(self, inputs: Inputs, grad: Tensor, weight_shape: Shape) -> Tensor:
        return sum_positions(grad * inputs[0], self.axis)[:, None]

    def input_sum(self, inputs: Inputs, output_shape: Shape, weight_shape: Shape) -> Tensor:
        return sum_positions(inputs[0], self.axis)[:, None]

    def input_gradient(self, grad: Tensor, weight: Tensor, input_shapes: tuple[Shape, ...]) -> Inputs:
        return (grad * reshape_along(self.axis, weight[:, 0], grad),)


@dataclass(frozen=True)
class Addition:
    """The sum of inputs of one shape, each times its coefficient; weight (K, inputs)."""

    coefficients: tuple[float, ...]
    axis: int = 1

    def forward(self, inputs: Inputs, weight: Tensor, bias: Tensor | None) -> Tensor:
        first, *others = inputs
        total = first if self.coefficients[0] == 1 else first * self.coefficients[0]
        for x, coefficient in zip(others, self.coefficients[1:]):
            total = torch.add(total, x, alpha=coefficient)
        return total

    def weight_gradient(self, inputs: Inputs, grad: Tensor, weight_shape: Shape) -> Tensor:
        return torch.stack([sum_positions(grad * x, self.axis) for x in inputs], 1)

    def input_sum(self, inputs: Inputs, output_shape: Shape, weight_shape: Shape) -> Tensor:
        return torch.stack([sum_positions(x, self.axis) for x in inputs], 1)

    def input_gradient(self, grad: Tensor, weight: Tensor, input_shapes: tuple[Shape, ...]) -> Inputs:
        return tuple(grad * reshape_along(self.axis, w, grad) for w in weight.unbind(1))


@dataclass(frozen=True)
class AveragePool:
    """The mean of a window of each channel: a depthwise convolution with weights 1/k.

    The weight has shape (K, 1, *kernel). Padding counts as zeros.
    """

    kernel: Shape
    stride: Shape
    padding: Shape
    axis: int = 1

    def forward(self, inputs: Inputs, weight: Tensor, bias: Tensor | None) -> Tensor:
        pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(self.kernel) - 1]
        return pool(inputs[0], self.kernel, self.stride, self.padding)

    def weight_gradient(self, inputs: Inputs, grad: Tensor, weight_shape: Shape) -> Tensor:
        return self._convolution(weight_shape).weight_gradient(inputs, grad, weight_shape)

    def input_sum(self, inputs: Inputs, output_shape: Shape, weight_shape: Shape) -> Tensor:
        return self._convolution(weight_shape).input_sum(inputs, output_shape, weight_shape)

    def input_gradient(self, grad: Tensor, weight: Tensor, input_shapes: tuple[Shape, ...]) -> Inputs:
        return self._convolution(tuple(weight.shape)).input_gradient(grad, weight, input_shapes)

    def _convolution(self, weight_shape: Shape) -> Convolution:
        return Convolution(self.stride, self.padding, (1,) * len(self.kernel), groups=weight_shape[0])


OPERATOR_TYPES: dict[str, type[OperatorType]] = {
    "convolution": Convolution,
    "transposed_convolution": TransposedConvolution,
    "linear": Linear,
    "scale": Scale,
    "addition": Addition,
    "average_pool": AveragePool,
}
TYPE_NAMES: dict[type[OperatorType], str] = {kind: name for name, kind in OPERATOR_TYPES.items()}


@dataclass(frozen=True)
class Gate:
    """A rectifier seen by the operator before it: open where low < z < high."""

    low: float
    high: float

    def open(self, z: Tensor) -> Tensor:
        """Where the gate is open, as bool."""
        mask = z > self.low
        return mask if self.high == float("inf") else mask.logical_and_(z < self.high)

    def mask(self, values: Tensor, z: Tensor, out: Tensor) -> Tensor:
        """Values where the gate is open and 0 elsewhere, as the rectifier's own gradient: masks are slow on CPUs."""
        return aten.hardtanh_backward.grad_input(values.expand_as(z), z, self.low, self.high, grad_input=out)


class Operator(nn.Module):
    """One linear operation of a model: a bank of K neurons, z = wᵀx + b.

    name: the parameter's name less `.weight`, else the kind and its order in the model.
    weight, bias: with any batch norm behind it folded in; the weight has K first.
    gate: the rectifier that directly follows, None where there is none.
    calls: how often one pass of the model calls it.
    mixed_gates: its output reaches several consumers that are not all the same rectifier; it has no gate then.
    input_shapes, output_shape: without the batch.
    per_image: whether images come first in both, one by one; not so where windows of them do, or tokens.
    source: where the model's code calls it.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        name: str,
        operator_type: OperatorType,
        weight: Tensor,
        bias: Tensor | None,
        input_shapes: tuple[Shape, ...],
        output_shape: Shape,
        source: str,
        gate: Gate | None = None,
    ) -> None:
        super().__init__()
        self.name, self.operator_type, self.gate, self.source = name, operator_type, gate, source
        self.calls, self.mixed_gates, self.per_image = 1, False, True
        self.input_shapes, self.output_shape = input_shapes, output_shape
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.operator_type.forward(inputs, self.weight, self.bias)

    @property
    def neurons(self) -> int:
        """K."""
        return self.weight.shape[0]

    @property
    def inputs_per_neuron(self) -> int:
        """D."""
        return prod(self.weight.shape[1:])

    @property
    def groups(self) -> int:
        """G: neurons of one group see the same inputs; each is a group where their kind knows of none."""
        return getattr(self.operator_type, "groups", self.neurons)

    def extra_repr(self) -> str:
        return f"{self.name}: {self.operator_type}, weight {tuple(self.weight.shape)}, gate {self.gate}"


def reshape_along(axis: int, values: Tensor, like: Tensor) -> Tensor:
    """A vector, shaped to multiply dimension `axis` of `like`."""
    shape = [1] * like.dim()
    shape[axis] = -1
    return values.view(shape)


def sum_positions(values: Tensor, axis: int) -> Tensor:
    """The sum over every dimension but `axis`, shape (K,)."""
    return values.sum(sample_dimensions(values, axis))


def sum_squares(values: Tensor, axis: int) -> Tensor:
    """The sum of squares over every dimension but `axis`, shape (K,)."""
    if axis % values.dim() == values.dim() - 1:  # down columns torch's norm takes three times as long
        return values.square().sum(sample_dimensions(values, axis))
    return torch.linalg.vector_norm(values, dim=sample_dimensions(values, axis)).square()


def sample_dimensions(values: Tensor, axis: int) -> list[int]:
    """The dimensions that count samples: all but `axis`."""
    return [d for d in range(values.dim()) if d != axis % values.dim()]
