"""A worker of a fit that takes a realistic time and computes nothing. Without torch, so that 64 fit one machine."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from ray_jobs.runs.ledger import PartialMoments

TELL_EVERY = 3.0  # as in ray_jobs.engine.shard_worker


@dataclass(frozen=True)
class WorkerInfo:
    """As of ray_jobs.engine.shard_worker."""

    name: str
    node: str = ""


@dataclass(frozen=True)
class Report:
    """As ShardReport of ray_jobs.engine.shard_worker."""

    samples: int
    refused: int = 0
    batches: int = 4
    waited: float = 0.1


class Stub:
    """seconds: for a shard of 100 samples.  folder: where so many workers wait for each other before they begin."""

    def __init__(self, seconds: float, folder: Path, workers: int) -> None:
        self.seconds, self.held = seconds, list[int]()
        self.folder, self.workers = folder, workers

    def describe(self) -> WorkerInfo:
        return WorkerInfo(f"simulated/{os.getpid()}")

    def prepare(self) -> None:
        (self.folder / str(os.getpid())).touch()
        while len(list(self.folder.iterdir())) < self.workers:
            time.sleep(0.05)

    def work(self, task: tuple[int, str], following: tuple[int, str] | None = None) -> Iterator[Report]:
        begun, number = time.monotonic(), task[0]
        while (left := begun + self.seconds - time.monotonic()) > 0:
            time.sleep(min(left, TELL_EVERY))
            if left > TELL_EVERY:
                yield Report(int(100 * (time.monotonic() - begun) / self.seconds))
        self.held.append(number)
        yield Report(100)

    def commit(self) -> PartialMoments:
        time.sleep(0.05)
        held, self.held = tuple(self.held), []
        return PartialMoments(f"part-{uuid4().hex}.safetensors", held, 100 * len(held))
