"""The ledger of a folder of partial moments: only shards that it names count; all others are done again.

A shard is named by its number in the job's list, so that the ledger of 100,000 shards stays small. `moments_store`
reads and writes the file.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class PartialMoments:
    """The ledger's entry for a file with the moments of some shards. A file is written once.

    Attributes:
        file: Name of the file.
        shards: Numbers of the shards.
        samples: Number of samples in the moments.
        rejected: Number of samples of these shards that were rejected.
        round: 0 for whole shards; n for the n-th attempt at the samples that were rejected before.
    """

    file: str
    shards: tuple[int, ...]
    samples: int
    rejected: int = 0
    round: int = 0


@dataclass(frozen=True)
class Ledger:
    """The partial moments that count. In each round, each shard is in at most one of them.

    Attributes:
        entries: The partial moments.

    Example:
        >>> ledger = Ledger().commit(PartialMoments("part-1", (0, 2), samples=20))
        >>> ledger.remaining(range(4)), ledger.samples
        ([1, 3], 20)
    """

    entries: tuple[PartialMoments, ...] = ()

    def commit(self, *entries: PartialMoments) -> "Ledger":
        """Return a ledger with further partial moments.

        Args:
            entries: The partial moments.

        Raises:
            ValueError: If a shard counts already in its round, or is tried again before it counts.
        """
        counted = {round_: set(self.counted_shards(round_)) for round_ in {0, *(entry.round for entry in entries)}}
        for entry in entries:
            in_round = counted[entry.round]
            repeated = {shard for shard, n in Counter(entry.shards).items() if n > 1 or shard in in_round}
            if repeated:
                raise ValueError(f"{entry.file}: shards that count already: {sorted(repeated)}")
            if entry.round and not counted[0].issuperset(entry.shards):
                raise ValueError(f"{entry.file}: shards that do not count yet are tried again")
            in_round.update(entry.shards)
        return Ledger((*self.entries, *entries))

    def merge(self, files: Collection[str], merged: PartialMoments) -> "Ledger":
        """Return a ledger in which one file replaces several files with the same content.

        Args:
            files: The names of the old files.
            merged: The entry of the new file.

        Raises:
            ValueError: If the entry differs from the sum of the old ones, or an old one is not in this ledger.
        """
        old = [entry for entry in self.entries if entry.file in files]
        if len(old) < len(files) or combine_entries(merged.file, old) != merged:
            raise ValueError(f"{merged.file} is not the sum of {len(files)} partial moments of this ledger")
        return Ledger((*(entry for entry in self.entries if entry.file not in files), merged))

    def counted_shards(self, round_: int = 0) -> frozenset[int]:
        """Return the shards that count in a round."""
        return frozenset(s for entry in self.entries if entry.round == round_ for s in entry.shards)

    def remaining(self, shards: Iterable[int], round_: int = 0) -> list[int]:
        """Return those of some shards that do not count in a round yet, in their order."""
        counted = self.counted_shards(round_)
        return [s for s in shards if s not in counted]

    @property
    def samples(self) -> int:
        """The number of samples that count."""
        return sum(entry.samples for entry in self.entries)

    def to_json(self) -> dict[str, Any]:
        """Return the content of the ledger's file."""
        return {"parts": [entry_to_json(entry) for entry in self.entries]}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Ledger":
        """Return the ledger of a file's content; the inverse of `to_json`."""
        return Ledger(tuple(entry_from_json(each) for each in value["parts"]))


def entry_to_json(entry: PartialMoments) -> dict[str, Any]:
    """Return an entry as the ledger's file stores it: rejected samples are `refused`, shards are ranges."""
    return {
        "file": entry.file,
        "shards": format_numbers(entry.shards),
        "samples": entry.samples,
        "refused": entry.rejected,
        "round": entry.round,
    }


def entry_from_json(value: dict[str, Any]) -> PartialMoments:
    """Return the entry of a file's content; the inverse of `entry_to_json`."""
    shards = parse_numbers(value["shards"])
    return PartialMoments(value["file"], shards, value["samples"], value.get("refused", 0), value.get("round", 0))


def combine_entries(file: str, entries: Collection[PartialMoments]) -> PartialMoments:
    """Return the entry of a file with the sum of several partial moments.

    Args:
        file: Name of the file.
        entries: The partial moments.

    Raises:
        ValueError: If they belong to different rounds.
    """
    (round_,) = {entry.round for entry in entries}
    shards = tuple(sorted(s for entry in entries for s in entry.shards))
    return PartialMoments(file, shards, sum(p.samples for p in entries), sum(p.rejected for p in entries), round_)


def format_numbers(numbers: Collection[int]) -> str:
    """Return numbers as ranges.

    Example:
        >>> format_numbers([7, 0, 1, 2])
        '0-2,7'
    """
    ordered = sorted(numbers)
    firsts = [b for a, b in pairwise([-2, *ordered]) if b > a + 1]
    lasts = [a for a, b in pairwise([*ordered, float("inf")]) if b > a + 1]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(firsts, lasts))


def parse_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of some ranges in order; the inverse of `format_numbers`."""
    spans = [span.partition("-") for span in text.split(",") if span]
    return tuple(n for first, _, last in spans for n in range(int(first), int(last or first) + 1))
