"""Accumulation of the moments of one operator over batches."""

from collections.abc import Callable

import torch
from torch import Tensor

from patterns.moments.moments import Moments, RequiredSums, Sums, zero_moments
from patterns.operators import winograd
from patterns.operators.axes import reshape_along, sample_dimensions, sum_positions, sum_squares
from patterns.operators.gates import AnyGate, Gate
from patterns.operators.operator import Inputs, Operator, Summable

# Positions that are summed at once in the model's precision. From 2²⁴ positions on, float32 sums stop growing.
# A convolution's gradient on the CPU adds them one by one, and may have lost 3e-5 of its value by then.
CHUNK_POSITIONS = 2**18
# Elements of a large sum that are computed and converted to float64 at once. A layer's gradient and its float64 copy
# may be larger than all activations. No usual convolution has more weights than this.
CHUNK_ELEMENTS = 2**22


class Accumulator:
    """Accumulator of the moments of one operator over batches.

    Within a batch (or CHUNK_POSITIONS positions of it), sums are taken in the model's precision, at least float32.
    The outputs are centered by their mean first (by the mean over the open gate for its sums), and the contribution of
    the mean is added in float64. So activations whose mean is much larger than their spread lose no digits. Across
    batches, everything is summed in float64.
    """

    def __init__(self, operator: Operator, required: RequiredSums, layout: Summable | None = None) -> None:
        """Start with sums of 0.

        Args:
            operator: The operator.
            required: The large sums to take.
            layout: How the inputs and outputs given to `update` are laid out; by default, as the operator's.
        """
        self._operator, self._layout = operator, layout or operator.operator_type
        gate = operator.gate
        self._weigh = None if gate is None else gate.weight_function(self._layout.axis, operator.weight.device)
        self._sums = zero_moments(operator, required)

    @torch.inference_mode()  # sums made in inference mode cannot be changed outside of it
    def reset(self) -> None:
        """Set the sums to 0 in place."""
        for total in self.tensors().values():
            total.zero_()

    def flush(self) -> None:
        """Do nothing: this accumulator does not buffer."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the current sums by name. The next `update` changes these tensors in place."""
        return self._sums.tensors()

    def moments(self) -> Moments:
        """Return a copy of the current moments on the CPU."""
        return Moments.from_tensors({name: t.to("cpu", copy=True) for name, t in self.tensors().items()})

    @torch.no_grad()
    def update(self, inputs: Inputs, z: Tensor) -> None:
        """Add a batch.

        Args:
            inputs: The operator's inputs.
            z: The operator's outputs y + b, in the model's layout.
        """
        if not z.numel():
            return
        images = max(1, CHUNK_POSITIONS * self._operator.neurons // z[0].numel())
        for start in range(0, len(z), images):
            chunk = slice(start, start + images)
            self._add(tuple(map(widen, (x[chunk] for x in inputs))), widen(z[chunk]))

    def _add(self, inputs: Inputs, z: Tensor) -> None:
        op, layout = self._operator, self._layout
        total, opened = self._sums.total, self._sums.open
        count = z.numel() // op.neurons
        if self._sums.tokens is not None:
            self._sums.tokens.add(torch.linalg.vecdot(z, z, dim=layout.axis))
        bias = 0.0 if op.bias is None else op.bias.double()
        center = z.mean(sample_dimensions(z, layout.axis))
        # All output gradients below use this memory in turn.
        grad = torch.sub(z, reshape_along(layout.axis, center, z))
        center_y = center.double() - bias
        add_outputs(total, torch.full_like(total.n, count), grad, center_y, layout.axis)
        if total.x is not None or (opened is not None and opened.x is not None):
            x = layout.input_sum(inputs, tuple(z.shape), tuple(op.weight.shape))
        if total.x is not None and total.xy is not None:
            add_in_chunks(total.x, x)
            add_products(total.xy, x, center_y)
            self._add_gradient(inputs, grad, total.xy)
        if opened is not None and op.gate is not None and self._weigh is not None:
            mask = make_mask(op.gate, z, self._weigh)
            # Center the open outputs by their own mean, which may be far from the mean over all.
            offset = sum_positions(mask(grad, grad), layout.axis)
            n_open = sum_weights(mask(z.new_ones(()), grad), op.gate, count, layout.axis)
            center = center + offset / torch.where(n_open > 0, n_open, 1).to(z.dtype)
            center_y = center.double() - bias
            if opened.x is not None and opened.xy is not None:
                # Center the mask too, because Σx over the open gate is as large as the inputs' mean.
                share = (n_open / count).to(z.dtype)
                grad.sub_(reshape_along(layout.axis, share, z))
                self._add_gradient(inputs, grad, opened.x, (opened.xy, center_y))
                add_products(opened.x, x, share.double())
                add_products(opened.xy, x, share.double() * center_y)
            torch.sub(z, reshape_along(layout.axis, center, z), out=grad)
            squares = None
            if op.gate.is_smooth:
                squares = sum_positions(mask(grad.square(), torch.empty_like(grad)), layout.axis)
            add_outputs(opened, n_open, mask(grad, grad), center_y, layout.axis, squares)
            if opened.xy is not None:
                self._add_gradient(inputs, grad, opened.xy)

    def _add_gradient(
        self, inputs: Inputs, grad: Tensor, total: Tensor, products: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Add Σ g·x to `total`, both (K, D), and Σ g·x·y to the first of `products`, the second being y, (K,)."""
        op, axis = self._operator, self._layout.axis
        # Neurons of different groups have different inputs. Such layers are small, so they are not divided.
        rows = max(1, CHUNK_ELEMENTS // op.inputs_per_neuron) if op.groups == 1 else op.neurons
        for start, chunk in zip(range(0, op.neurons, rows), grad.split(rows, axis)):
            neurons, shape = slice(start, start + rows), (chunk.shape[axis], *op.weight.shape[1:])
            gradient = self._layout.weight_gradient(inputs, chunk, shape).flatten(1)
            add_in_chunks(total[neurons], gradient)
            if products is not None:
                xy, y = products
                add_products(xy[neurons], gradient, y[neurons])


def make_mask(gate: AnyGate, z: Tensor, weigh: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function that writes values times the gate's weights for z into its second argument."""
    if isinstance(gate, Gate):
        return lambda values, out: gate.mask(values, z, out=out)
    weights = weigh(z)
    return lambda values, out: torch.mul(values, weights, out=out)


def widen(values: Tensor) -> Tensor:
    """Convert values to float32 if their dtype is narrower."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def sum_weights(mask: Tensor, gate: AnyGate, count: int, axis: int) -> Tensor:
    """Sum the weights of `count` samples: int64 for a rectifier, float64 for a smooth gate, shape (K,)."""
    if gate.is_smooth:
        return mask.sum(sample_dimensions(mask, axis), dtype=torch.float64)
    exact = count < 2**24  # float32 represents every integer below this
    return mask.sum(sample_dimensions(mask, axis), dtype=None if exact else torch.float64).long()


def add_outputs(
    sums: Sums, n: Tensor, centered: Tensor, center: Tensor, axis: int, squares: Tensor | None = None
) -> None:
    """Add n samples to Σy and Σy².

    Args:
        sums: The sums.
        n: The number of samples, or the sum of their weights.
        centered: y - center, times the weight of the sample: 0 for an output that is not to be counted.
        center: The center.
        axis: The axis of the neurons.
        squares: Σ weight·(y - center)²; None if all weights are 0 or 1.
    """
    y = sum_positions(centered, axis).double()
    yy = sum_squares(centered, axis).double() if squares is None else squares.double()
    sums.n.add_(n)
    sums.y.add_(y + n * center)
    sums.yy.add_(yy + 2 * center * y + n * center.square())


def add_products(xy: Tensor, x: Tensor, y: Tensor) -> None:
    """Add x·y to a sum of shape (K, D), given x, shape (G or K, D), and y, shape (K,)."""
    groups, rows = (len(x), -1), max(1, CHUNK_ELEMENTS // x.shape[1])
    chunks = zip(*(t.split(rows) for t in (xy.unflatten(0, groups), x, y.unflatten(0, groups))))
    for total, inputs, outputs in chunks:
        total.addcmul_(outputs[..., None], inputs.double()[:, None])


def add_in_chunks(total: Tensor, values: Tensor) -> None:
    """Add values to a float64 sum without a float64 copy of all of them."""
    rows = max(1, CHUNK_ELEMENTS // total[0].numel())
    for chunk, more in zip(total.split(rows), values.split(rows)):
        chunk.add_(more)


def buffer_bytes(element_size: int) -> int:
    """Return the bytes of the largest buffer that an update of moments needs in addition to the moments.

    Args:
        element_size: Bytes of one element of the network's dtype.

    Example:
        >>> buffer_bytes(4) >= 2**26
        True
    """
    converted, transformed = 2 * 8 * CHUNK_ELEMENTS, 4 * element_size * winograd.BLOCK
    return max(converted, transformed)
