"""Hands out items to workers, one at a time each, and replaces the workers that are lost.

The pool knows nothing of patterns. What a worker has worked on counts only once it was committed; the
items of a lost worker that were not go back to the queue. Ray's own restarts and retries are off: they
would run a method again on an actor whose state is gone.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayTaskError

ATTEMPTS = 3  # of one item, or of starting a worker, before the pool gives up
TICK = 0.5  # seconds


class Job(Protocol):
    """What the pool works on, and who hears of it.

    commit_after: seconds between the commits of a worker; None: what is worked on counts at once.
    bad_input: errors that a user can mend. The first one ends the job, after all other work was committed.
    """

    commit_after: float | None
    bad_input: type[Exception]

    def spawn(self) -> Any:
        """A new actor with methods `ready()`, `work(item)` and, where the job commits, `commit()`."""

    def started(self, told: Any) -> None:
        """A worker is ready; `told` is what its `ready()` returned."""

    def worked(self, item: str, told: Any) -> None:
        """A worker worked on an item, which may still be lost; `told` is what its `work()` returned."""

    def lost(self, items: list[str]) -> None:
        """Items that were worked on are lost, and will be worked on again."""

    def counts(self, items: list[str], told: Any) -> None:
        """Items are done for good; `told` is what `commit()`, or else `work()`, returned."""


@dataclass
class Worker:
    """One actor: what it does now, and what it has done that does not count yet."""

    actor: Any
    doing: str = "ready"
    item: str | None = None
    uncommitted: list[str] = field(default_factory=list)
    since: float = 0.0


class ItemFailedError(RuntimeError):
    """An item, or the start of a worker, failed time after time. Its message holds the last cause."""


def run(items: Iterable[str], job: Job, size: int, stop: Callable[[], bool], tick: Callable[[], None]) -> list[str]:
    """Work on every item with up to `size` workers; gives the items left undone once `stop()` is true.

    Raises the first `bad_input` error, or ItemFailedError, after what was done is committed.
    """
    return _Pool(items, job, size, stop, tick).run()


class _Pool:
    def __init__(
        self, items: Iterable[str], job: Job, size: int, stop: Callable[[], bool], tick: Callable[[], None]
    ) -> None:
        self.queue, self.job, self.size, self.stop, self.tick = deque(items), job, size, stop, tick
        self.calls: dict[Any, Worker] = {}  # pending call → its worker
        self.idle: list[Worker] = []
        self.failures: Counter[str] = Counter()
        self.error: Exception | None = None

    def run(self) -> list[str]:
        try:
            while True:
                self.assign()
                busy = [w for w in self.calls.values() if w.doing != "ready"]
                if not busy and (not self.queue or self.stopping()):
                    break
                ready, _ = ray.wait(list(self.calls), num_returns=1, timeout=TICK)
                for call in ready:
                    self.collect(call)
                self.tick()
        finally:
            for worker in (*self.calls.values(), *self.idle):
                ray.kill(worker.actor)
        if self.error is not None:
            raise self.error
        return list(self.queue)

    def stopping(self) -> bool:
        return self.error is not None or self.stop()

    def assign(self) -> None:
        """Give every idle worker its next call, and start the workers that are missing."""
        working, self.idle = self.idle, []
        for worker in working:
            due = self.job.commit_after is not None and time.monotonic() - worker.since > self.job.commit_after
            if worker.uncommitted and (due or not self.queue or self.stopping()):
                self.call(worker, "commit")
            elif self.queue and not self.stopping():
                self.call(worker, "work", self.queue.popleft())
            else:
                self.idle.append(worker)
        if not self.stopping():
            busy = sum(worker.doing != "ready" for worker in self.calls.values())
            wanted = min(self.size, busy + len(self.idle) + len(self.queue))
            for _ in range(wanted - len(self.calls) - len(self.idle)):
                self.call(Worker(self.job.spawn()), "ready")

    def call(self, worker: Worker, method: str, *args: str) -> None:
        worker.doing, worker.item = method, args[0] if args else None
        self.calls[getattr(worker.actor, method).remote(*args)] = worker

    def collect(self, call: Any) -> None:
        worker = self.calls.pop(call)
        try:
            result = ray.get(call, timeout=60)
        except self.job.bad_input as error:  # as raised by the worker, which has dropped its uncommitted work
            self.error = self.error or plain(error)
            self.lose(worker)
        except (RayActorError, OutOfMemoryError, RayTaskError, GetTimeoutError) as error:
            subject = worker.item or f"a worker's {worker.doing}"
            self.failures[subject] += 1
            if self.failures[subject] >= ATTEMPTS and self.error is None:
                self.error = ItemFailedError(f"{subject} failed {ATTEMPTS} times; the last time: {error}")
            self.lose(worker)
        else:
            self.take(worker, result)
            self.idle.append(worker)

    def take(self, worker: Worker, result: Any) -> None:
        if worker.doing == "ready":
            del self.failures["a worker's ready"]
            self.job.started(result)
        elif worker.doing == "commit":
            self.job.counts(worker.uncommitted, result)
            worker.uncommitted = []
        elif worker.item is not None:
            self.job.worked(worker.item, result)
            if self.job.commit_after is None:
                self.job.counts([worker.item], result)
            else:
                if not worker.uncommitted:
                    worker.since = time.monotonic()
                worker.uncommitted.append(worker.item)

    def lose(self, worker: Worker) -> None:
        """Give a worker up. Its items go back to the queue; a commit that it may still finish is ignored."""
        ray.kill(worker.actor)
        self.queue.extendleft(worker.uncommitted)
        self.job.lost(worker.uncommitted)
        if worker.item is not None:
            self.queue.append(worker.item)


def plain(error: Exception) -> Exception:
    """The worker's own error, without Ray's wrapping."""
    return error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, Exception) else error
