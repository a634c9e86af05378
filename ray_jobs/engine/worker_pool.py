"""A pool that hands out items to workers, one item per worker at a time, and replaces the workers that are lost.

An item is done only when its work is committed. If a worker is lost, its uncommitted items return to the queue. Ray's
own restarts and retries are off, because they would repeat a method on an actor whose state is gone.
"""

import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayTaskError

from ray_jobs.config.timing import PRODUCTION, Timing
from ray_jobs.engine import worker_backends
from ray_jobs.engine.pool_job import Job
from ray_jobs.engine.worker_backends import Backend, unwrap
from ray_jobs.io.pauses import find_pause

MAX_TROUBLES = 3  # consecutive failures to start a worker, or to commit, after which the pool gives up
STARTING = ("describe", "prepare")


class StalledError(RuntimeError):
    """A worker exceeded the stall timeout: it did not report for too long."""


class OverdueError(RuntimeError):
    """A worker took too long for an item, although it reported progress."""


class PoolError(RuntimeError):
    """No worker can be started, or no work can be committed. The message holds the last cause."""


LOST = (*worker_backends.LOST, StalledError)  # errors of a worker, not of the method that it ran


@dataclass(eq=False)
class Worker:
    """A worker's state. Times are monotonic.

    Attributes:
        handle: The backend's handle.
        commit_cost: Seconds that its last commit took.
        description: What its `describe` returned.
        placed: When `describe` returned, so that the worker had its place.
        method: The method that it runs now, or ran last.
        item: The item that it works on.
        promised: The item that it will get next and may already read, unless another worker has nothing else to do.
        answer: Its last report of the item.
        called: When the current call began.
        answered: When the current call last gave an answer.
        uncommitted: Items that it has done and not committed.
        uncommitted_since: When the work on the first of these began.
        resting_until: When it may get its next item, because a server refused its last one.
    """

    handle: Any
    commit_cost: float
    description: Any = None
    placed: float = 0.0
    method: str = "describe"
    item: str | None = None
    promised: str | None = None
    answer: Any = None
    called: float = 0.0
    answered: float = 0.0
    uncommitted: list[str] = field(default_factory=list)
    uncommitted_since: float = 0.0
    resting_until: float = 0.0

    @property
    def starting(self) -> bool:
        """Whether the worker is still starting: its method is `describe` or `prepare`."""
        return self.method in STARTING


@dataclass(frozen=True)
class Outcome:
    """The items that are not done.

    Attributes:
        undone: Items that the pool did not come to before it was stopped.
        failed: Items that were given up, with the last error of each.
    """

    undone: list[str]
    failed: dict[str, Exception]


def run(
    items: Iterable[str],
    job: Job,
    backend: Backend,
    stop: Callable[[], bool],
    tick: Callable[[], None],
    timing: Timing = PRODUCTION,
) -> Outcome:
    """Work on all items with as many workers as the job wants. All finished work is committed, also after a stop.

    Args:
        items: Names of the items; the order is that of the work.
        job: The job.
        backend: Where workers run.
        stop: Returns whether to end early. It is asked at least every `timing.poll` seconds unless a method of a
            worker runs in this process.
        tick: Called after every answer of a worker, and every `timing.poll` seconds.
        timing: Intervals.

    Returns:
        The items that are not done.

    Raises:
        PoolError: If no worker can be started, or no work can be committed.
        Exception: An error of type `job.bad_input` of a commit or of a worker's start.
    """
    return _Pool(items, job, backend, stop, tick, timing).run()


