"""Moments with the Gram matrix Σxxᵀ, over patches at positions sampled from each image.

The quality of a pattern needs Σxxᵀ, the one sum that is no weight gradient: here patches are written
out, but only at the sampled positions, gathered by index. Everything that enters the quality of an
operator is summed over the same patches.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
from torch import Tensor

from patterns import moments as sums
from patterns.errors import UserError
from patterns.moments import Moments, Wanted, planned_bytes
from patterns.operators import (
    Addition,
    AveragePool,
    Convolution,
    Inputs,
    Linear,
    Operator,
    Scale,
    Shape,
    TransposedConvolution,
)

# Elements of patches written out at a time: 64 MiB of float64.
PATCH_ELEMENTS = 2**23
SUMS = Wanted(outer=False)


@dataclass(frozen=True)
class PatchMoments:
    """Sums over sampled patches, those of second order in x included; a commutative monoid under `+`.

    moments: the sums of `Moments` over the sampled patches, Σx and Σxy among them.
    xx: Σxxᵀ of the inputs that a group of neurons shares, float64, shape (G, D, D).
    """

    moments: Moments
    xx: Tensor

    def __add__(self, other: "PatchMoments") -> "PatchMoments":
        return PatchMoments(self.moments + other.moments, self.xx + other.xx)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.moments.nbytes + self.xx.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """The sums as named tensors: those of `Moments.tensors`, and `xx`."""
        return {**self.moments.tensors(), "xx": self.xx}

    @staticmethod
    def from_tensors(named: Mapping[str, Tensor]) -> "PatchMoments":
        """The inverse of `tensors`. KeyError where a sum is missing, ValueError where one is not known."""
        return PatchMoments(Moments.from_tensors({k: t for k, t in named.items() if k != "xx"}), named["xx"])


def zero(operator: Operator) -> PatchMoments:
    """The neutral element: the sums of no patches, on the operator's device."""
    d = operator.inputs_per_neuron
    xx = torch.zeros((operator.groups, d, d), dtype=torch.float64, device=operator.weight.device)
    return PatchMoments(sums.zero(operator, SUMS), xx)


def bytes_of(operator: Operator) -> int:
    """Bytes of an operator's PatchMoments, known before any data is read."""
    return planned_bytes(operator, SUMS) + 8 * operator.groups * operator.inputs_per_neuron**2


