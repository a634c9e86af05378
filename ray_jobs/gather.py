"""Shards → moments → parts, each shard counted exactly once: the half that `fit` and `quality` share."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from patterns import Network, UserError
from patterns.observe import Observation
from patterns.storage import save_moments, write_json
from ray_jobs.config import ModelConfig, Resources, equal_share
from ray_jobs.ledger import Ledger, Part, Refused
from ray_jobs.session import ShardJob
from ray_jobs.shards import ShardReader
from ray_jobs.worker import Place, ShardReport, Share

Observe = Callable[[Network], Observation[Any]]


@dataclass(frozen=True)
class Gathering:
    """What to take moments of, and the folder for the parts and their ledger."""

    model: ModelConfig
    shards: tuple[str, ...]
    folder: str
    batch_size: int
    max_samples: int | None


class GatherWorker:
    """Holds the model and the moments not yet committed. Losing it loses nothing that counts."""

    def __init__(self, task: Gathering, observe: Observe, weights: str, share: Share = Share()) -> None:  # noqa: B008 - frozen
        self.task, self.share = task, share
        self.loaded = share.load(task.model, weights)
        self.observation = observe(self.loaded.network)
        self.forget()

    def ready(self) -> Place:
        """Where this worker runs, once its model is loaded."""
        return self.share.place()

    def forget(self) -> None:
        """Drop the moments not yet committed."""
        self.observation.reset()
        self.shards: list[str] = []
        self.samples = 0
        self.refused: list[Refused] = []

    def work(self, shard: str) -> Iterator[ShardReport]:
        """Add the moments of a whole shard, telling after each batch how far it is.

        On any error, everything not committed is dropped.
        """
        task, loaded = self.task, self.loaded
        most = equal_share(task.max_samples, task.shards.index(shard), len(task.shards))
        reader = ShardReader(shard, loaded.preprocessing, task.batch_size, loaded.dtype, most)
        samples = 0
        self.observation.begin(shard)
        try:
            for batch in reader:
                self.observation.update(batch.images.to(loaded.device, non_blocking=True))
                samples += len(batch.keys)
                yield ShardReport(samples, len(reader.refused))
        except BaseException:
            self.forget()
            raise
        self.shards.append(shard)
        self.samples += samples
        self.refused += reader.refused
        yield ShardReport(samples, len(reader.refused))

    def commit(self) -> Part:
        """Write the moments as a part. It counts once the driver has put it into the ledger."""
        part = Part(f"part-{uuid4().hex}.safetensors", tuple(self.shards), self.samples, tuple(self.refused))
        path = Path(self.task.folder) / part.file
        try:
            save_moments(path, self.observation.moments(), {"weights": self.loaded.digest})
        except OSError as error:
            what = f"cannot be written ({error.strerror or error})"
            raise UserError(str(path), what, "Make room; the same command goes on where this one ended.") from error
        self.forget()
        return part


class GatherJob(ShardJob):
    """The driver's side: the ledger and its file."""

    def __init__(self, name: str, run: Path, task: Gathering, resources: Resources) -> None:
        self.task, self.folder = task, Path(task.folder)
        self.path = self.folder / "ledger.json"
        self.ledger = read_ledger(self.folder)
        named = {part.file for part in self.ledger.parts}
        for file in self.folder.glob("part-*.safetensors"):
            if file.name not in named:  # written by a worker whose driver died before it could count
                file.unlink()
        self.seconds = 0.0  # from the first worker's start to the last commit
        super().__init__(name, run, task.shards, self.ledger.left(task.shards), resources, resources.max_loss)

    def gather(self, observe: Observe, weights: str) -> Ledger:
        """Work until every shard counts, or is missing. UserError where no sample of any shard could be used."""
        self.run(GatherWorker, self.task, observe, weights)
        if not self.ledger.samples:
            refused = self.ledger.refused
            if not refused:
                raise UserError(self.task.shards[0], "no samples in any shard", "Check --shards.")
            what = f"none of the {len(refused)} samples can be used; {refused[0].key}: {refused[0].reason}"
            raise UserError(refused[0].shard, what, "Mend the data, then choose another --out.")
        return self.ledger

    def counts(self, items: list[str], told: Part) -> None:
        if sorted(told.shards) != sorted(items):
            raise RuntimeError(f"{told.file} holds {told.shards}, not {items}")
        self.ledger = self.ledger.commit(told)
        write_json(self.path, self.ledger.to_json())
        self.seconds = time.monotonic() - self.begun


def read_ledger(folder: Path) -> Ledger:
    """The ledger of a folder of parts; empty where there is none yet."""
    path = folder / "ledger.json"
    return Ledger.from_json(json.loads(path.read_text())) if path.exists() else Ledger()


def part_files(folder: Path, ledger: Ledger) -> list[str]:
    """The paths of the parts that count."""
    return [str(folder / part.file) for part in ledger.parts]


def apart(sets: dict[str, Sequence[str]]) -> None:
    """UserError where two sets of shards share one."""
    seen: dict[str, str] = {}
    for name, shards in sets.items():
        for shard in shards:
            if shard in seen:
                what = f"is in {seen[shard]} and in {name}; each needs shards of its own"
                raise UserError(shard, what, "Name other shards.")
            seen[shard] = name
