"""Hands out items to workers, one at a time each, and replaces the workers that are lost.

What a worker has worked on counts only once it was committed; a lost worker's other items go back to the queue.
Ray's own restarts and retries are off: they would run a method again on an actor whose state is gone.
"""

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray import ObjectRefGenerator
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayTaskError

from ray_jobs.engine.signals import pause

TROUBLES = 3  # failures to start a worker, or to commit, one after the other, before the pool gives up
STARTING = ("describe", "prepare")
TICK = 0.5  # seconds
BACK_OFF = 1.0  # seconds until an item is tried again, doubled by each attempt
COMMIT_SHARE = 200  # a worker works so many times as long as its last commit took, before the next
FIRST_COMMIT = 30.0  # seconds until then, where none has been measured


class Job(Protocol):
    """What the pool works on, and who hears of it.

    max_loss: seconds of work that a worker may hold uncommitted; None: what is worked on counts at once.
    stall_timeout: seconds without a word from a worker after which it is given up.
    item_timeout: seconds after which it is given up although it says something.
    attempts: of an item, before it is given up.
    bad_input: errors of an item that leave its worker whole, which has dropped its uncommitted work.
    """

    max_loss: float | None
    stall_timeout: float
    item_timeout: float
    attempts: int
    bad_input: type[Exception]

    def wanted_workers(self) -> int:
        """How many workers to have now."""

    def spawn(self) -> Any:
        """A new actor with methods `describe()`, `prepare()`, `work(task, following)` and, where it commits, `commit()`.

        `describe` answers as soon as the actor has a place, which it may wait for; `prepare` loads what it needs. `work`
        is a generator that tells now and then how far it is; the last it tells is its result. It may begin to
        read the task that is likely to follow, None where there is none; `close()` leaves what was begun.
        """

    def make_task(self, item: str) -> Any:
        """What a worker is told of an item."""

    def on_ready(self, told: Any) -> None:
        """A worker is ready; `told` is what its `describe()` returned."""

    def must_leave(self, told: Any) -> bool:
        """Whether the worker at this place must leave its node."""

    def on_removed(self, told: Any, error: Exception | None) -> None:
        """A worker left, or was lost by an error."""

    def on_assigned(self, item: str, by: Any) -> None:
        """A worker, known by its place, was given an item."""

    def on_progress(self, item: str, told: Any) -> None:
        """How far a worker is with an item."""

    def on_done(self, item: str, told: Any) -> None:
        """A worker worked on an item, which may still be lost; `told` is its result."""

    def on_failed(self, item: str, error: Exception) -> None:
        """A worker failed at an item, which may be tried again."""

    def on_lost(self, items: list[str]) -> None:
        """Items that were worked on are lost, and will be worked on again."""

    def on_committed(self, items: list[str], told: Any) -> None:
        """Items are done for good; `told` is what `commit()`, or else `work()`, returned."""


@dataclass
class Worker:
    """One actor: what it does now, and what it has done that does not count yet. Times are monotonic.

    promised: the item that it will have next, unless another has nothing else to do, and may begin to read now.
    """

    actor: Any
    place: Any = None
    doing: str = "describe"
    item: str | None = None
    promised: str | None = None
    told: Any = None
    begun: float = 0.0
    heard: float = 0.0
    uncommitted: list[str] = field(default_factory=list)
    since: float = 0.0
    commit_cost: float = FIRST_COMMIT / COMMIT_SHARE


@dataclass(frozen=True)
class Outcome:
    """What is not done. undone: items nobody came to.  failed: those given up, and each one's last error."""

    undone: list[str]
    failed: dict[str, Exception]


class PoolError(RuntimeError):
    """No worker can be started, or what they do cannot be committed. The message holds the last cause."""


class StalledError(RuntimeError):
    """A worker did not say a word for too long."""


class OverdueError(RuntimeError):
    """A worker took too long over an item, though it said something."""


LOST = (RayActorError, OutOfMemoryError, GetTimeoutError, StalledError)  # errors of a worker, not of what it ran


def run(items: Iterable[str], job: Job, stop: Callable[[], bool], tick: Callable[[], None]) -> Outcome:
    """Work on every item, with as many workers as the job has places for, until `stop()` is true.

    What was done is committed in any case. Raises PoolError, or a commit's `bad_input`.
    """
    return _Pool(items, job, stop, tick).run()


