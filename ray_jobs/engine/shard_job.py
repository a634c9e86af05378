"""What the driver's side of every job over shards shares: its workers, its pool, its progress."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from patterns import UserError
from ray_jobs.config import Resources
from ray_jobs.data.samples import Rejected
from ray_jobs.engine import metrics, worker_pool
from ray_jobs.engine.progress import AtWork, Reporter
from ray_jobs.engine.ray_session import draining, make_worker_options
from ray_jobs.engine.shard_worker import TELL_EVERY, ShardReport, WorkerInfo, WorkerResources
from ray_jobs.engine.signals import StoppedShortError, stop_signals
from ray_jobs.runs.lease import Heartbeat

LOOK_EVERY = 5.0  # seconds between two looks at the cluster's nodes
SHOW_EVERY = 0.5  # seconds between two looks at how far the job is
JUDGED = 100  # samples before a running job is stopped because most are rejected; at its end all jobs are judged


def require_enough_samples(
    folder: str, samples: int, refused: int, example: Callable[[], Rejected], allowed: float
) -> None:
    """End a job that used too few of its samples.

    Args:
        folder: The run's folder.
        samples: How many samples were used.
        refused: How many were rejected.
        example: Returns the first of the rejected samples.
        allowed: The largest fraction of rejected samples.

    Raises:
        UserError: If samples were rejected, and none was used or more than the allowed fraction rejected.
    """
    if not refused or (samples and refused <= allowed * (samples + refused)):
        return
    first = example()
    because = f"{first.key}: {first.reason}"
    if not samples:
        what = f"none of the {refused} samples can be used; {because}"
        raise UserError(first.shard, what, "Fix the data, then choose another --out.")
    what = f"{refused} of {samples + refused} samples were rejected; {first.shard}, {because}"
    raise UserError(folder, what, "Fix the data and choose another --out, or allow more by --max-bad-fraction.")


class ShardJob:
    """The driver's side of a job.

    missing: shards that the job goes on without, and why.
    """

    bad_input: type[Exception] = UserError

    def __init__(
        self,
        name: str,
        heartbeat: Heartbeat,
        shards: Sequence[str],
        left: list[str],
        resources: Resources,
        max_loss: float | None,
    ) -> None:
        self.name, self.heartbeat, self.folder = name, heartbeat, str(heartbeat.run.folder)
        self.remaining, self.resources, self.max_loss = left, resources, max_loss
        self.stall_timeout = max(resources.stall_timeout, 2 * TELL_EVERY)  # one that works is no longer silent
        self.item_timeout = resources.shard_timeout
        self.attempts = 1 + resources.retries
        self.missing: dict[str, str] = {}
        self.stop_reason = ""  # why the job ends early, where it does
        done = len(shards) - len(left)
        self.reporter = Reporter(name, self.folder, len(shards), done, as_json=resources.log == "json")
        self.first_ready = float("inf")
        self.at_work: dict[str, AtWork] = {}
        self.ticked = -float("inf")
        self.looked, self.found, self.leavers = -float("inf"), 0, frozenset[str]()

    def run(self, worker: type, *arguments: object) -> None:
        """Work on what is left with workers made from these arguments and their share of the machine.

        Raises StoppedShortError where a signal came or more shards failed than may, after all else was committed.
        """
        if not self.remaining:
            return
        self.arguments = arguments
        with stop_signals() as stop:

            def over() -> bool:
                return stop() or bool(self.stop_reason) or self.too_many_rejected()

            try:
                if self.resources.workers == 0:
                    outcome = worker_pool.alone(
                        self.remaining, self, worker(*arguments, WorkerResources()), over, self.tick
                    )
                else:
                    self.options = make_worker_options(self.resources)
                    self.actor: Any = ray.remote(worker)
                    outcome = worker_pool.run(self.remaining, self, over, self.tick)
            finally:
                self.reporter.close()
                self.heartbeat.told = self.reporter.told()
        self.judge(outcome)
        self.show()  # that nothing is left

    def judge(self, outcome: worker_pool.Outcome) -> None:
        """Go on without what is missing, or say why not."""
        self.missing = {shard: " ".join(str(error).split()) for shard, error in outcome.failed.items()}
        for shard, reason in self.missing.items():
            self.reporter.log(reason if shard in reason else f"{shard}: {reason}", shard=shard)
        if self.too_many_rejected():
            counts = self.reporter.counts
            what = f"{counts.refused} of {counts.refused + counts.samples} samples were rejected{self.describe_rejection()}"
            raise UserError(self.folder, what, "Fix the data, or allow more by --max-bad-fraction.")
        if len(self.missing) == self.reporter.total:  # nothing at all to go on with
            raise next(iter(outcome.failed.values()))
        if outcome.undone and not self.stop_reason:
            what = f"stopped with {len(outcome.undone)} of {self.reporter.total} shards undone"
            raise StoppedShortError(f"{what}; the same command goes on where this one ended")
        if len(self.missing) > self.resources.max_bad_shards:
            raise StoppedShortError(
                f"{len(self.missing)} of {self.reporter.total} shards cannot be used, {next(iter(self.missing))} the "
                "first. Mend them and give the same command again, or go on without them "
                f"by --max-bad-shards {len(self.missing)}"
            )

    def too_many_rejected(self) -> bool:
        """Whether too many samples were rejected, of at least JUDGED."""
        counts = self.reporter.counts
        seen = counts.samples + counts.refused
        return seen >= JUDGED and counts.refused > self.resources.max_bad_fraction * seen

    def describe_rejection(self) -> str:
        """One of the refused samples and why, to be said of them all; or nothing."""
        return ""

    def wanted_workers(self) -> int:
        self.look()
        return min(max(self.found, self.resources.min_workers), self.resources.workers or sys.maxsize)

    def must_leave(self, told: WorkerInfo) -> bool:
        self.look()
        return told.node in self.leavers

    def look(self) -> None:
        """See now and then what the cluster has."""
        if self.resources.workers != 0 and time.monotonic() - self.looked > LOOK_EVERY:
            self.found, self.leavers, self.looked = places(self.options), draining(), time.monotonic()

    def spawn(self) -> Any:
        share = WorkerResources(self.options["num_cpus"], self.options["num_gpus"])
        return self.actor.options(**self.options).remote(*self.arguments, share)

    def make_task(self, item: str) -> Any:
        """What a worker is told of an item."""
        raise NotImplementedError

    def on_ready(self, told: WorkerInfo) -> None:
        now = time.monotonic()
        self.first_ready = min(self.first_ready, now)
        self.reporter.workers[told] = AtWork(told.name, now)
        self.reporter.log(str(told), worker=told.name)

    def on_removed(self, told: WorkerInfo, error: Exception | None) -> None:
        del self.reporter.workers[told]
        reason = "left its node" if error is None else " ".join(str(error).split())
        self.reporter.log(f"{told.name} is gone: {reason}", worker=told.name)
        self.count("lost_workers", error is not None, told.name)

    def on_assigned(self, item: str, by: WorkerInfo) -> None:
        work = self.at_work[item] = self.reporter.workers[by]
        work.shard, work.shard_since, work.shard_samples, work.shard_waited = item, time.monotonic(), 0, 0.0

    def on_progress(self, item: str, told: ShardReport) -> None:
        work = self.at_work[item]
        more = told.samples - work.shard_samples
        self.reporter.counts.samples += more
        work.samples += more
        waited = told.waited - work.shard_waited
        work.waited += waited
        self.count("samples", more, work.name)  # at once, or a job of long shards would look stalled
        self.count("waiting_seconds", waited, work.name)
        work.shard_samples, work.shard_waited = told.samples, told.waited

    def on_done(self, item: str, told: ShardReport) -> None:
        work = self.at_work.pop(item)
        work.shard = None
        self.reporter.counts.shards += 1
        self.reporter.counts.refused += told.refused
        for name, value in (("refused", told.refused), ("batches", told.batches), ("shards", 1)):
            self.count(name, value, work.name)

    def on_failed(self, item: str, error: Exception) -> None:
        work = self.at_work.pop(item)
        work.shard = None
        self.reporter.log(f"{item} failed: {' '.join(str(error).split())}", shard=item, worker=work.name)
        self.count("failures", 1, work.name)

    def on_lost(self, items: list[str]) -> None:
        self.reporter.counts.shards -= len(items)

    def on_committed(self, items: list[str], told: Any) -> None:
        """Items are done for good."""
        self.count("commits", 1)

    def count(self, name: str, value: float, worker: str = "") -> None:
        metrics.count(name, value, self.folder, self.name, worker)

    def show(self) -> None:
        """Tell Prometheus how far the job is: again and again, for Ray forgets a gauge 20 s after it was set."""
        counts = self.reporter.counts
        left = 0 if self.stop_reason else self.reporter.total - counts.shards - len(self.missing)
        for name, value in (("shards_left", left), ("workers", len(self.reporter.workers))):
            metrics.show(name, value, self.folder, self.name)

    def tick(self) -> None:
        """Show how far the job is; not at every word of every worker, which may be thousands."""
        if time.monotonic() - self.ticked > SHOW_EVERY:
            self.reporter.tick()
            self.heartbeat.told = self.reporter.told()
            self.show()
            self.ticked = time.monotonic()
