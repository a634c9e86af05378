"""Types of linear operators; each operator is a bank of neurons y = wᵀx.

An operator is bilinear in its input and its weight. Everything this project computes follows from that: the sums Σ g·x
over all positions are its *weight gradient* for the output gradient g, so that patches are never unfolded; and an
explanation is its *input gradient* with a pattern instead of the weight.

Shapes: `N` samples, `K` neurons, `D` inputs per neuron, `G` groups of neurons that share their inputs. A weight has the
operator's own shape, with K first; `weight.flatten(1)` is (K, D).
"""

from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patterns.operators import winograd
from patterns.operators.axes import reshape_along, sum_positions
from patterns.operators.gates import AnyGate

Inputs = tuple[Tensor, ...]
Shape = tuple[int, ...]
aten = torch.ops.aten


class Summable(Protocol):
    """Inputs and outputs whose products can be summed over samples."""

    @property
    def axis(self) -> int:
        """The dimension of the output that counts the neurons; all other dimensions count samples."""
        ...

    def weight_gradient(self, inputs: Inputs, grad: Tensor, weight_shape: Shape) -> Tensor:
        """Return Σ g·x over samples for each neuron.

        Args:
            inputs: The operator's inputs, samples first.
            grad: The output gradient g, in the output's shape.
            weight_shape: The weight's shape, which is that of the result.
        """
        ...

    def input_sum(self, inputs: Inputs, output_shape: Shape, weight_shape: Shape) -> Tensor:
        """Return Σ x over samples, shape (G, D)."""
        ...


class OperatorType(Summable, Protocol):
    """The operations that every type of operator provides.

    Example:
        >>> operator_type: OperatorType = Linear()
        >>> operator_type.forward((torch.ones(1, 2),), torch.tensor([[3.0, 4.0]]), None)
        tensor([[7.]])
    """

    def forward(self, inputs: Inputs, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return z = wᵀx + b, computed exactly as the model computes it."""
        ...

    def input_gradient(self, grad: Tensor, weight: Tensor, input_shapes: tuple[Shape, ...]) -> Inputs:
        """Return the gradient of the inputs, given the gradient of the output and a weight."""
        ...


@dataclass(frozen=True)
class Convolution:
    """A convolution over any number of dimensions; weight (K, C/groups, *kernel)."""

    stride: Shape
    padding: Shape
    dilation: Shape
    groups: int = 1
    axis: int = 1

    def forward(self, inputs: Inputs, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return z = wᵀx + b."""
        return aten.convolution(
            *inputs, weight, bias, self.stride, self.padding, self.dilation, False, (0,), self.groups
        )

    def weight_gradient(self, inputs: Inputs, grad: Tensor, weight_shape: Shape) -> Tensor:
        """Return Σ g·x, in the shape of the weight."""
        (x,), kernel = inputs, weight_shape[2:]
        if self.groups == prod(kernel) == 1 and not any(self.padding):
            seen: tuple[Any, ...] = (..., *(slice(None, None, step) for step in self.stride))
            return sum_of_products(grad.flatten(2), x[seen].flatten(2)).view(weight_shape)
        if self.groups == weight_shape[0] == x.shape[1] and kernel == x.shape[2:] and not any(self.padding):
            return (grad * x).sum(0)[:, None]  # the kernel covers the whole image
        if x.device.type == "cpu" and len(kernel) == 2:
            plain = self.groups == 1 and set(self.stride) == set(self.dilation) == {1}
            if plain and winograd.is_faster(x, grad, kernel):
                return winograd.weight_gradient(x, grad, kernel, self.padding)
            # oneDNN is fast only for small depthwise kernels. Larger kernels on large images are faster channels-last.
            if weight_shape[1] == 1 and min(kernel) > 3 and grad[0, 0].numel() > 10 * prod(kernel):
                x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
        return self._backward(grad, x, x.new_empty(1).expand(weight_shape), (False, True, False))[1]

    def input_sum(self, inputs: Inputs, output_shape: Shape, weight_shape: Shape) -> Tensor:
        """Return Σ x, shape (G, D)."""
        return sum_of_patches(self, inputs[0], output_shape, weight_shape)

    def input_gradient(self, grad: Tensor, weight: Tensor, input_shapes: tuple[Shape, ...]) -> Inputs:
        """Return the gradient of the inputs."""
        x = grad.new_empty(1).expand(input_shapes[0])
        return (self._backward(grad, x, weight, (True, False, False))[0],)

    def _backward(self, grad: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]) -> list[Tensor]:
        options = (self.stride, self.padding, self.dilation, False, (0,), self.groups)
        return aten.convolution_backward(grad, x, weight, None, *options, mask)


