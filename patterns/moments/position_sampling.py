"""Which positions of each image are sampled."""

import hashlib
from collections import Counter

import torch
from torch import Tensor

from patterns.errors import UserError

# splitmix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators"): a number for each counter,
# the same on every device. As int64, in which torch wraps as C does.
STEP = 0x9E3779B97F4A7C15 - 2**64
FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
SHIFTS = (30, 27, 31)


def salt_of(seed: int, name: str, call: int) -> int:
    """What tells an operator's draw from others'."""
    digest = hashlib.sha256(f"positions/{seed}/{name}/{call}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def mix(values: Tensor) -> Tensor:
    """splitmix64's finaliser, int64 to int64, one to one."""
    for shift, factor in zip(SHIFTS, (*FACTORS, 1)):
        values = (values ^ shifted(values, shift)) * factor
    return values


def shifted(values: Tensor, by: int) -> Tensor:
    """int64 as 64 bits, shifted right, zeros coming in."""
    return (values >> by) & (2 ** (64 - by) - 1)


def draw_uniform(seeds: Tensor, salts: Tensor, count: int) -> Tensor:
    """Numbers in [0, 1), float64 (R, N, count), for seeds int64 (N,) and salts int64 (R,); others give others."""
    counters = torch.arange(1, count + 1, device=seeds.device) * STEP
    states = mix(seeds + salts[:, None])[..., None] + counters
    return shifted(mix(states), 11).double() * 2.0**-53


def drawn_positions(seeds: Tensor, salts: Tensor, available: Tensor, positions: int) -> Tensor:
    """For each draw and image, which positions to take: int64 (R, N, positions), no one twice, in any order.

    Each is taken with the same probability, so that sums are unbiased. The draw is stratified: one from each of as
    many stretches of about equal length, laid round the image from a random start.
    seeds: of the images, int64 (N,).  salts, available: of each draw what tells it from others, and of how many
    positions it is, more than are drawn; int64 (R,).
    """
    edges = torch.arange(positions + 1, device=seeds.device) * available[:, None] // positions
    numbers, lengths = draw_uniform(seeds, salts, positions + 1), edges.diff()[:, None]
    # Rounding up to the next whole number is the one thing that could leave a stretch.
    inside = torch.minimum((numbers[..., :-1] * lengths).long(), lengths - 1)
    of = available[:, None, None]
    return (edges[:, None, :-1] + inside + (numbers[..., -1:] * of).long()) % of


class PositionSampler:
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
