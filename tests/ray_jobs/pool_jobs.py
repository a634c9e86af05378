"""A job that records the calls of its pool, its workers of both kinds, and virtual time."""

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from ray_jobs.config.timing import Timing
from ray_jobs.engine import worker_pool
from ray_jobs.engine.worker_backends import Backend, LocalBackend, RayBackend
from ray_jobs.engine.worker_pool import Outcome
from tests.ray_jobs.failing import Actor, BadItemError, BusyServerError

FAST = Timing(poll=0.05, back_off=0.01)
WORKER = tuple[int, int]
PLAIN = [f"plain-{i}" for i in range(12)]


class Clock:
    """Virtual time instead of the module `time`."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


class Recorder:
    """A job that records the calls of its pool."""

    bad_input: type[Exception] = BadItemError
    busy: type[Exception] = BusyServerError

    def __init__(self, max_loss: float | None = 0.05, attempts: int = 3, stall: float = 1.5, workers: int = 2) -> None:
        self.max_loss, self.attempts, self.stall_timeout, self.workers = max_loss, attempts, stall, workers
        self.item_timeout, self.commits = 60.0, 0
        self.committed: Counter[str] = Counter()
        self.done: list[str] = []
        self.attempted: list[str] = []
        self.errors: list[str] = []
        self.ready: list[WORKER] = []
        self.released: list[WORKER] = []
        self.leaving: set[WORKER] = set()

    def wanted_workers(self) -> int:
        return self.workers

    def make_task(self, item: str) -> str:
        return item

    def must_leave(self, worker: WORKER) -> bool:
        return worker in self.leaving

    def on_ready(self, worker: WORKER) -> None:
        self.ready.append(worker)

    def on_removed(self, worker: WORKER, error: Exception | None) -> None: ...

    def on_released(self, worker: WORKER, seconds: float) -> None:
        assert seconds >= 0
        self.released.append(worker)

    def on_assigned(self, item: str, worker: WORKER) -> None:
        self.attempted.append(item)

    def on_progress(self, item: str, report: int) -> None: ...

    def on_done(self, item: str, report: int) -> None:
        assert report == 2, "the last report of a generator is its result"
        self.done.append(item)

    def on_failed(self, item: str, error: Exception) -> None:
        self.errors.append(item)

    def on_lost(self, items: list[str]) -> None:
        for item in items:
            self.done.remove(item)

    def on_committed(self, items: list[str], result: Any) -> None:
        if self.max_loss is not None:
            assert sorted(items) == sorted(result), "the pool and the worker disagree on what is committed"
        self.commits += 1
        self.committed.update(items)


def on_ray(folder: Path) -> RayBackend:
    actor: Any = ray.remote(Actor).options(num_cpus=0)
    return RayBackend(lambda: actor.remote(folder))


def in_process(folder: Path, clock: Clock | None = None, unit: float = 0.001) -> LocalBackend:
    return LocalBackend(lambda: Actor(folder, unit, time.sleep if clock is None else clock.sleep))


def run(
    job: Recorder,
    items: list[str],
    backend: Backend,
    tick: Callable[[], None] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
    timing: Timing = FAST,
) -> Outcome:
    return worker_pool.run(items, job, backend, stop, tick, timing)


def attempts_at(item: str, folder: Path) -> int:
    return len(list(folder.glob(f"{item}@*")))
