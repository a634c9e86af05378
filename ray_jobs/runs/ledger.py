"""What counts. Only what the ledger names does; everything else is simply done again.

Shards go by their number in the job's list, so that the ledger of 100,000 shards stays small.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class PartialMoments:
    """Moments of some shards, written once to `file`.

    round: 0 for whole shards; n for the n-th time that the samples refused until then were tried again.
    samples, refused: how many it holds, and how many it could not use.
    """

    file: str
    shards: tuple[int, ...]
    samples: int
    refused: int = 0
    round: int = 0


@dataclass(frozen=True)
class Ledger:
    """The parts that count; in each round, each shard is in at most one of them."""

    parts: tuple[PartialMoments, ...] = ()

    def commit(self, *parts: PartialMoments) -> "Ledger":
        """The ledger with these parts too.

        ValueError if a shard of one counts already in its round, or is tried again before it counts.
        """
        counted = {round_: set(self.counted_shards(round_)) for round_ in {0, *(part.round for part in parts)}}
        for part in parts:
            there = counted[part.round]
            if repeated := [s for s in part.shards if s in there] or len(set(part.shards)) < len(part.shards):
                raise ValueError(f"{part.file}: shards that count already: {repeated}")
            if part.round and not counted[0].issuperset(part.shards):
                raise ValueError(f"{part.file}: shards that do not count yet are tried again")
            there.update(part.shards)
        return Ledger((*self.parts, *parts))

    def merge(self, files: Collection[str], merged: PartialMoments) -> "Ledger":
        """The ledger with one part in the place of several that hold the same.

        ValueError if it does not name just their shards and samples, or they are not all here.
        """
        old = [part for part in self.parts if part.file in files]
        if len(old) < len(files) or combine_entries(merged.file, old) != merged:
            raise ValueError(f"{merged.file} is not what {len(files)} parts hold")
        return Ledger((*(part for part in self.parts if part.file not in files), merged))

    def counted_shards(self, round_: int = 0) -> frozenset[int]:
        """The shards that count in a round."""
        return frozenset(s for part in self.parts if part.round == round_ for s in part.shards)

    def remaining(self, shards: Iterable[int], round_: int = 0) -> list[int]:
        """Those of some shards that do not count in a round yet, in order."""
        counted = self.counted_shards(round_)
        return [s for s in shards if s not in counted]

    @property
    def samples(self) -> int:
        """The samples that count."""
        return sum(part.samples for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """For the ledger's file."""
        return {"parts": [{**vars(part), "shards": format_numbers(part.shards)} for part in self.parts]}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Ledger":
        """The inverse of to_json."""
        return Ledger(tuple(PartialMoments(**{**part, "shards": numbers(part["shards"])}) for part in value["parts"]))


def combine_entries(file: str, parts: Collection[PartialMoments]) -> PartialMoments:
    """What a file of several parts' sums holds. ValueError for parts of different rounds."""
    (round_,) = {part.round for part in parts}
    shards = tuple(sorted(s for part in parts for s in part.shards))
    return PartialMoments(file, shards, sum(p.samples for p in parts), sum(p.refused for p in parts), round_)


def format_numbers(shards: Collection[int]) -> str:
    """Numbers as people write them: `0-4,7`."""
    ordered = sorted(shards)
    firsts = [b for a, b in pairwise([-2, *ordered]) if b > a + 1]
    lasts = [a for a, b in pairwise([*ordered, float("inf")]) if b > a + 1]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(firsts, lasts))


def numbers(text: str) -> tuple[int, ...]:
    """The inverse of `format_numbers`: the numbers in order."""
    spans = [span.partition("-") for span in text.split(",") if span]
    return tuple(n for first, _, last in spans for n in range(int(first), int(last or first) + 1))
