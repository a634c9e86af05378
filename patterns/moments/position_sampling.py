"""Sampling of the spatial positions of each image for each operator."""

import hashlib
from collections import Counter

import torch
from torch import Tensor

from patterns.errors import UserError

# splitmix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators") maps each counter to the
# same number on every device. The constants are int64, because torch's int64 wraps around as C's unsigned does.
STEP = 0x9E3779B97F4A7C15 - 2**64
FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
SHIFTS = (30, 27, 31)


def make_salt(seed: int, name: str, call: int) -> int:
    """Return a hash of a seed, an operator's name and the number of its call, int64."""
    digest = hashlib.sha256(f"positions/{seed}/{name}/{call}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def mix(values: Tensor) -> Tensor:
    """Apply splitmix64's finalizer, a one-to-one map from int64 to int64."""
    for shift, factor in zip(SHIFTS, (*FACTORS, 1)):
        values = (values ^ shift_right(values, shift)) * factor
    return values


def shift_right(values: Tensor, by: int) -> Tensor:
    """Shift int64 as 64 unsigned bits to the right."""
    return (values >> by) & (2 ** (64 - by) - 1)


def draw_uniform(seeds: Tensor, salts: Tensor, count: int) -> Tensor:
    """Return numbers in [0, 1), float64 (R, N, count), for seeds (N,) and salts (R,), both int64."""
    counters = torch.arange(1, count + 1, device=seeds.device) * STEP
    states = mix(seeds + salts[:, None])[..., None] + counters
    return shift_right(mix(states), 11).double() * 2.0**-53


def sample_positions(seeds: Tensor, salts: Tensor, available: Tensor, positions: int) -> Tensor:
    """Sample positions of each image without replacement, in no particular order.

    All positions have the same probability, so sums are unbiased. The sample is stratified: the image's positions
    are divided into `positions` stretches of about equal length, beginning at a random position, and one is taken
    from each stretch.

    Args:
        seeds: The seed of each image, int64 (N,).
        salts: One number for each sample to draw, which makes it independent of the others; int64 (R,).
        available: How many positions there are to choose from, more than `positions`; int64 (R,).
        positions: How many to take.

    Returns:
        Indices, int64 (R, N, positions).
    """
    edges = torch.arange(positions + 1, device=seeds.device) * available[:, None] // positions
    numbers, lengths = draw_uniform(seeds, salts, positions + 1), edges.diff()[:, None]
    # The product may be rounded up to the length, which would be in the next stretch.
    offsets = torch.minimum((numbers[..., :-1] * lengths).long(), lengths - 1)
    count = available[:, None, None]
    return (edges[:, None, :-1] + offsets + (numbers[..., -1:] * count).long()) % count


class PositionSampler:
    """Sampler of the positions of each image that count, independently for each operator and call.

    The positions follow from the image's seed, the operator's name, `seed` and, if one pass calls the operator
    several times, the number of the call. They depend neither on the order of the images nor on the batches. From
    the second pass on, the samples for all calls are drawn at once: each consists of few numbers, and drawn alone it
    would cost as many small operations as all together.
    """

    def __init__(self, positions: int, seed: int = 0) -> None:
        """Sample `positions` of each image, or all if it has no more. Raise UserError if `positions` is below 1."""
        if positions < 1:
            raise UserError("", f"{positions} is not a number of positions", "Pass at least 1.", "positions")
        self._positions, self._seed = positions, seed
        self._rows: dict[tuple[str, int, int], int] = {}  # row number by name, call and available positions
        self._constants = torch.empty(2, 0, dtype=torch.int64)  # salt and available positions of each row

    def start_pass(self, seeds: Tensor) -> None:
        """Start a pass over images with these seeds, int64 (N,)."""
        self._seeds, self._calls = seeds, Counter[str]()
        self._constants = self._constants.to(seeds.device)
        self._sampled = list(self._sample_rows(self._constants))

    def sample(self, name: str, available: int) -> Tensor:
        """Return the positions for the next call of an operator in this pass.

        Args:
            name: The operator's name.
            available: How many positions its output has.

        Returns:
            Indices of positions, int64 (N, ≤ positions).
        """
        key = (name, self._calls[name], available)
        self._calls[name] += 1
        if self._positions >= available:
            return torch.arange(available, device=self._seeds.device).expand(len(self._seeds), -1)
        if key not in self._rows:
            self._rows[key] = len(self._rows)
            constants = torch.tensor([[make_salt(self._seed, *key[:2])], [available]], device=self._seeds.device)
            self._constants = torch.cat([self._constants, constants], 1)
            self._sampled += self._sample_rows(constants)
        return self._sampled[self._rows[key]]

    def _sample_rows(self, constants: Tensor) -> Tensor:
        salts, available = constants
        return sample_positions(self._seeds, salts, available, self._positions)
