"""Moments with the Gram matrix Σxxᵀ, over patches at positions sampled from each image.

The quality of a pattern needs Σxxᵀ, the one sum that is no weight gradient: here patches are written
out, but only at the sampled positions, gathered by index. Everything that enters the quality of an
operator is summed over the same patches.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, reduce
from math import prod

import torch
from torch import Tensor

from patterns.errors import UserError
from patterns.moments import moments as sums
from patterns.moments.moments import Moments, Wanted, planned_bytes
from patterns.operators.operator import Addition, Inputs, Operator, Shape
from patterns.operators.receptive_fields import window_of

# Elements of patches written out at a time: 64 MiB of float64.
PATCH_ELEMENTS = 2**23
SUMS = Wanted()


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

    draw: which positions count.
    """

    def __init__(self, operator: Operator, draw: "Draw") -> None:
        self._operator, self._draw, self._gather = operator, draw, Gatherer(operator)
        self.reset()

    def reset(self) -> None:
        """Forget all sums."""
        self._sums = zero(self._operator)

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
        drawn = self._draw.of(op.name, z[0].numel() // op.neurons)
        gate = None if op.gate is None else per_image(op.gate.open(z), op.kind.axis)
        images = max(1, PATCH_ELEMENTS // (drawn.shape[1] * op.groups * op.inputs_per_neuron))
        for start in range(0, len(z), images):
            part = slice(start, start + images)
            x = self._gather.by_group(tuple(i[part] for i in inputs), drawn[part]).double()
            mask = None if gate is None else chosen(gate[part], drawn[part], gate.new_empty(x.shape[1], op.neurons))
            self._add(x, None if mask is None else mask.mT.double())

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


def uniform(seeds: Tensor, salts: Tensor, count: int) -> Tensor:
    """Numbers in [0, 1), float64 (R, N, count), for seeds int64 (N,) and salts int64 (R,); others give others."""
    counters = torch.arange(1, count + 1, device=seeds.device) * STEP
    states = mixed(seeds + salts[:, None])[..., None] + counters
    return shifted(mixed(states), 11).double() * 2.0**-53


def drawn_positions(seeds: Tensor, salts: Tensor, available: Tensor, positions: int) -> Tensor:
    """For each draw and image, which positions to take: int64 (R, N, positions), no one twice, in any order.

    Each is taken with the same probability, so that sums are unbiased. The draw is stratified: one from each of as
    many stretches of about equal length, laid round the image from a random start.
    seeds: of the images, int64 (N,).  salts, available: of each draw what tells it from others, and of how many
    positions it is, more than are drawn; int64 (R,).
    """
    edges = torch.arange(positions + 1, device=seeds.device) * available[:, None] // positions
    numbers, lengths = uniform(seeds, salts, positions + 1), edges.diff()[:, None]
    # Rounding up to the next whole number is the one thing that could leave a stretch.
    inside = torch.minimum((numbers[..., :-1] * lengths).long(), lengths - 1)
    of = available[:, None, None]
    return (edges[:, None, :-1] + inside + (numbers[..., -1:] * of).long()) % of


class Draw:
    """Which positions of each image count, for one operator's call others than for another's.

    An image's seed, the operator's name, `seed` and, where one pass calls the operator several times, by which call
    it is, say which: neither the order of images nor their batches. All draws of a pass are made at once, as far as
    the passes before told of them: they are of few numbers, and each alone would cost as many small operations.

    positions: of each image, without replacement; all where an image has no more.  UserError for none.
    """

    def __init__(self, positions: int, seed: int = 0) -> None:
        if positions < 1:
            raise UserError("--gram-positions", f"{positions} is no number of positions", "Give at least 1.")
        self._positions, self._seed = positions, seed
        self._rows: dict[tuple[str, int, int], int] = {}  # by name, call and available positions: a number
        self._constants = torch.empty(2, 0, dtype=torch.int64)  # salt and available positions of each row

    def begin(self, seeds: Tensor) -> None:
        """The next pass is of images with these seeds, int64 (N,)."""
        self._seeds, self._calls = seeds, Counter[str]()
        self._constants = self._constants.to(seeds.device)
        self._drawn = list(self._draws(self._constants))

    def of(self, name: str, available: int) -> Tensor:
        """The positions for the next call of an operator, which has so many: int64 (N, ≤ positions)."""
        key = (name, self._calls[name], available)
        self._calls[name] += 1
        if self._positions >= available:
            return torch.arange(available, device=self._seeds.device).expand(len(self._seeds), -1)
        if key not in self._rows:
            self._rows[key] = len(self._rows)
            constants = torch.tensor([[salt_of(self._seed, *key[:2])], [available]], device=self._seeds.device)
            self._constants = torch.cat([self._constants, constants], 1)
            self._drawn += self._draws(constants)
        return self._drawn[self._rows[key]]

    def _draws(self, constants: Tensor) -> Tensor:
        salts, available = constants
        return drawn_positions(self._seeds, salts, available, self._positions)


# --- patches at positions -------------------------------------------------------------------------


class Gatherer:
    """An operator's inputs at some of its output positions. UserError for a kind whose patches cannot be gathered.

    taps: T, the places in a neuron's window or the terms of an addition; D/T inputs of a neuron lie at each.
    """

    def __init__(self, operator: Operator) -> None:
        self._operator, self._window = operator, window_of(operator)
        self._looks: dict[Shape, tuple[Tensor, Tensor | None]] = {}  # by the input's sizes: index, and 1 where inside
        shape = operator.weight.shape
        self.taps = shape[1] if isinstance(operator.kind, Addition) else prod(shape[2:])

    def empty(self, inputs: Inputs, samples: int) -> Tensor:
        """Memory for the inputs of so many samples (n, T, G, D/T)."""
        op, dtype = self._operator, reduce(torch.promote_types, (x.dtype for x in inputs))
        shape = samples, self.taps, op.groups, op.inputs_per_neuron // self.taps
        return torch.empty(shape, dtype=dtype, device=inputs[0].device)

    def __call__(self, inputs: Inputs, positions: Tensor, out: Tensor) -> None:
        """Write the inputs to `out` (N·P, T, G, D/T), contiguous, image by image.

        inputs: the operator's, batch first.  positions: int64 (N, P), each an index into the output's positions of
        its image, flattened.
        """
        kind, x, out = self._operator.kind, inputs[0], out.flatten(2)
        if self._window is not None:
            self._windows(x, positions, out)
        elif isinstance(kind, Addition):
            shape = torch.broadcast_shapes(*(i.shape for i in inputs))
            for term, x in enumerate(inputs):
                chosen(per_image(x.expand(shape), kind.axis), positions, out[:, term])
        else:
            chosen(per_image(x, kind.axis), positions, out[:, 0])

    def by_group(self, inputs: Inputs, positions: Tensor) -> Tensor:
        """The same as (G, N·P, D)."""
        out = self.empty(inputs, positions.numel())
        self(inputs, positions, out)
        return out.permute(2, 0, 3, 1).flatten(2)

    def _windows(self, x: Tensor, positions: Tensor, out: Tensor) -> None:
        """Of x (N, C, *sizes), written out without zeros around it: what lies outside is known by its place."""
        assert self._window is not None
        sizes = tuple(x.shape[2:])
        if sizes not in self._looks:
            index, outside = self._window.looks(sizes)
            self._looks[sizes] = index.to(x.device), None if outside is None else outside.logical_not().to(x)
        index, inside = self._looks[sizes]
        chosen(x.flatten(2).mT, index[positions].flatten(1), out.flatten(0, 1))
        if inside is not None:
            out.mul_(inside[positions].flatten(0, 1)[..., None])  # masks are slow on CPUs


def chosen(values: Tensor, positions: Tensor, out: Tensor) -> Tensor:
    """Values (N, positions, C) at some positions (N, P) of each image, in `out` (N·P, C)."""
    images, available = values.shape[:2]
    # As in channels_last, where each position's numbers are copied at once.
    if values.is_contiguous() and values.dtype == out.dtype:
        rows = positions + multiples(available, images, values.device)
        return torch.index_select(values.flatten(0, 1), 0, rows.flatten(), out=out)
    out.unflatten(0, positions.shape).copy_(values[multiples(1, images, values.device), positions])
    return out


@lru_cache
def multiples(step: int, count: int, device: torch.device) -> Tensor:
    """0, step, …, int64 (count, 1): made once, since a pass asks for them some hundred times."""
    return torch.arange(count, device=device)[:, None] * step


def per_image(values: Tensor, axis: int) -> Tensor:
    """(N, *…) with neurons or inputs along `axis` → (N, positions, that dimension)."""
    moved = values.movedim(axis, -1)
    return moved.reshape(len(moved), prod(moved.shape[1:-1]), moved.shape[-1])
