"""What counts. Only what the ledger names does; everything else is simply done again."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Refused:
    """A sample that was not used, at which stage (read, decode, model), and why."""

    shard: str
    key: str
    stage: str
    reason: str


@dataclass(frozen=True)
class Part:
    """Moments of some whole shards, written once to `file`."""

    file: str
    shards: tuple[str, ...]
    samples: int
    refused: tuple[Refused, ...] = ()


@dataclass(frozen=True)
class Ledger:
    """The parts that count; each shard is in at most one of them."""

    parts: tuple[Part, ...] = ()

    def commit(self, part: Part) -> "Ledger":
        """The ledger with this part too. ValueError if one of its shards counts already."""
        counted = self.shards
        if repeated := [s for s in part.shards if s in counted] or len(set(part.shards)) < len(part.shards):
            raise ValueError(f"{part.file}: shards that count already: {repeated}")
        return Ledger((*self.parts, part))

    @property
    def shards(self) -> frozenset[str]:
        """The shards that count."""
        return frozenset(s for part in self.parts for s in part.shards)

    @property
    def samples(self) -> int:
        """The samples that count."""
        return sum(part.samples for part in self.parts)

    @property
    def refused(self) -> tuple[Refused, ...]:
        """The refused samples of the shards that count."""
        return tuple(r for part in self.parts for r in part.refused)

    def left(self, shards: Iterable[str]) -> list[str]:
        """The shards that do not count yet, in order."""
        counted = self.shards
        return [s for s in shards if s not in counted]

    def to_json(self) -> dict[str, Any]:
        """For the ledger's file."""
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Ledger":
        """The inverse of to_json."""
        return Ledger(
            tuple(
                Part(p["file"], tuple(p["shards"]), p["samples"], tuple(Refused(**r) for r in p["refused"]))
                for p in value["parts"]
            )
        )