class _Pool:
    def __init__(self, items: Iterable[str], job: Job, stop: Callable[[], bool], tick: Callable[[], None]) -> None:
        self.queue, self.job, self.stop, self.tick = OrderedDict.fromkeys(items), job, stop, tick
        self.later: list[tuple[float, str]] = []  # items to try again, and when
        self.calls: dict[Any, Worker] = {}  # pending call → its worker
        self.idle: list[Worker] = []
        self.attempts: Counter[str] = Counter()
        self.promised: set[str | None] = set()
        self.suspects: set[str | None] = set()  # a worker was lost that had them in hand, and others
        self.troubles: Counter[str] = Counter()  # of starting workers and of committing, one after the other
        self.failed: dict[str, Exception] = {}
        self.error: Exception | None = None

    def run(self) -> Outcome:
        try:
            while True:
                self.assign()
                busy = [w for w in self.calls.values() if w.doing not in STARTING]
                if not busy and (not (self.queue or self.later) or self.stopping()):
                    break
                ready, _ = ray.wait(list(self.calls), num_returns=1, timeout=TICK) if self.calls else ([], [])
                if not self.calls:
                    time.sleep(TICK)
                for call in ready:
                    self.collect(call)
                self.watch()
                self.tick()
        finally:
            for worker in (*self.calls.values(), *self.idle):
                ray.kill(worker.actor)
        if self.error is not None:
            raise self.error
        return Outcome([*self.queue, *(item for _, item in self.later)], self.failed)

    def stopping(self) -> bool:
        return self.error is not None or self.stop()

    def assign(self) -> None:
        """Give every idle worker its next call, and start the workers that are missing."""
        now = time.monotonic()
        self.queue.update((item, None) for due, item in self.later if due <= now)
        self.later = [(due, item) for due, item in self.later if due > now]
        working, self.idle = self.idle, []
        for worker in working:
            leaving = self.job.must_leave(worker.place)
            item = self.choose(worker)
            alone = item is not None and self.risky(item)  # must not take others' work with it
            due = worker.uncommitted and now - worker.since > interval(self.job, worker.commit_cost)
            if worker.uncommitted and (due or leaving or alone or item is None or self.stopping()):
                self.call(worker, "commit")
            elif leaving:
                self.promise(worker, None)
                ray.kill(worker.actor)
                self.job.on_removed(worker.place, None)
            elif item is not None and not self.stopping():
                self.work(worker, item)
            else:
                self.idle.append(worker)
        if not self.stopping():
            busy = sum(worker.doing not in STARTING for worker in self.calls.values())
            wanted = min(self.job.wanted_workers(), busy + len(self.idle) + len(self.queue))
            for _ in range(wanted - len(self.calls) - len(self.idle)):
                self.call(Worker(self.job.spawn()), "describe")

    def choose(self, worker: Worker) -> str | None:
        """What a worker is to do next: what it was promised, or what is promised to none, or else what is left."""
        if worker.promised in self.queue:
            return worker.promised
        return next((i for i in self.queue if i not in self.promised), next(iter(self.queue), None))

    def risky(self, item: str) -> bool:
        return self.attempts[item] > 0 or item in self.suspects

    def promise(self, worker: Worker, item: str | None) -> None:
        """Promise a worker an item, in the place of the one before."""
        self.promised.discard(worker.promised)
        self.promised.add(item)
        worker.promised = item

    def work(self, worker: Worker, item: str) -> None:
        """Have a worker work on an item, and promise it another; none to go with one that is risky."""
        self.promise(worker, None)
        del self.queue[item]
        if not self.risky(item):
            free = (i for i in self.queue if i not in self.promised and not self.risky(i))
            self.promise(worker, next(free, None))
        self.job.on_assigned(item, worker.place)
        following = None if worker.promised is None else self.job.make_task(worker.promised)
        self.call(worker, "work", item, self.job.make_task(item), following)

    def call(self, worker: Worker, method: str, item: str | None = None, *arguments: Any) -> None:
        worker.doing, worker.item, worker.told = method, item, None
        worker.begun = worker.heard = time.monotonic()
        options = {"num_returns": "streaming"} if item is not None else {}
        self.calls[getattr(worker.actor, method).options(**options).remote(*arguments)] = worker

    def collect(self, call: Any) -> None:
        """Take what a call has to tell; its worker is idle again once it is through."""
        worker = self.calls.pop(call)
        worker.heard = time.monotonic()
        try:
            if isinstance(call, ObjectRefGenerator):
                try:
                    worker.told = ray.get(next(call), timeout=60)
                except StopIteration:
                    pass
                else:
                    self.calls[call] = worker
                    self.job.on_progress(str(worker.item), worker.told)
                    return
            else:
                worker.told = ray.get(call, timeout=60)
        except (*LOST, RayTaskError, self.job.bad_input) as error:
            self.fail(worker, plain(error))
        else:
            self.take(worker, worker.told)
            if worker.doing == "describe":
                self.call(worker, "prepare")
            else:
                self.idle.append(worker)

    def watch(self) -> None:
        """Give up workers that have not said a word for too long, but those that may be waiting for a place."""
        now = time.monotonic()
        for call, worker in list(self.calls.items()):
            if worker.doing != "describe" and now - worker.heard > self.job.stall_timeout:
                del self.calls[call]
                self.fail(worker, StalledError(f"no progress for {self.job.stall_timeout:.0f} s"))
            elif worker.item is not None and now - worker.begun > self.job.item_timeout:
                del self.calls[call]
                self.fail(worker, OverdueError(f"not done after {self.job.item_timeout:.0f} s"))

    def take(self, worker: Worker, result: Any) -> None:
        now = time.monotonic()
        if worker.doing == "describe":
            worker.place = result
        elif worker.doing == "prepare":
            self.troubles["be started"] = 0
            self.job.on_ready(worker.place)
        elif worker.doing == "commit":
            self.troubles["commit"] = 0
            worker.commit_cost = now - worker.begun
            self.job.on_committed(worker.uncommitted, result)
            worker.uncommitted = []
        elif worker.item is not None:
            self.job.on_done(worker.item, result)
            if self.job.max_loss is None:
                self.job.on_committed([worker.item], result)
            else:
                if not worker.uncommitted:
                    worker.since = worker.begun
                worker.uncommitted.append(worker.item)

    def fail(self, worker: Worker, error: Exception) -> None:
        """A call failed: the worker's uncommitted items go back to the queue, its item is tried again later."""
        blamed = self.blamed(worker, error)
        for item in worker.uncommitted:
            self.queue[item] = None
            self.queue.move_to_end(item, last=False)
        self.job.on_lost(worker.uncommitted)
        worker.uncommitted = []
        if worker.item is not None:
            self.job.on_failed(worker.item, error)
            self.retry(worker.item, blamed, error)
        elif isinstance(error, self.job.bad_input):
            self.error = self.error or error
        else:
            what = "be started" if worker.doing in STARTING else "commit"
            self.troubles[what] += 1
            if self.troubles[what] >= TROUBLES and self.error is None:
                self.error = PoolError(f"workers cannot {what}; the last time: {error}")
        if worker.item is not None and isinstance(error, self.job.bad_input):
            self.idle.append(worker)
        else:  # a commit that it may still finish is ignored
            self.promise(worker, None)
            ray.kill(worker.actor)
            if worker.doing not in STARTING:
                self.job.on_removed(worker.place, error)

    def blamed(self, worker: Worker, error: Exception) -> bool:
        """Whether it is surely for its item that a worker failed.

        One that was lost may have been by the item that it was promised: both are tried again, each by itself.
        """
        if not isinstance(error, LOST):
            return True
        if getattr(error, "preempted", False):  # by the node's owner, whatever was on it
            return False
        self.suspects |= {worker.item, worker.promised}
        return worker.promised is None

    def retry(self, item: str, blamed: bool, error: Exception) -> None:
        self.attempts[item] += blamed
        if self.attempts[item] < self.job.attempts:
            self.later.append((time.monotonic() + BACK_OFF * 2 ** self.attempts[item], item))
        else:
            self.failed[item] = error


