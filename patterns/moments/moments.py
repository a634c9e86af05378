"""The sufficient statistics of an operator: sums over samples, so passes over different data add up.

`K` neurons with `D` inputs each, in `G` groups of neurons that see the same inputs (G = 1 for a plain
convolution or linear layer, G = K for a depthwise one).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from patterns.operators import winograd
from patterns.operators.operator import Inputs, Operator, Summed, along, positions, sum_positions, sum_squares

T = TypeVar("T")

# Positions that are summed at a time in the model's precision: by 2²⁴ of them float32 sums stop growing,
# and in a convolution's gradient on the CPU, which adds them one by one, these may have lost 3e-5 of their value.
AT_ONCE = 2**18
# Elements of a large sum that are computed, and brought to float64, at a time: a layer's gradient and its copy
# in float64 may be larger than all activations. No usual convolution has so many weights.
PIECE = 2**22


@dataclass(frozen=True)
class Sums:
    """Sums over one set of samples (images × output positions); all float64 but the counts.

    n: samples, int64, shape (K,).
    y, yy: Σy and Σy² of the outputs without bias, shape (K,).
    x, xy: Σx, shape (G, D) or (K, D), and Σx·y, shape (K, D); None where they were not asked for.
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
        def combined(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            pair = both(a, b, "one side has Σx and Σxy, the other has not")
            return pair and torch.add(*pair, alpha=sign)

        return Sums(*(combined(getattr(self, f), getattr(other, f)) for f in FIELDS))  # type: ignore[arg-type]

    def rows(self, neurons: slice) -> "Sums":
        """The sums of some neurons: views, not copies. Those of all see the same inputs, or each its own."""
        x = self.x if self.x is None or len(self.x) < len(self.n) else self.x[neurons]
        return Sums(
            self.n[neurons], self.y[neurons], self.yy[neurons], x, None if self.xy is None else self.xy[neurons]
        )

    def mean_y(self) -> Tensor:
        """E[y], shape (K,); 0 without samples."""
        return self.y / self.n.clamp(min=1)

    def var_y(self) -> Tensor:
        """var[y], shape (K,); 0 without samples, and exactly 0 for outputs that differ by rounding only."""
        mean_square = self.yy / self.n.clamp(min=1)
        var = mean_square - self.mean_y() ** 2
        return torch.where(var > ROUNDING * mean_square, var, 0.0)

    def mean_x(self) -> Tensor:
        """E[x] for each neuron, shape (K, D); 0 without samples."""
        x = require(self.x)
        return x.repeat_interleave(len(self.n) // len(x), 0) / self.n.clamp(min=1)[:, None]

    def mean_xy(self) -> Tensor:
        """E[x·y], shape (K, D); 0 without samples."""
        return require(self.xy) / self.n.clamp(min=1)[:, None]


FIELDS = ("n", "y", "yy", "x", "xy")
# Float32 outputs of a neuron that never varies differ by about 1e-7; squared, that is below this share.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Moments:
    """Sums over all samples, and over those that open the gate; a commutative monoid under `+`.

    total: over all samples.  open: over the open gate, with x of shape (K, D); None without a gate.
    """

    total: Sums
    open: Sums | None = None

    @property
    def closed(self) -> Sums:
        """Sums over the closed gate, Σx of shape (K, D); exactly 0 for a neuron that never closes."""
        opened = require(self.open)
        x = require(self.total.x)
        closed = replace(self.total, x=x.repeat_interleave(len(self.total.n) // len(x), 0)) - opened
        # Without samples the difference of two sums is rounding, which is a direction like any other.
        some = closed.n > 0
        large = {f: torch.where(some[:, None], require(getattr(closed, f)), 0.0) for f in ("x", "xy")}
        return replace(closed, y=torch.where(some, closed.y, 0.0), yy=torch.where(some, closed.yy, 0.0), **large)

    def __add__(self, other: "Moments") -> "Moments":
        opened = both(self.open, other.open, "one side has a gate, the other has not")
        return Moments(self.total + other.total, opened and opened[0] + opened[1])

    def rows(self, neurons: slice) -> "Moments":
        """The moments of some neurons alone; views, not copies."""
        return Moments(self.total.rows(neurons), self.open and self.open.rows(neurons))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The sums as named tensors: `total.n`, `open.xy`, …"""
        parts = {"total": self.total, "open": self.open}
        return {
            f"{part}.{field}": getattr(sums, field)
            for part, sums in parts.items()
            for field in FIELDS
            if sums is not None and getattr(sums, field) is not None
        }

    @staticmethod
    def from_tensors(named: Mapping[str, Tensor]) -> "Moments":
        """The inverse of `tensors`. KeyError where a sum is missing, ValueError where one is not known."""

        def sums(part: str) -> Sums:
            large = {f: named[f"{part}.{f}"] for f in ("x", "xy") if {f"{part}.x", f"{part}.xy"} & named.keys()}
            return Sums(*(named[f"{part}.{f}"] for f in ("n", "y", "yy")), **large)

        gated = any(name.startswith("open.") for name in named)
        moments = Moments(sums("total"), sums("open") if gated else None)
        if unknown := sorted(named.keys() - moments.tensors().keys()):
            raise ValueError(f"no sums of these names: {', '.join(unknown)}")
        return moments


@dataclass(frozen=True)
class RequiredSums:
    """Which of the large sums to take: Σx and Σxy over all samples, over the open gate."""

    total: bool = True
    open: bool = True

    def __le__(self, other: "RequiredSums") -> bool:
        """Whether the other has all sums of this one."""
        return self.total <= other.total and self.open <= other.open


def zero_moments(operator: Operator, wanted: RequiredSums) -> Moments:
    """The neutral element: the moments of no samples, on the operator's device."""
    k, d = operator.neurons, operator.inputs_per_neuron
    device = operator.weight.device

    def sums(large: bool, x_rows: int) -> Sums:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        n = torch.zeros(k, dtype=torch.int64, device=device)
        return Sums(n, zeros(k), zeros(k), zeros(x_rows, d) if large else None, zeros(k, d) if large else None)

    # A neuron without a gate has only sums over all samples.
    opened = None if operator.gate is None else sums(wanted.open, k)
    return Moments(sums(wanted.total, operator.groups), opened)


class Accumulator:
    """Moments of one operator, grown in place batch by batch.

    Within a batch (or the images of it that have AT_ONCE positions), sums are taken in the model's precision,
    at least float32, over outputs centred by their own mean (of the open gate for its sums), and brought back in
    float64: activations whose mean dwarfs their spread lose no digits. Across batches everything adds up in float64.

    kind: of the inputs and outputs that it is given, where that is not the operator's.
    """

    def __init__(self, operator: Operator, wanted: RequiredSums, kind: Summed | None = None) -> None:
        self._operator, self._kind, self._sums = (
            operator,
            kind or operator.operator_type,
            zero_moments(operator, wanted),
        )

    @torch.inference_mode()  # sums that were made in it cannot be changed outside
    def reset(self) -> None:
        """Forget everything: the same tensors are 0 again."""
        for total in self.tensors().values():
            total.zero_()

    def settle(self) -> None:
        """Sum what waits: nothing does."""

    def tensors(self) -> dict[str, Tensor]:
        """The sums so far by name: the very tensors that the next batch changes."""
        return self._sums.tensors()

    def moments(self) -> Moments:
        """The moments so far: a copy on the CPU."""
        return Moments.from_tensors({name: t.to("cpu", copy=True) for name, t in self.tensors().items()})

    @torch.no_grad()
    def update(self, inputs: Inputs, z: Tensor) -> None:
        """Add a batch: the operator's inputs, and its outputs z = y + b in the model's own layout."""
        if not z.numel():
            return
        images = max(1, AT_ONCE * self._operator.neurons // z[0].numel())
        for start in range(0, len(z), images):
            chosen = slice(start, start + images)
            self._add(tuple(map(widened, (x[chosen] for x in inputs))), widened(z[chosen]))

    def _add(self, inputs: Inputs, z: Tensor) -> None:
        op, kind = self._operator, self._kind
        total, opened = self._sums.total, self._sums.open
        count = z.numel() // op.neurons
        bias = 0.0 if op.bias is None else op.bias.double()
        centre = z.mean(positions(z, kind.axis))
        # The output gradients, one after the other in the same memory.
        weights = torch.sub(z, along(kind.axis, centre, z))
        centre_y = centre.double() - bias
        add_outputs(total, torch.full_like(total.n, count), weights, centre_y, kind.axis)
        if total.x is not None or (opened is not None and opened.x is not None):
            x = kind.input_sum(inputs, tuple(z.shape), tuple(op.weight.shape))
        if total.x is not None and total.xy is not None:
            add(total.x, x)
            add_products(total.xy, x, centre_y)
            self._add_gradient(inputs, weights, total.xy)
        if opened is not None and op.gate is not None:
            # The open outputs about their own mean, which may be far from that of all.
            summed = sum_positions(op.gate.passed(weights, z, out=weights), kind.axis)
            n_open = count_open(op.gate.passed(z.new_ones(()), z, out=weights), count, kind.axis)
            centre = centre + summed / n_open.clamp(min=1).to(z.dtype)
            centre_y = centre.double() - bias
            if opened.x is not None and opened.xy is not None:
                # The mask about its mean, for Σx over the open gate is as large as the inputs' mean.
                share = (n_open / count).to(z.dtype)
                weights.sub_(along(kind.axis, share, z))
                self._add_gradient(inputs, weights, opened.x, (opened.xy, centre_y))
                add_products(opened.x, x, share.double())
                add_products(opened.xy, x, share.double() * centre_y)
            torch.sub(z, along(kind.axis, centre, z), out=weights)
            add_outputs(opened, n_open, op.gate.passed(weights, z, out=weights), centre_y, kind.axis)
            if opened.xy is not None:
                self._add_gradient(inputs, weights, opened.xy)

    def _add_gradient(
        self, inputs: Inputs, grad: Tensor, total: Tensor, products: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Add Σ g·x, shape (K, D), to a sum; and its product with y, shape (K,), to another: given as (sum, y)."""
        op, axis = self._operator, self._kind.axis
        # Neurons of several groups do not see the same inputs; such layers are small.
        rows = max(1, PIECE // op.inputs_per_neuron) if op.groups == 1 else op.neurons
        for start, part in zip(range(0, op.neurons, rows), grad.split(rows, axis)):
            chosen, shape = slice(start, start + rows), (part.shape[axis], *op.weight.shape[1:])
            gradient = self._kind.weight_gradient(inputs, part, shape).flatten(1)
            add(total[chosen], gradient)
            if products is not None:
                xy, y = products
                add_products(xy[chosen], gradient, y[chosen])


def widened(values: Tensor) -> Tensor:
    """Values in their own dtype or float32, whichever is wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def count_open(mask: Tensor, count: int, axis: int) -> Tensor:
    """Samples with mask 1, in float32 or float64; int64, shape (K,)."""
    exact = count < 2**24  # float32 holds every whole number up to here
    return mask.sum(positions(mask, axis), dtype=None if exact else torch.float64).long()


def add_outputs(sums: Sums, n: Tensor, centred: Tensor, centre: Tensor, axis: int) -> None:
    """Add n samples to Σy and Σy², given y - centre (0 for what is no sample)."""
    y = sum_positions(centred, axis).double()
    yy = sum_squares(centred, axis).double()
    sums.n.add_(n)
    sums.y.add_(y + n * centre)
    sums.yy.add_(yy + 2 * centre * y + n * centre.square())


def add_products(xy: Tensor, x: Tensor, y: Tensor) -> None:
    """Add x·y to a sum of shape (K, D), given x, shape (G or K, D), and y, shape (K,)."""
    groups, rows = (len(x), -1), max(1, PIECE // x.shape[1])
    pieces = zip(*(t.split(rows) for t in (xy.unflatten(0, groups), x, y.unflatten(0, groups))))
    for total, inputs, outputs in pieces:
        total.addcmul_(outputs[..., None], inputs.double()[:, None])


def add(total: Tensor, more: Tensor) -> None:
    """Add to a float64 sum without a float64 copy of what is added."""
    rows = max(1, PIECE // total[0].numel())
    for piece, by in zip(total.split(rows), more.split(rows)):
        piece.add_(by)


def buffer_bytes(element_size: int) -> int:
    """Return the bytes of the largest buffer that an update of moments needs besides the moments.

    Args:
        element_size: Bytes of one element of the network's dtype.
    """
    converted, transformed = 2 * 8 * PIECE, 4 * element_size * winograd.BLOCK
    return max(converted, transformed)


def moments_bytes(operator: Operator, wanted: RequiredSums) -> int:
    """Bytes of an operator's moments, known before any data is read."""
    k, d = operator.neurons, operator.inputs_per_neuron
    small, total, opened = 3 * k, (operator.groups + k) * d * wanted.total, 2 * k * d * wanted.open
    return 8 * (small + total + (0 if operator.gate is None else small + opened))


def require(value: T | None) -> T:
    if value is None:
        raise ValueError("these moments were taken without the sums that this needs (Σx and Σxy, or the gate's)")
    return value


def both(a: T | None, b: T | None, otherwise: str) -> tuple[T, T] | None:
    """Both values, or None where both are; ValueError where one is."""
    if a is None or b is None:
        if a is not b:
            raise ValueError(otherwise)
        return None
    return a, b
