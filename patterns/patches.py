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
from torch.nn import functional as F

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
            chosen = slice(start, start + images)
            x = patches(op, tuple(i[chosen] for i in inputs), drawn[chosen]).double()
            index = drawn[chosen, :, None]
            mask = None if gate is None else gate[chosen].take_along_dim(index, 1).flatten(0, 1).mT.double()
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

    All where there are no more. seeds: of the images, int64 (N,); salt: what tells one draw for them from others.
    """
    if positions >= available:
        return torch.arange(available, device=seeds.device).expand(len(seeds), -1)
    # Floyd's algorithm (Bentley & Floyd 1987): every subset is equally likely, and an image costs `positions`
    # numbers rather than `available`, whatever batch it is in.
    numbers = uniform(seeds, salt, positions)
    drawn = torch.empty((len(seeds), positions), dtype=torch.int64, device=seeds.device)
    for i, last in enumerate(range(available - positions, available)):
        candidate = (numbers[:, i] * (last + 1)).long().clamp(max=last)
        taken = (drawn[:, :i] == candidate[:, None]).any(1)
        drawn[:, i] = torch.where(taken, last, candidate)
    return drawn


# --- patches at positions -------------------------------------------------------------------------


def check_supported(operator: Operator) -> None:
    """UserError where this kind's patches cannot be gathered."""
    if not isinstance(operator.kind, Convolution | TransposedConvolution | Linear | Scale | Addition | AveragePool):
        kind = type(operator.kind).__name__
        raise UserError(operator.name, f"the patches of {kind} cannot be sampled", "Leave it out of the operators.")


def patches(operator: Operator, inputs: Inputs, positions: Tensor) -> Tensor:
    """The inputs of each group of neurons at some output positions of each image.

    inputs: the operator's, batch first.  positions: int64 (N, P), each an index into the output's
    positions of its image, flattened.  Gives (G, N·P, D) in the inputs' dtype, image by image.
    """
    x, kind = inputs[0], operator.kind
    match kind:
        case Convolution(stride, padding, dilation, groups):
            taps = list(product(*(range(k) for k in operator.weight.shape[2:])))
            return windows(padded(x, padding, padding), positions, taps, stride, dilation, groups)
        case TransposedConvolution(stride, padding, more, dilation, groups):
            # A convolution of stride 1 over the input with zeros between, its weights back to front.
            kernel = operator.weight.shape[2:]
            taps = list(product(*(reversed(range(k)) for k in kernel)))
            before = tuple(d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding))
            after = tuple(b + m for b, m in zip(before, more))
            apart = padded(spread(x, stride), before, after)
            return windows(apart, positions, taps, (1,) * len(kernel), dilation, groups)
        case AveragePool(kernel, stride, padding):
            taps = list(product(*(range(k) for k in kernel)))
            ones = (1,) * len(kernel)
            return windows(padded(x, padding, padding), positions, taps, stride, ones, operator.groups)
        case Linear():
            return per_image(x, -1).take_along_dim(positions[..., None], 1).flatten(0, 1)[None]
        case Scale() | Addition():
            shape = torch.broadcast_shapes(*(i.shape for i in inputs))
            values = torch.stack([per_image(i.expand(shape), kind.axis) for i in inputs], -1)
            return values.take_along_dim(positions[..., None, None], 1).flatten(0, 1).movedim(1, 0)
    raise TypeError(f"no patches of {type(kind).__name__}")


def per_image(values: Tensor, axis: int) -> Tensor:
    """(N, *…) with neurons or inputs along `axis` → (N, positions, that dimension)."""
    moved = values.movedim(axis, -1)
    return moved.reshape(len(moved), prod(moved.shape[1:-1]), moved.shape[-1])


def windows(x: Tensor, positions: Tensor, taps: list[Shape], stride: Shape, dilation: Shape, groups: int) -> Tensor:
    """Patches of padded x (N, C, *sizes) at window positions (N, P): (groups, N·P, C/groups · taps).

    taps: where in the window each weight looks, in units of the dilation and in the weights' order.
    """
    sizes = x.shape[2:]
    reach = [d * max(t) for d, t in zip(dilation, zip(*taps))]
    counts = [(n - r - 1) // s + 1 for n, r, s in zip(sizes, reach, stride)]
    steps = [prod(sizes[i + 1 :]) for i in range(len(sizes))]  # of the flattened sizes, one along each dimension
    corners = torch.zeros_like(positions)
    for i, (s, step) in enumerate(zip(stride, steps)):
        corners = corners + positions // prod(counts[i + 1 :]) % counts[i] * s * step
    offsets = [sum(t * d * step for t, d, step in zip(tap, dilation, steps)) for tap in taps]
    index = corners[..., None] + torch.tensor(offsets, device=positions.device)
    image = torch.arange(len(x), device=positions.device)[:, None, None]
    values = x.flatten(2)[image, :, index]  # (N, P, taps, C)
    return values.mT.unflatten(2, (groups, -1)).flatten(3).flatten(0, 1).movedim(1, 0)


def padded(x: Tensor, before: Shape, after: Shape) -> Tensor:
    """x (N, C, *sizes) with zeros around it; negative numbers crop."""
    return F.pad(x, [p for pair in zip(reversed(before), reversed(after)) for p in pair])


def spread(x: Tensor, stride: Shape) -> Tensor:
    """x (N, C, *sizes) with stride - 1 zeros between its positions."""
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride)]
    apart = x.new_zeros((*x.shape[:2], *sizes))
    apart[:, :, *[slice(None, None, s) for s in stride]] = x
    return apart
