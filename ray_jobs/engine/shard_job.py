"""The driver's side of a job over shards: its workers, its pool, its progress."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from patterns import UserError
from ray_jobs.config import Resources
from ray_jobs.data.samples import RejectedSample
from ray_jobs.engine import metrics, worker_pool
from ray_jobs.engine.progress import ProgressReporter, WorkerProgress
from ray_jobs.engine.ray_session import (
    choose_worker_cpus,
    count_worker_slots,
    list_draining_nodes,
    make_worker_options,
)
from ray_jobs.engine.shard_worker import ShardReport, WorkerInfo, WorkerResources
from ray_jobs.engine.signals import StoppedShortError, stop_signals
from ray_jobs.engine.worker_backends import Backend, LocalBackend, RayBackend
from ray_jobs.engine.worker_hosts import pack, release_host, start_host
from ray_jobs.io.refusals import BusyError
from ray_jobs.runs.lease import Heartbeat
from ray_jobs.runs.usage import Usage

MIN_JUDGED = 100  # samples after which a running job may end because too many are rejected; its end judges any number


def require_enough_samples(
    folder: str, samples: int, rejected: int, example: Callable[[], RejectedSample], allowed: float
) -> None:
    """Require that a job could use enough of its samples.

    Args:
        folder: The run's folder.
        samples: Number of samples that were used.
        rejected: Number of samples that were rejected.
        example: Returns the first of the rejected samples.
        allowed: Largest allowed fraction of rejected samples.

    Raises:
        UserError: If samples were rejected, and either no sample was used or more than the allowed fraction rejected.
    """
    if not rejected or (samples and rejected <= allowed * (samples + rejected)):
        return
    first = example()
    if not samples:
        what = f"none of the {rejected} samples can be used; {first.key}: {first.reason}"
        raise UserError(first.shard, what, "Fix the data, then choose another --out.")
    what = f"{rejected} of {samples + rejected} samples were rejected; {first.shard}, {first.key}: {first.reason}"
    remedy = "Fix the data and choose another --out, or allow more by --max-bad-fraction."
    raise UserError(folder, what, remedy, "max_bad_fraction")


class ShardJob:
    """The driver's side of a job; the `Job` of its pool. Subclasses define the tasks and the commits.

    Args:
        name: Name of the job.
        heartbeat: Heartbeat of this driver, which holds the run's lease.
        shards: All shards of the job.
        remaining: The shards that are not done yet, in the order of work.
        resources: What the job takes from the cluster.
        max_loss: Seconds of work that a lost worker may undo; None: a shard counts when a worker is done with it.

    Attributes:
        missing: Shards that the job continues without, and the reason of each.
        stop_reason: Why the job ends before all shards are done; empty if it does not.
        first_ready: When the first worker was ready, in monotonic seconds.
    """

    bad_input: type[Exception] = UserError
    busy: type[Exception] = BusyError

    def __init__(
        self,
        name: str,
        heartbeat: Heartbeat,
        shards: Sequence[str],
        remaining: list[str],
        resources: Resources,
        max_loss: float | None,
    ) -> None:
        self.name, self.heartbeat, self.folder = name, heartbeat, str(heartbeat.run.folder)
        self.remaining, self.resources, self.max_loss, self.timing = remaining, resources, max_loss, resources.timing
        self.local = resources.workers == 0
        # A working worker reports more often than this.
        self.stall_timeout = max(resources.stall_timeout, 2 * self.timing.report_interval)
        # In this process there is no other worker to try the shard.
        self.item_timeout = float("inf") if self.local else resources.shard_timeout
        self.attempts = 1 + resources.retries
        self.missing: dict[str, str] = {}
        self.stop_reason = ""
        done, as_json = len(shards) - len(remaining), resources.log == "json"
        self.reporter = ProgressReporter(name, self.folder, len(shards), done, as_json, timing=self.timing)
        self.first_ready = float("inf")
        self.active: dict[str, WorkerProgress] = {}  # by shard
        self.options: dict[str, Any] = {}  # of Ray actors
        self.displayed = self.queried = -float("inf")
        self.working = False  # whether the pool runs
        self.slots, self.draining_nodes = 0, frozenset[str]()

    def run(self, worker: type, *arguments: object) -> None:
        """Work on the remaining shards.

        Args:
            worker: Class of the workers, a `ShardWorker`.
            arguments: Arguments of the class; `WorkerResources` are added as the last one.

        Raises:
            StoppedShortError: If a signal stopped the job, or more shards failed than allowed. All finished work is
                committed.
            UserError: If too many samples are rejected, or no shard can be used.
        """
        if not self.remaining:
            return
        with stop_signals() as stopped:

            def stop() -> bool:
                return stopped() or bool(self.stop_reason) or self.too_many_rejected()

            self.working = True
            try:
                backend = self.make_backend(worker, *arguments)
                outcome = worker_pool.run(self.remaining, self, backend, stop, self.tick, self.timing)
            finally:
                self.reporter.close()
                self.working = False
                self.heartbeat.progress = self.snapshot()
        self.judge(outcome)
        self.update_gauges()  # nothing is left

    def make_backend(self, worker: type, *arguments: object) -> Backend:
        """Return where workers run: in this process if no workers are wanted, else on Ray."""
        if self.local:
            return LocalBackend(lambda: worker(*arguments, WorkerResources(timing=self.timing)))
        self.options = make_worker_options(self.resources)
        if self.resources.cpus_per_worker is None:
            self.reporter.log(f"{self.options['num_cpus']:g} CPUs per worker; --cpus-per-worker changes it")
        content, digest = pack((worker, *arguments))
        shared = ray.put(content)  # once for all workers: one of the arguments is the model
        del content
        started: dict[Any, dict[str, Any]] = {}  # the options of each host

        def spawn() -> Any:
            resources = WorkerResources(self.options["num_cpus"], self.options["num_gpus"], self.timing)
            host = start_host(self.options)
            started[host] = self.options
            host.start.remote([shared], digest, resources)
            return host

        return RayBackend(spawn, lambda host: release_host(host, started[host]))

    def judge(self, outcome: worker_pool.Outcome) -> None:
        """Note the shards that failed as missing, and raise an error if the job cannot continue without them."""
        self.missing = {shard: " ".join(str(error).split()) for shard, error in outcome.failed.items()}
        for shard, reason in self.missing.items():
            self.reporter.log(reason if shard in reason else f"{shard}: {reason}", shard=shard)
        total = self.reporter.total
        if self.too_many_rejected():
            counts = self.reporter.counts
            what = f"{counts.rejected} of {counts.rejected + counts.samples} samples were rejected"
            remedy = "Fix the data, or allow more by --max-bad-fraction."
            raise UserError(self.folder, what + self.describe_rejection(), remedy, "max_bad_fraction")
        if len(self.missing) == total:
            raise next(iter(outcome.failed.values()))
        if outcome.undone and not self.stop_reason:
            what = f"stopped with {len(outcome.undone)} of {total} shards left"
            raise StoppedShortError(f"{what}; run the same command again to resume")
        if len(self.missing) > self.resources.max_bad_shards:
            raise StoppedShortError(
                f"{len(self.missing)} of {total} shards cannot be used, the first is {next(iter(self.missing))}. "
                "Fix them and run the same command again, or continue without them "
                f"by --max-bad-shards {len(self.missing)}"
            )

    def too_many_rejected(self) -> bool:
        """Return whether at least `MIN_JUDGED` samples were read, and more than the allowed fraction rejected."""
        counts = self.reporter.counts
        read = counts.samples + counts.rejected
        return read >= MIN_JUDGED and counts.rejected > self.resources.max_bad_fraction * read

    def describe_rejection(self) -> str:
        """Return one of the rejected samples and its reason, to end an error message; empty if it is not known."""
        return ""

    def wanted_workers(self) -> int:
        """Return how many workers the cluster has room for, within the job's limits; 1 in this process."""
        if self.local:
            return 1
        self.query_nodes()
        return min(max(self.slots, self.resources.min_workers), self.resources.workers or sys.maxsize)

    def must_leave(self, worker: WorkerInfo) -> bool:
        """Return whether a worker's node is being taken away."""
        self.query_nodes()
        return worker.node in self.draining_nodes

    def query_nodes(self) -> None:
        """Query the cluster's nodes, unless that was done a moment ago."""
        if not self.local and time.monotonic() - self.queried > self.timing.node_interval:
            # A node that has joined may have fewer CPUs for each GPU; the next workers then take no more than that.
            fewer = min(self.options["num_cpus"], choose_worker_cpus(self.resources))
            self.options = self.options | {"num_cpus": fewer}
            self.slots, self.draining_nodes = count_worker_slots(self.options), list_draining_nodes()
            self.queried = time.monotonic()

    def make_task(self, item: str) -> Any:
        """Return the task that a worker gets for a shard."""
        raise NotImplementedError

    def on_ready(self, worker: WorkerInfo) -> None:
        """Show a new worker."""
        now = time.monotonic()
        self.first_ready = min(self.first_ready, now)
        self.reporter.workers[worker] = WorkerProgress(worker.name, now)
        self.reporter.log(str(worker), worker=worker.name)

    def on_removed(self, worker: WorkerInfo, error: Exception | None) -> None:
        """Show that a worker left its node, or was lost by an error."""
        del self.reporter.workers[worker]
        reason = "left its node" if error is None else " ".join(str(error).split())
        self.reporter.log(f"{worker.name} is gone: {reason}", worker=worker.name)
        self.count("lost_workers", error is not None, worker.name)

    def on_released(self, worker: WorkerInfo, seconds: float) -> None:
        """Add the time during which a worker held resources to the usage."""
        self.heartbeat.usage += self.measure_usage(seconds)

    def measure_usage(self, seconds: float) -> Usage:
        """Return the usage of some workers of this job for some seconds."""
        return Usage.of(seconds, self.options.get("num_cpus", 1.0), self.options.get("num_gpus", 0.0))

    def snapshot(self) -> dict[str, Any]:
        """Return the job's progress, with what it and its workers have used until now."""
        now = time.monotonic()
        running = sum(now - worker.since for worker in self.reporter.workers.values()) if self.working else 0.0
        usage = self.heartbeat.usage + self.measure_usage(running)
        return {**self.reporter.snapshot(), "usage": usage.to_json()}

    def on_assigned(self, item: str, worker: WorkerInfo) -> None:
        """Show that a worker begins with a shard."""
        active = self.active[item] = self.reporter.workers[worker]
        active.shard, active.shard_since, active.shard_samples, active.shard_waited = item, time.monotonic(), 0, 0.0

    def on_progress(self, item: str, report: ShardReport) -> None:
        """Count the samples since the last report at once; otherwise a job of long shards would seem to stall."""
        worker = self.active[item]
        samples, waited = report.samples - worker.shard_samples, report.waited - worker.shard_waited
        self.reporter.counts.samples += samples
        worker.samples += samples
        worker.waited += waited
        self.count("samples", samples, worker.name)
        self.count("waiting_seconds", waited, worker.name)
        worker.shard_samples, worker.shard_waited = report.samples, report.waited

    def on_done(self, item: str, report: ShardReport) -> None:
        """Count a shard; it may still be lost."""
        worker = self.active.pop(item)
        worker.shard = None
        self.reporter.counts.shards += 1
        self.reporter.counts.rejected += report.rejected
        for name, value in (("refused", report.rejected), ("batches", report.batches), ("shards", 1)):
            self.count(name, value, worker.name)

    def on_failed(self, item: str, error: Exception) -> None:
        """Show that an attempt at a shard failed."""
        worker = self.active.pop(item)
        worker.shard = None
        put_off = getattr(error, "slow_down", False)
        what = "is put off" if put_off else "failed"
        self.reporter.log(f"{item} {what}: {' '.join(str(error).split())}", shard=item, worker=worker.name)
        self.count("failures", not put_off, worker.name)

    def on_lost(self, items: list[str]) -> None:
        """Take back shards that a lost worker had not committed."""
        self.reporter.counts.shards -= len(items)

    def on_committed(self, items: list[str], result: Any) -> None:
        """Count a commit; its shards are done for good."""
        self.count("commits", 1)

    def count(self, name: str, value: float, worker: str = "") -> None:
        """Add to a Prometheus counter of this job; see `metrics.COUNTERS`."""
        metrics.count(name, value, self.folder, self.name, worker)

    def update_gauges(self) -> None:
        """Set the Prometheus gauges. They are set repeatedly, because Ray drops a gauge 20 s after it was set."""
        counts = self.reporter.counts
        left = 0 if self.stop_reason else self.reporter.total - counts.shards - len(self.missing)
        for name, value in (("shards_left", left), ("workers", len(self.reporter.workers))):
            metrics.set_gauge(name, value, self.folder, self.name)

    def tick(self) -> None:
        """Update the displayed progress and the Prometheus metrics, at most once in `Timing.display_interval`."""
        if time.monotonic() - self.displayed > self.timing.display_interval:
            self.reporter.tick()
            self.heartbeat.progress = self.snapshot()
            self.update_gauges()
            self.displayed = time.monotonic()
