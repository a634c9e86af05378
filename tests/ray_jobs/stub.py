"""A worker of a fit that takes a realistic time and computes nothing. Without torch, so that 64 fit on one machine."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from ray_jobs.config.timing import PRODUCTION
from ray_jobs.runs.ledger import PartialMoments


@dataclass(frozen=True)
class StubInfo:
    """Like WorkerInfo of ray_jobs.engine.shard_worker."""

    name: str
    node: str = ""


@dataclass(frozen=True)
class StubReport:
    """Like ShardReport of ray_jobs.engine.shard_worker."""

    samples: int
    rejected: int = 0
    batches: int = 4
    waited: float = 0.1


class StubWorker:
    """A worker whose shards have 100 samples each.

    Args:
        seconds: Duration of a shard.
        folder: Where the workers wait for each other before they begin.
        workers: How many wait for each other.
    """

    def __init__(self, seconds: float, folder: Path, workers: int) -> None:
        self.seconds, self.held = seconds, list[int]()
        self.folder, self.workers = folder, workers

    def describe(self) -> StubInfo:
        return StubInfo(f"simulated/{os.getpid()}")

    def prepare(self) -> None:
        (self.folder / str(os.getpid())).touch()
        while len(list(self.folder.iterdir())) < self.workers:
            time.sleep(0.05)

    def work(self, task: tuple[int, str], following: tuple[int, str] | None = None) -> Iterator[StubReport]:
        begun, number = time.monotonic(), task[0]
        interval = PRODUCTION.report_interval
        while (left := begun + self.seconds - time.monotonic()) > 0:
            time.sleep(min(left, interval))
            if left > interval:
                yield StubReport(int(100 * (time.monotonic() - begun) / self.seconds))
        self.held.append(number)
        yield StubReport(100)

    def commit(self) -> PartialMoments:
        time.sleep(0.05)
        held, self.held = tuple(self.held), []
        return PartialMoments(f"part-{uuid4().hex}.safetensors", held, 100 * len(held))