class _Pool:
    """The state of one call of `run`: the queue, the workers and their pending calls.

    Each turn of `run` gives the idle workers their next calls, processes the answers that have come, and replaces the
    workers that exceed a timeout. While a worker works on an item, it may already read a second one, the *promised*
    item. Other workers take a promised item only if no other item is left.
    """

    def __init__(
        self,
        items: Iterable[str],
        job: Job,
        backend: Backend,
        stop: Callable[[], bool],
        tick: Callable[[], None],
        timing: Timing,
    ) -> None:
        self.queue, self.job, self.backend = OrderedDict.fromkeys(items), job, backend
        self.stop, self.tick, self.timing = stop, tick, timing
        self.retries: list[tuple[float, str]] = []  # when to try an item again
        self.workers: list[Worker] = []
        self.calls: dict[Any, Worker] = {}  # pending calls
        self.idle: list[Worker] = []
        self.attempts: Counter[str] = Counter()
        self.put_offs: Counter[str] = Counter()  # failures that are no attempts, because a server was busy
        self.waited: defaultdict[str, float] = defaultdict(float)  # seconds of the pauses after these
        self.promised: set[str | None] = set()
        self.suspects: set[str | None] = set()  # items that a lost worker had, together with others
        self.troubles: Counter[str] = Counter()  # consecutive failures, by what failed
        self.failed: dict[str, Exception] = {}
        self.error: Exception | None = None

    def run(self) -> Outcome:
        try:
            while True:
                self.assign()
                busy = any(not worker.starting for worker in self.calls.values())
                if not busy and (self.stopping() or not (self.queue or self.retries)):
                    break
                self.collect_answers()
                self.check_timeouts()
                self.tick()
        finally:
            calling = set(map(id, self.calls.values()))
            for worker in self.workers:
                self.note_release(worker)
                end = self.backend.kill if id(worker) in calling else self.backend.release
                end(worker.handle)
        if self.error is not None:
            raise self.error
        return Outcome([*self.queue, *(item for _, item in self.retries)], self.failed)

    def stopping(self) -> bool:
        return self.error is not None or self.stop()

    def assign(self) -> None:
        """Give every idle worker its next call, and start the workers that are missing."""
        now = time.monotonic()
        self.queue.update((item, None) for due, item in self.retries if due <= now)
        self.retries = [(due, item) for due, item in self.retries if due > now]
        idle, self.idle = self.idle, []
        for worker in idle:
            leaving = self.job.must_leave(worker.description)
            item = self.choose_item(worker)
            if worker.uncommitted and (leaving or self.commit_due(worker, item, now)):
                self.call(worker, "commit")
            elif leaving:
                self.remove(worker)
                self.job.on_removed(worker.description, None)
            elif item is not None and not self.stopping():
                self.assign_item(worker, item)
            else:
                self.idle.append(worker)
        if not self.stopping():
            ready = len(self.workers) - sum(worker.starting for worker in self.calls.values())
            for _ in range(min(self.job.wanted_workers(), ready + len(self.queue)) - len(self.workers)):
                worker = Worker(self.backend.spawn(), self.timing.first_commit / self.timing.commit_ratio)
                self.workers.append(worker)
                self.call(worker, "describe")

    def commit_due(self, worker: Worker, item: str | None, now: float) -> bool:
        """Return whether an idle worker commits before it works on an item.

        A risky item is preceded by a commit, so that its failure loses no work on other items.
        """
        interval = min(self.job.max_loss or 0.0, self.timing.commit_ratio * worker.commit_cost)
        overdue = now - worker.uncommitted_since > interval
        return overdue or item is None or self.is_risky(item) or self.stopping()

    def choose_item(self, worker: Worker) -> str | None:
        """Return the next item of a worker: its promised one, else one that is promised to no worker, else any.

        None if no item is left, or the worker rests.
        """
        if time.monotonic() < worker.resting_until:
            return None
        if worker.promised in self.queue:
            return worker.promised
        return next((i for i in self.queue if i not in self.promised), next(iter(self.queue), None))

    def is_risky(self, item: str) -> bool:
        return self.attempts[item] > 0 or item in self.suspects

    def promise(self, worker: Worker, item: str | None) -> None:
        """Replace the item that is promised to a worker."""
        self.promised.discard(worker.promised)
        self.promised.add(item)
        worker.promised = item

    def assign_item(self, worker: Worker, item: str) -> None:
        """Let a worker work on an item, and promise it another one unless the item is risky."""
        self.promise(worker, None)
        del self.queue[item]
        if not self.is_risky(item):
            free = (i for i in self.queue if i not in self.promised and not self.is_risky(i))
            self.promise(worker, next(free, None))
        self.job.on_assigned(item, worker.description)
        following = None if worker.promised is None else self.job.make_task(worker.promised)
        worker.item = item
        self.call(worker, "work", self.job.make_task(item), following)

    def call(self, worker: Worker, method: str, *arguments: Any) -> None:
        worker.method, worker.answer = method, None
        worker.called = worker.answered = time.monotonic()
        self.calls[self.backend.call(worker.handle, method, *arguments)] = worker

    def collect_answers(self) -> None:
        """Wait for answers, but not beyond the time of the next retry, and process them."""
        now = time.monotonic()
        timeout = min([self.timing.poll, *(max(due - now, 0.0) for due, _ in self.retries)])
        if not self.calls:
            time.sleep(timeout)
            return
        for call in self.backend.wait(list(self.calls), timeout):
            self.collect(call)

    def collect(self, call: Any) -> None:
        """Process one answer of a call. After the last one, the worker is idle."""
        worker = self.calls.pop(call)
        try:
            answer = self.backend.get(call, self.timing.answer_timeout)
        except StopIteration:
            self.finish(worker, worker.answer)
        except (*LOST, RayTaskError, self.job.bad_input) as error:
            self.fail(worker, unwrap(error))
        else:
            worker.answered = time.monotonic()
            if worker.method == "work":
                worker.answer, self.calls[call] = answer, worker
                self.job.on_progress(str(worker.item), answer)
            else:
                self.finish(worker, answer)

    def check_timeouts(self) -> None:
        """Replace workers that have not reported for too long, except those that may be waiting for a free node."""
        now, job = time.monotonic(), self.job
        for call, worker in list(self.calls.items()):
            error: Exception
            if worker.method != "describe" and now - worker.answered > job.stall_timeout:
                error = StalledError(f"no progress for {job.stall_timeout:.0f} s")
            elif worker.item is not None and now - worker.called > job.item_timeout:
                error = OverdueError(f"not done after {job.item_timeout:.0f} s")
            else:
                continue
            del self.calls[call]
            self.fail(worker, error)

    def finish(self, worker: Worker, result: Any) -> None:
        """Process the result of a call that has succeeded."""
        if worker.method == "describe":
            worker.description, worker.placed = result, time.monotonic()
            self.call(worker, "prepare")
            return
        if worker.method == "prepare":
            self.troubles["be started"] = 0
            self.job.on_ready(worker.description)
        elif worker.method == "commit":
            self.troubles["commit"] = 0
            worker.commit_cost = time.monotonic() - worker.called
            self.job.on_committed(worker.uncommitted, result)
            worker.uncommitted = []
        elif worker.item is not None:
            item, worker.item = worker.item, None
            self.job.on_done(item, result)
            if self.job.max_loss is None:
                self.job.on_committed([item], result)
            else:
                if not worker.uncommitted:
                    worker.uncommitted_since = worker.called
                worker.uncommitted.append(item)
        self.idle.append(worker)

    def fail(self, worker: Worker, error: Exception) -> None:
        """Process a failed call: uncommitted items return to the queue, and the worker's item is tried again later."""
        if worker.item is not None and isinstance(error, self.job.busy) and not getattr(error, "begun", True):
            self.put_off(worker, error)
            return
        certain = self.is_certain(worker, error)
        for done in worker.uncommitted:
            self.queue[done] = None
            self.queue.move_to_end(done, last=False)
        self.job.on_lost(worker.uncommitted)
        worker.uncommitted = []
        bad_input, (item, worker.item) = isinstance(error, self.job.bad_input), (worker.item, None)
        if item is not None:
            self.job.on_failed(item, error)
            self.retry(item, certain, error)
        elif bad_input:
            self.error = self.error or error
        else:
            what = "be started" if worker.starting else "commit"
            self.troubles[what] += 1
            if self.troubles[what] >= MAX_TROUBLES and self.error is None:
                self.error = PoolError(f"workers cannot {what}; the last time: {error}")
        if item is not None and bad_input:
            self.idle.append(worker)
        else:  # a commit that it may still finish is ignored
            self.remove(worker)
            if not worker.starting:
                self.job.on_removed(worker.description, error)

    def put_off(self, worker: Worker, error: Exception) -> None:
        """Try an item again later that its worker has not begun.

        The worker stays idle until then and keeps its uncommitted work.
        """
        item, worker.item = str(worker.item), None
        self.job.on_failed(item, error)
        worker.resting_until = self.retry(item, True, error)
        self.idle.append(worker)

    def remove(self, worker: Worker) -> None:
        self.promise(worker, None)
        self.workers.remove(worker)
        self.note_release(worker)
        self.backend.kill(worker.handle)

    def note_release(self, worker: Worker) -> None:
        if worker.description is not None:
            self.job.on_released(worker.description, time.monotonic() - worker.placed)

    def is_certain(self, worker: Worker, error: Exception) -> bool:
        """Return whether it is certain that a worker failed because of its item.

        A worker may also be lost because of the promised item, which it reads ahead. Then both items become suspects,
        and are tried again without another item.
        """
        if not isinstance(error, LOST):
            return True
        if getattr(error, "preempted", False):  # the owner took the node away, whatever ran on it
            return False
        self.suspects |= {worker.item, worker.promised}
        return worker.promised is None

    def retry(self, item: str, certain: bool, error: Exception) -> float:
        """Try an item again later, or give it up, and return when.

        Only failures that are certainly its own count as attempts. A server that asks for fewer requests is asked again
        for `Timing.max_waited` seconds before that counts, and never earlier than it allows.
        """
        now, busy = time.monotonic(), isinstance(error, self.job.busy)
        if busy and getattr(error, "slow_down", False) and self.waited[item] < self.timing.max_waited:
            certain, self.put_offs[item] = False, self.put_offs[item] + 1
        self.attempts[item] += certain
        if self.attempts[item] >= self.job.attempts:
            self.failed[item] = error
            return now
        earlier, first = self.attempts[item] + self.put_offs[item], self.timing.back_off
        asked = getattr(error, "retry_after", 0.0) if busy else 0.0
        delay = find_pause(earlier, asked, first, self.timing.max_pause) if busy else first * 2**earlier
        self.waited[item] += delay
        self.retries.append((now + delay, item))
        return now + delay
