"""Moments: the sums over samples from which the patterns of an operator are computed.

Sums over different data add up. `K` is the number of neurons, `D` the number of inputs of each neuron, and `G` the
number of groups of neurons that share their inputs (G = 1 for a plain convolution or a linear layer, G = K for a
depthwise convolution).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from patterns.operators import winograd
from patterns.operators.axes import reshape_along, sample_dimensions, sum_positions, sum_squares
from patterns.operators.gates import AnyGate
from patterns.operators.operator import Inputs, Operator, Summable

T = TypeVar("T")

# Positions that are summed at once in the model's precision. From 2²⁴ positions on, float32 sums stop growing.
# A convolution's gradient on the CPU adds them one by one, and may have lost 3e-5 of its value by then.
CHUNK_POSITIONS = 2**18
# Elements of a large sum that are computed and converted to float64 at once. A layer's gradient and its float64 copy
# may be larger than all activations. No usual convolution has more weights than this.
CHUNK_ELEMENTS = 2**22
FIELDS = ("n", "y", "yy", "x", "xy")
# Float32 outputs of a neuron that never varies differ by about 1e-7; the square of that is below this share.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Sums:
    """Sums over one set of samples (images × output positions), float64 except for the counts.

    Attributes:
        n: Number of samples, int64, shape (K,). For the side of a smooth gate, the sum of their weights, float64.
        y: Sum of the outputs without bias, shape (K,).
        yy: Sum of y², shape (K,).
        x: Sum of the inputs, shape (G, D) or (K, D); None if it was not requested.
        xy: Sum of x·y, shape (K, D); None if it was not requested.

    Example:
        >>> import torch
        >>> one = Sums(torch.tensor([2]), torch.tensor([3.0]), torch.tensor([5.0]))
        >>> float((one + one).mean_y()), float(one.var_y())
        (1.5, 0.25)
    """

    n: Tensor
    y: Tensor
    yy: Tensor
    x: Tensor | None = None
    xy: Tensor | None = None

    def __add__(self, other: "Sums") -> "Sums":
        return self._combine(other, 1)

    def __sub__(self, other: "Sums") -> "Sums":
        return self._combine(other, -1)

    def _combine(self, other: "Sums", sign: int) -> "Sums":
        def combine(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            both = pair(a, b, "one side has Σx and Σxy, the other has not")
            return both and torch.add(*both, alpha=sign)

        if self.n.dtype != other.n.dtype and sign > 0:
            raise ValueError("one side has the weights of a smooth gate, the other counts of samples")
        return Sums(*(combine(getattr(self, f), getattr(other, f)) for f in FIELDS))  # type: ignore[arg-type]

    def select_neurons(self, neurons: slice) -> "Sums":
        """Return views of the sums of some neurons. An x of shape (G, D) is kept as it is."""
        x = self.x if self.x is None or len(self.x) < len(self.n) else self.x[neurons]
        return Sums(
            self.n[neurons], self.y[neurons], self.yy[neurons], x, None if self.xy is None else self.xy[neurons]
        )

    def mean_y(self) -> Tensor:
        """Return E[y], shape (K,); 0 without samples."""
        return self.y / self._divisor()

    def var_y(self) -> Tensor:
        """Return var[y], shape (K,); exactly 0 without samples, and if the outputs differ by rounding only."""
        mean_square = self.yy / self._divisor()
        var = mean_square - self.mean_y() ** 2
        return torch.where(var > ROUNDING * mean_square, var, 0.0)

    def mean_x(self) -> Tensor:
        """Return E[x] for each neuron, shape (K, D); 0 without samples, ValueError if x was not summed."""
        x = require(self.x)
        return x.repeat_interleave(len(self.n) // len(x), 0) / self._divisor()[:, None]

    def mean_xy(self) -> Tensor:
        """Return E[x·y], shape (K, D); 0 without samples, ValueError if x·y was not summed."""
        return require(self.xy) / self._divisor()[:, None]

    def _divisor(self) -> Tensor:
        return torch.where(self.n > 0, self.n, 1)


@dataclass(frozen=True)
class Moments:
    """Sums over all samples, and over the samples that open the gate. Moments of different data add up with `+`.

    Attributes:
        total: Sums over all samples.
        open: Sums over the samples that open the gate, with x of shape (K, D), or for a smooth gate over all samples,
            each times its weight (see `patterns.operators.gates`). None if the operator has no gate.

    Example:
        >>> import torch
        >>> one = Moments(Sums(torch.tensor([2]), torch.tensor([3.0]), torch.tensor([5.0])))
        >>> (one + one).total.n.tolist()
        [4]
    """

    total: Sums
    open: Sums | None = None

    @property
    def closed(self) -> Sums:
        """Sums over the samples that close the gate, with x of shape (K, D); exactly 0 for a neuron without any."""
        opened = require(self.open)
        x = require(self.total.x)
        closed = replace(self.total, x=x.repeat_interleave(len(self.total.n) // len(x), 0)) - opened
        # Without samples, the difference of the sums is rounding, which would pass for a direction.
        any_samples = closed.n > ROUNDING * self.total.n
        large = {f: torch.where(any_samples[:, None], require(getattr(closed, f)), 0.0) for f in ("x", "xy")}
        small = {f: torch.where(any_samples, getattr(closed, f), 0.0) for f in ("y", "yy")}
        return replace(closed, **small, **large)

    def __add__(self, other: "Moments") -> "Moments":
        opened = pair(self.open, other.open, "one side has a gate, the other has not")
        return Moments(self.total + other.total, opened and opened[0] + opened[1])

    def select_neurons(self, neurons: slice) -> "Moments":
        """Return views of the moments of some neurons."""
        return Moments(self.total.select_neurons(neurons), self.open and self.open.select_neurons(neurons))

    @property
    def nbytes(self) -> int:
        """Number of bytes of the sums."""
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name, such as `total.n` and `open.xy`."""
        return {
            f"{side}.{field}": getattr(sums, field)
            for side, sums in (("total", self.total), ("open", self.open))
            for field in FIELDS
            if sums is not None and getattr(sums, field) is not None
        }

    @staticmethod
    def from_tensors(named: Mapping[str, Tensor]) -> "Moments":
        """Return the moments with these sums; the inverse of `tensors`.

        Args:
            named: The sums by name.

        Raises:
            KeyError: If a sum is missing.
            ValueError: If a name is unknown.
        """

        def sums(side: str) -> Sums:
            large = {f: named[f"{side}.{f}"] for f in ("x", "xy") if {f"{side}.x", f"{side}.xy"} & named.keys()}
            return Sums(*(named[f"{side}.{f}"] for f in ("n", "y", "yy")), **large)

        gated = any(name.startswith("open.") for name in named)
        moments = Moments(sums("total"), sums("open") if gated else None)
        if unknown := sorted(named.keys() - moments.tensors().keys()):
            raise ValueError(f"no sums of these names: {', '.join(unknown)}")
        return moments