class PatchAccumulator:
    """PatchMoments of one operator, grown in place batch by batch.

    Patches and outputs y = wᵀx are taken to float64 before anything is multiplied, whatever the model's
    precision: the sampled patches are few, and the small eigenvalues of Cov[x] and the exact kernel of
    Cov[d] (wᵀd = 0) survive neither float32 sums nor outputs rounded to float32. Activations with a
    mean of m deviations lose m² of 2⁵³. The gate alone is the model's own.

    positions: how many output positions to draw from each image, without replacement; all where an
    image has no more. The image's seed (see `begin`), the operator's name, `seed` and, where one pass calls the
    operator several times, by which call it is, say which: neither the order of images nor their batches.
    """

    def __init__(self, operator: Operator, positions: int, seed: int = 0) -> None:
        if positions < 1:
            raise UserError("--gram-positions", f"{positions} is no number of positions", "Give at least 1.")
        check_supported(operator)
        self._operator, self._positions, self._seed = operator, positions, seed
        self.reset()

    def reset(self) -> None:
        """Forget all sums."""
        self._sums = zero(self._operator)

    def begin(self, seeds: Tensor) -> None:
        """The next pass is of images with these seeds, int64 (N,)."""
        self._seeds, self._calls = seeds, 0

    def settle(self) -> None:
        """Sum what waits: nothing does."""

    def tensors(self) -> dict[str, Tensor]:
        """The sums so far by name: the very tensors that the next batch changes."""
        return self._sums.tensors()

    def moments(self) -> PatchMoments:
        """The sums so far: a copy on the CPU."""
        return PatchMoments.from_tensors({name: t.to("cpu", copy=True) for name, t in self.tensors().items()})

    @torch.no_grad()
    def update(self, inputs: Inputs, z: Tensor) -> None:
        """Add a batch: the operator's inputs, and its outputs z = y + b in the model's own layout."""
        op = self._operator
        if not z.numel():
            return
        available = z[0].numel() // op.neurons
        drawn = drawn_positions(self._seeds, salt_of(self._seed, op.name, self._calls), available, self._positions)
        self._calls += 1
        gate = None if op.gate is None else per_image(op.gate.open(z), op.kind.axis)
        images = max(1, PATCH_ELEMENTS // (drawn.shape[1] * op.groups * op.inputs_per_neuron))
        for start in range(0, len(z), images):
            part = slice(start, start + images)
            x = patches(op, tuple(i[part] for i in inputs), drawn[part]).double()
            mask = None if gate is None else chosen(gate[part], drawn[part]).flatten(0, 1).mT.double()
            self._add(x, mask)

    def _add(self, x: Tensor, mask: Tensor | None) -> None:
        """Add patches (G, n, D), and where they open the gate, (K, n)."""
        weight = self._operator.weight.double().flatten(1).unflatten(0, (len(x), -1))
        y = (weight @ x.mT).flatten(0, 1)
        total, opened = self._sums.moments.total, self._sums.moments.open
        self._sums.xx.baddbmm_(x.mT, x)
        add(total, torch.full_like(total.n, x.shape[1]), y, y, x.sum(1), x)
        if opened is not None and mask is not None:
            x_open = (mask.unflatten(0, (len(x), -1)) @ x).flatten(0, 1)
            add(opened, mask.sum(1).long(), y, mask * y, x_open, x)


def add(into: sums.Sums, n: Tensor, y: Tensor, y_chosen: Tensor, x_sum: Tensor, x: Tensor) -> None:
    """Add n samples: y (K, n), the same with 0 for what is not chosen, Σx of the chosen, patches (G, n, D)."""
    into.n.add_(n)
    into.y.add_(y_chosen.sum(1))
    into.yy.add_((y * y_chosen).sum(1))
    sums.required(into.x).add_(x_sum)
    sums.required(into.xy).add_((y_chosen.unflatten(0, (len(x), -1)) @ x).flatten(0, 1))


# --- which positions ------------------------------------------------------------------------------

# splitmix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators"): a number for each counter,
# the same on every device. As int64, in which torch wraps as C does.
STEP = 0x9E3779B97F4A7C15 - 2**64
FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
SHIFTS = (30, 27, 31)


def salt_of(seed: int, name: str, call: int) -> int:
    """What tells an operator's draw from others'."""
    digest = hashlib.sha256(f"positions/{seed}/{name}/{call}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def mixed(values: Tensor) -> Tensor:
    """splitmix64's finaliser, int64 to int64, one to one."""
    for shift, factor in zip(SHIFTS, (*FACTORS, 1)):
        values = (values ^ shifted(values, shift)) * factor
    return values


def shifted(values: Tensor, by: int) -> Tensor:
    """int64 as 64 bits, shifted right, zeros coming in."""
    return (values >> by) & (2 ** (64 - by) - 1)


def uniform(seeds: Tensor, salt: int, count: int) -> Tensor:
    """Numbers in [0, 1), float64 (N, count), for seeds int64 (N,); other salts give others."""
    counters = torch.arange(1, count + 1, device=seeds.device) * STEP
    states = mixed(seeds + salt)[:, None] + counters
    return shifted(mixed(states), 11).double() * 2.0**-53


def drawn_positions(seeds: Tensor, salt: int, available: int, positions: int) -> Tensor:
    """For each image, which of its available positions to take: int64 (N, ≤ positions), no one twice, in any order.

    Each is taken with the same probability, so that sums are unbiased; all where there are no more. The draw is
    stratified: one from each of as many stretches of about equal length, laid round the image from a random start.
    seeds: of the images, int64 (N,); salt: what tells one draw for them from others.
    """
    if positions >= available:
        return torch.arange(available, device=seeds.device).expand(len(seeds), -1)
    edges = torch.arange(positions + 1, device=seeds.device) * available // positions
    numbers = uniform(seeds, salt, positions + 1)
    # Rounding up to the next whole number is the one thing that could leave a stretch.
    inside = torch.minimum((numbers[:, :-1] * edges.diff()).long(), edges.diff() - 1)
    return (edges[:-1] + inside + (numbers[:, -1:] * available).long()) % available


# --- patches at positions -------------------------------------------------------------------------


def check_supported(operator: Operator) -> None:
    """UserError where this kind's patches cannot be gathered."""
    if not isinstance(operator.kind, Convolution | TransposedConvolution | Linear | Scale | Addition | AveragePool):
        kind = type(operator.kind).__name__
        raise UserError(operator.name, f"the patches of {kind} cannot be sampled", "Leave it out of the operators.")


def patches(operator: Operator, inputs: Inputs, positions: Tensor) -> Tensor:
    """The inputs of each group of neurons at some output positions of each image: (G, N·P, D), image by image."""
    return gathered(operator, inputs, positions).flatten(3).flatten(0, 1).movedim(1, 0)


def gathered(operator: Operator, inputs: Inputs, positions: Tensor) -> Tensor:
    """The same as (N, P, G, D/T, T), T being the taps of a window, not written out in this order.

    inputs: the operator's, batch first.  positions: int64 (N, P), each an index into the output's
    positions of its image, flattened.
    """
    x, kind = inputs[0], operator.kind
    match kind:
        case Convolution(stride, padding, dilation, groups):
            taps = list(product(*(range(k) for k in operator.weight.shape[2:])))
            return windows(x, positions, Window(taps, stride, dilation, padding, padding), groups)
        case TransposedConvolution(stride, padding, more, dilation, groups):
            # A convolution of stride 1 over the input with zeros between, its weights back to front.
            kernel = operator.weight.shape[2:]
            taps = list(product(*(reversed(range(k)) for k in kernel)))
            before = tuple(d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding))
            after = tuple(b + m for b, m in zip(before, more))
            return windows(x, positions, Window(taps, (1,) * len(kernel), dilation, before, after, stride), groups)
        case AveragePool(kernel, stride, padding):
            taps = list(product(*(range(k) for k in kernel)))
            window = Window(taps, stride, (1,) * len(kernel), padding, padding)
            return windows(x, positions, window, operator.groups)
        case Linear():
            return chosen(per_image(x, -1), positions)[:, :, None, :, None]
        case Scale() | Addition():
            shape = torch.broadcast_shapes(*(i.shape for i in inputs))
            terms = [chosen(per_image(i.expand(shape), kind.axis), positions) for i in inputs]
            return torch.stack(terms, -1)[..., None]
    raise TypeError(f"no patches of {type(kind).__name__}")


def chosen(values: Tensor, positions: Tensor) -> Tensor:
    """Values (N, positions, …) at some positions (N, P) of each image: (N, P, …)."""
    return values[torch.arange(len(values), device=values.device)[:, None], positions]


def per_image(values: Tensor, axis: int) -> Tensor:
    """(N, *…) with neurons or inputs along `axis` → (N, positions, that dimension)."""
    moved = values.movedim(axis, -1)
    return moved.reshape(len(moved), prod(moved.shape[1:-1]), moved.shape[-1])


@dataclass(frozen=True)
class Window:
    """Where a neuron looks, along each dimension.

    taps: where in the window each weight looks, in units of the dilation and in the weights' order.
    before, after: zeros around the input; negative numbers crop.  apart: how far its values are, zeros being between.
    """

    taps: list[Shape]
    stride: Shape
    dilation: Shape
    before: Shape
    after: Shape
    apart: Shape | None = None


def windows(x: Tensor, positions: Tensor, window: Window, groups: int) -> Tensor:
    """Patches of x (N, C, *sizes) at window positions (N, P): (N, P, groups, C/groups, taps).

    What lies outside is known by its place, so no input is written out with zeros around it.
    """
    sizes, w = x.shape[2:], window
    apart = w.apart or (1,) * len(sizes)
    reach = [d * max(t) for d, t in zip(w.dilation, zip(*w.taps))]
    whole = [(n - 1) * a + 1 for n, a in zip(sizes, apart)]
    counts = [(n + b + e - r - 1) // s + 1 for n, b, e, r, s in zip(whole, w.before, w.after, reach, w.stride)]
    index, outside = positions.new_zeros(1), None
    for i, size in enumerate(sizes):
        corner = positions // prod(counts[i + 1 :]) % counts[i] * w.stride[i] - w.before[i]
        at = corner[..., None] + torch.tensor([t[i] * w.dilation[i] for t in w.taps], device=x.device)
        if w.before[i] or w.after[i] or w.apart:
            beyond = (at < 0) | (at >= whole[i])
            if w.apart:
                beyond |= at % apart[i] != 0
                at = at.div_(apart[i], rounding_mode="floor")
            at = at.clamp_(0, size - 1)
            outside = beyond if outside is None else outside | beyond
        index = index + at * prod(sizes[i + 1 :])
    values = chosen(x.flatten(2).mT, index.flatten(1)).unflatten(1, (positions.shape[1], -1))  # (N, P, taps, C)
    if outside is not None:
        values.masked_fill_(outside[..., None], 0)
    return values.mT.unflatten(2, (groups, -1))