def interval(job: Job, commit_cost: float) -> float:
    """Seconds between a worker's commits: so many that these cost little, and no more than may be lost."""
    return min(job.max_loss or 0.0, COMMIT_SHARE * commit_cost)


def plain(error: Exception) -> Exception:
    """The worker's own error, without Ray's wrapping."""
    return error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, Exception) else error


def alone(items: Iterable[str], job: Job, worker: Any, stop: Callable[[], bool], tick: Callable[[], None]) -> Outcome:
    """As `run`, by one worker in this process, without Ray."""
    queue, uncommitted, since = deque(items), list[str](), 0.0
    attempts, failed = Counter[str](), dict[str, Exception]()
    place = worker.describe()
    worker.prepare()
    job.on_ready(place)
    commit_cost = FIRST_COMMIT / COMMIT_SHARE

    def commit() -> None:
        nonlocal commit_cost
        if uncommitted:
            begun = time.monotonic()
            part = worker.commit()
            commit_cost = time.monotonic() - begun
            job.on_committed(list(uncommitted), part)
            uncommitted.clear()

    try:
        while queue and not stop():
            item = queue.popleft()
            if attempts[item]:
                commit()
            job.on_assigned(item, place)
            if not uncommitted:
                since = time.monotonic()
            told = None
            try:
                following = job.make_task(queue[0]) if queue and not attempts[queue[0]] else None
                for told in worker.work(job.make_task(item), following):
                    job.on_progress(item, told)
                    tick()
            except job.bad_input as error:
                queue.extendleft(uncommitted)
                job.on_lost(list(uncommitted))
                uncommitted.clear()
                job.on_failed(item, error)
                attempts[item] += 1
                if attempts[item] < job.attempts:
                    queue.append(item)
                    pause(BACK_OFF * 2 ** attempts[item], TICK, stop)
                else:
                    failed[item] = error
                continue
            job.on_done(item, told)
            if job.max_loss is None:
                job.on_committed([item], told)
            else:
                uncommitted.append(item)
                if time.monotonic() - since > interval(job, commit_cost):
                    commit()
            tick()
        commit()
    finally:
        worker.close()
    return Outcome(list(queue), failed)