@dataclass(frozen=True)
class RequiredSums:
    """Which of the large sums, Σx and Σxy, to take.

    Attributes:
        total: Take them over all samples.
        open: Take them over the samples that open the gate.

    Example:
        >>> RequiredSums(open=False) <= RequiredSums()
        True
    """

    total: bool = True
    open: bool = True

    def __le__(self, other: "RequiredSums") -> bool:
        """Return whether `other` includes all of these sums."""
        return self.total <= other.total and self.open <= other.open


def zero_moments(operator: Operator, required: RequiredSums) -> Moments:
    """Return the moments of no samples, on the operator's device."""
    k, d = operator.neurons, operator.inputs_per_neuron
    device = operator.weight.device

    def sums(large: bool, x_rows: int, counts: torch.dtype = torch.int64) -> Sums:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        n = torch.zeros(k, dtype=counts, device=device)
        return Sums(n, zeros(k), zeros(k), zeros(x_rows, d) if large else None, zeros(k, d) if large else None)

    opened = None
    if operator.gate is not None:
        opened = sums(required.open, k, torch.float64 if operator.gate.is_smooth else torch.int64)
    return Moments(sums(required.total, operator.groups), opened)


class Accumulator:
    """Accumulator of the moments of one operator over batches.

    Within a batch (or CHUNK_POSITIONS positions of it), sums are taken in the model's precision, at least float32.
    The outputs are centered by their mean first (by the mean over the open gate for its sums), and the mean is put
    back in float64. So activations whose mean is much larger than their spread lose no digits. Across batches,
    everything is summed in float64.
    """

    def __init__(self, operator: Operator, required: RequiredSums, layout: Summable | None = None) -> None:
        """Start with sums of 0.

        Args:
            operator: The operator.
            required: The large sums to take.
            layout: How the inputs and outputs given to `update` are laid out; by default, as the operator's.
        """
        self._operator, self._layout = operator, layout or operator.operator_type
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
        if opened is not None and op.gate is not None:
            weights = op.gate.weigh(z) if op.gate.is_smooth else None

            def mask(values: Tensor, out: Tensor) -> Tensor:
                assert op.gate is not None
                if weights is None:
                    return op.gate.mask(values, z, out=out)
                return torch.mul(values, weights, out=out)

            # Center the open outputs by their own mean, which may be far from the mean over all.
            offset = sum_positions(mask(grad, out=grad), layout.axis)
            n_open = sum_weights(mask(z.new_ones(()), out=grad), op.gate, count, layout.axis)
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
                squares = sum_positions(mask(grad.square(), out=torch.empty_like(grad)), layout.axis)
            add_outputs(opened, n_open, mask(grad, out=grad), center_y, layout.axis, squares)
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
    """Return the bytes of the largest buffer that an update of moments needs besides the moments.

    Args:
        element_size: Bytes of one element of the network's dtype.

    Example:
        >>> buffer_bytes(4) >= 2**26
        True
    """
    converted, transformed = 2 * 8 * CHUNK_ELEMENTS, 4 * element_size * winograd.BLOCK
    return max(converted, transformed)


def moments_bytes(operator: Operator, required: RequiredSums) -> int:
    """Return the bytes of an operator's moments, before any data is read.

    Args:
        operator: The operator.
        required: The large sums that will be taken.

    Example:
        >>> import torch, patterns
        >>> operator = patterns.trace(torch.nn.Linear(3, 2), torch.zeros(2, 3)).operators["linear.0"]
        >>> moments_bytes(operator, RequiredSums()) == 8 * (3 * 2 + 3 + 2 * 3)
        True
    """
    k, d = operator.neurons, operator.inputs_per_neuron
    small, total, opened = 3 * k, (operator.groups + k) * d * required.total, 2 * k * d * required.open
    return 8 * (small + total + (0 if operator.gate is None else small + opened))


def require(value: T | None) -> T:
    """Return the value; raise ValueError if it is None, because these sums were not taken."""
    if value is None:
        raise ValueError("these moments were taken without the sums that this needs (Σx and Σxy, or the gate's)")
    return value


def pair(a: T | None, b: T | None, difference: str) -> tuple[T, T] | None:
    """Return both values, or None if both are None; raise ValueError if only one is."""
    if a is None or b is None:
        if a is not b:
            raise ValueError(difference)
        return None
    return a, b