@dataclass(frozen=True)
class TransposedConvolution:
    """A transposed convolution over any number of dimensions; weight (K, C/groups, *kernel) for inputs of C channels.

    A neuron is an output channel. Its inputs are those of a convolution over the input with zeros inserted between the
    positions. If the stride keeps some weights from reaching an output position, their inputs are 0 at that position.
    """

    stride: Shape
    padding: Shape
    output_padding: Shape
    dilation: Shape
    groups: int = 1
    axis: int = 1

    def forward(self, inputs: Inputs, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return z = wᵀx + b."""
        return aten.convolution(*inputs, swap_channels(weight, self.groups), bias, *self._options())

    def weight_gradient(self, inputs: Inputs, grad: Tensor, weight_shape: Shape) -> Tensor:
        """Return Σ g·x, in the shape of the weight."""
        (x,) = inputs
        weight = swap_channels(x.new_empty(1).expand(weight_shape), self.groups)
        gradient = aten.convolution_backward(grad, x, weight, None, *self._options(), (False, True, False))[1]
        return swap_channels(gradient, self.groups)

    def input_sum(self, inputs: Inputs, output_shape: Shape, weight_shape: Shape) -> Tensor:
        """Return Σ x, shape (G, D)."""
        return sum_of_patches(self, inputs[0], output_shape, weight_shape)

    def input_gradient(self, grad: Tensor, weight: Tensor, input_shapes: tuple[Shape, ...]) -> Inputs:
        """Return the gradient of the inputs."""
        x, weight = grad.new_empty(1).expand(input_shapes[0]), swap_channels(weight, self.groups)
        return (aten.convolution_backward(grad, x, weight, None, *self._options(), (True, False, False))[0],)

    def _options(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, True, self.output_padding, self.groups


def sum_of_products(grad: Tensor, x: Tensor) -> Tensor:
    """Return Σ g·x over samples and positions, shape (K, C), for g (N, K, P) and x (N, C, P)."""
    k, c, p = grad.shape[1], *x.shape[1:]
    if k * c <= (k + c) * p:  # the products of an image take no more memory than the image itself
        return (grad @ x.mT).sum(0)
    return grad.transpose(0, 1).flatten(1) @ x.transpose(0, 1).flatten(1).T


def sum_of_patches(
    convolution: Convolution | TransposedConvolution, x: Tensor, output_shape: Shape, weight_shape: Shape
) -> Tensor:
    """Return Σ x over samples, shape (G, D): the weight gradient of one neuron per group with output gradient 1.

    The gradient is linear in x, so the samples are summed first.
    """
    ones = x.new_ones((1, convolution.groups, *output_shape[2:]))
    shape = (convolution.groups, *weight_shape[1:])
    return convolution.weight_gradient((x.sum(0, keepdim=True),), ones, shape).flatten(1)


def swap_channels(weight: Tensor, groups: int) -> Tensor:
    """Convert a weight between (K, C/groups, …) and torch's layout for transposed convolutions, (C, K/groups, …)."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class Linear:
    """A matrix product over the last dimension; weight (K, D)."""

    axis: int = -1
    groups = 1

    def forward(self, inputs: Inputs, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return z = wᵀx + b."""
        return F.linear(inputs[0], weight, bias)

    def weight_gradient(self, inputs: Inputs, grad: Tensor, weight_shape: Shape) -> Tensor:
        """Return Σ g·x, in the shape of the weight."""
        return grad.flatten(0, -2).mT @ inputs[0].flatten(0, -2)

    def input_sum(self, inputs: Inputs, output_shape: Shape, weight_shape: Shape) -> Tensor:
        """Return Σ x, shape (G, D)."""
        return inputs[0].flatten(0, -2).sum(0, keepdim=True)

    def input_gradient(self, grad: Tensor, weight: Tensor, input_shapes: tuple[Shape, ...]) -> Inputs:
        """Return the gradient of the inputs.

        As one product of matrices: if the gradient's positions are not contiguous, torch would use a slower product for
        each image.
        """
        return ((grad.flatten(0, -2) @ weight).view(*grad.shape[:-1], weight.shape[1]),)


@dataclass(frozen=True)
class Scale:
    """A multiplication of each channel by its own number (batch norm in inference mode, layer scale); weight (K, 1)."""

    axis: int = 1

    def forward(self, inputs: Inputs, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return z = wᵀx + b."""
        z = inputs[0] * reshape_along(self.axis, weight[:, 0], inputs[0])
        return z if bias is None else z.add_(reshape_along(self.axis, bias, z))

    def weight_gradient(self, inputs: Inputs, grad: Tensor, weight_shape: Shape) -> Tensor:
        """Return Σ g·x, in the shape of the weight."""
        return sum_positions(grad * inputs[0], self.axis)[:, None]

    def input_sum(self, inputs: Inputs, output_shape: Shape, weight_shape: Shape) -> Tensor:
        """Return Σ x, shape (G, D)."""
        return sum_positions(inputs[0], self.axis)[:, None]

    def input_gradient(self, grad: Tensor, weight: Tensor, input_shapes: tuple[Shape, ...]) -> Inputs:
        """Return the gradient of the inputs."""
        return (grad * reshape_along(self.axis, weight[:, 0], grad),)


@dataclass(frozen=True)
class Addition:
    """The sum of several inputs of one shape, each times its coefficient; weight (K, number of inputs)."""

    coefficients: tuple[float, ...]
    axis: int = 1

    def forward(self, inputs: Inputs, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return z = wᵀx + b."""
        first, *others = inputs
        total = first if self.coefficients[0] == 1 else first * self.coefficients[0]
        for x, coefficient in zip(others, self.coefficients[1:]):
            total = torch.add(total, x, alpha=coefficient)
        return total

    def weight_gradient(self, inputs: Inputs, grad: Tensor, weight_shape: Shape) -> Tensor:
        """Return Σ g·x, in the shape of the weight."""
        return torch.stack([sum_positions(grad * x, self.axis) for x in inputs], 1)

    def input_sum(self, inputs: Inputs, output_shape: Shape, weight_shape: Shape) -> Tensor:
        """Return Σ x, shape (G, D)."""
        return torch.stack([sum_positions(x, self.axis) for x in inputs], 1)

    def input_gradient(self, grad: Tensor, weight: Tensor, input_shapes: tuple[Shape, ...]) -> Inputs:
        """Return the gradient of the inputs."""
        return tuple(grad * reshape_along(self.axis, w, grad) for w in weight.unbind(1))


@dataclass(frozen=True)
class AveragePool:
    """The mean over a window of each channel: a depthwise convolution with weights 1/k; weight (K, 1, *kernel).

    Padding counts as zeros.
    """

    kernel: Shape
    stride: Shape
    padding: Shape
    axis: int = 1

    def forward(self, inputs: Inputs, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return z = wᵀx + b."""
        pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(self.kernel) - 1]
        return pool(inputs[0], self.kernel, self.stride, self.padding)

    def weight_gradient(self, inputs: Inputs, grad: Tensor, weight_shape: Shape) -> Tensor:
        """Return Σ g·x, in the shape of the weight."""
        return self._convolution(weight_shape).weight_gradient(inputs, grad, weight_shape)

    def input_sum(self, inputs: Inputs, output_shape: Shape, weight_shape: Shape) -> Tensor:
        """Return Σ x, shape (G, D)."""
        return self._convolution(weight_shape).input_sum(inputs, output_shape, weight_shape)

    def input_gradient(self, grad: Tensor, weight: Tensor, input_shapes: tuple[Shape, ...]) -> Inputs:
        """Return the gradient of the inputs."""
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
TYPE_NAMES: dict[type[OperatorType], str] = {cls: name for name, cls in OPERATOR_TYPES.items()}
# Types whose weights belong to the operation and are not parameters of the model. They have no bias.
UNTRAINED_TYPES = (Addition, AveragePool)


class Operator(nn.Module):
    """One linear operation of a model: a bank of K neurons, z = wᵀx + b.

    Attributes:
        name: Name of the weight's parameter without `.weight`, or the operator type and its order in the model.
        operator_type: The type of operation, with its options (stride, padding, …).
        weight: The weight, K first, times the scale of a batch norm that follows.
        bias: The bias, shape (K,), with the bias of a batch norm that follows; None if there is none.
        gate: The activation that directly follows; None if there is none.
        calls: How often one forward pass of the model calls the operator.
        mixed_gates: Whether several consumers read the output and they are not all the same activation. The gate is
            then None.
        per_image: Whether the first dimension of inputs and output counts images. It does not if it counts windows of
            images or tokens.
        rows: The rows of the layer's weight that are the neurons, if the others feed only values that explanations take
            as constants, such as queries and keys of a fused projection. None: all rows.
        input_shapes: Shapes of the inputs without the batch dimension.
        output_shape: Shape of the output without the batch dimension.
        source: The module and the line of the model's code that call the operator.

    Example:
        >>> layer = nn.Linear(4, 3)
        >>> operator = Operator("fc", Linear(), layer.weight, layer.bias, ((4,),), (3,), "")
        >>> operator(torch.zeros(2, 4)).shape, operator.neurons, operator.inputs_per_neuron
        (torch.Size([2, 3]), 3, 4)
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
        gate: AnyGate | None = None,
    ) -> None:
        super().__init__()
        self.name, self.operator_type, self.gate, self.source = name, operator_type, gate, source
        self.calls, self.mixed_gates, self.per_image = 1, False, True
        self.rows: tuple[int, ...] | None = None
        self.input_shapes, self.output_shape = input_shapes, output_shape
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return z = wᵀx + b, computed exactly as the model computes it."""
        return self.operator_type.forward(inputs, self.weight, self.bias)

    @property
    def neurons(self) -> int:
        """The number of neurons, K."""
        return self.weight.shape[0]

    @property
    def inputs_per_neuron(self) -> int:
        """The number of inputs of each neuron, D."""
        return prod(self.weight.shape[1:])

    @property
    def groups(self) -> int:
        """The number of groups of neurons that share their inputs, G; equal to K for types without groups."""
        return getattr(self.operator_type, "groups", self.neurons)

    def select_rows(self, values: Tensor) -> Tensor:
        """Return the values of these neurons from values that an earlier version stored for all rows of the layer.

        Args:
            values: A number or more for each neuron or for each row of the layer, or one row for all of them.

        Returns:
            A row for each neuron; the values themselves if they have no more rows than that.
        """
        return values if self.rows is None or len(values) <= self.neurons else values[list(self.rows)]

    @property
    def sample_axis(self) -> int:
        """Dimension that counts the neurons in the output of one sample, which has no batch dimension."""
        axis = self.operator_type.axis
        return axis - 1 if axis > 0 else axis

    def extra_repr(self) -> str:
        """Return the description that `repr` prints."""
        return f"{self.name}: {self.operator_type}, weight {tuple(self.weight.shape)}, gate {self.gate}"
