"""What every driver does around its pool: Ray, workers, signals, progress."""

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from patterns import UserError
from patterns.storage import write_json
from ray_jobs import pool
from ray_jobs.config import Resources
from ray_jobs.run import PROGRESS
from ray_jobs.worker import Place, ShardReport, Share

LINE_EVERY = 15.0  # seconds between the progress lines of a log
BEAT_EVERY = 5.0  # seconds between two notes of how far a job is, for `patternnet status`
LOOK_EVERY = 5.0  # seconds between two looks at the cluster's nodes
SLOW = 60.0  # seconds after which a shard is named in the progress line


class StoppedShortError(Exception):
    """The job ended with shards undone. Nothing is lost: the same command goes on."""


@contextlib.contextmanager
def connected(resources: Resources) -> Iterator[None]:
    """Ray: attached to the cluster that is meant, else started here. UserError where it does not answer."""
    if ray.is_initialized():  # a notebook, or a test, that brought its own
        yield
        return
    address = resources.address or os.environ.get("RAY_ADDRESS")
    try:
        # A fresh local Ray even where another runs on this machine: `auto` would attach to a stranger's.
        ray.init(
            address=address or "local",
            logging_level=logging.ERROR,
            log_to_driver=False,
            include_dashboard=None if address else False,
        )
    except (ConnectionError, ValueError) as error:
        raise UserError(
            f"--address {address}", "no Ray cluster answers there", "Check the address and RAY_AUTH_MODE."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def worker_options(resources: Resources) -> dict[str, Any]:
    """What each worker takes. UserError where no node could ever hold one."""
    gpus = resources.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU", 0) for node in nodes()) else 0.0
    options = {"num_cpus": resources.cpus_per_worker, "num_gpus": gpus, "max_restarts": 0, "max_task_retries": 0}
    if not (resources.min_workers or places(options)):
        cpus, most = (max(node.get(name, 0) for node in nodes()) for name in ("CPU", "GPU"))
        raise UserError(
            "--cpus-per-worker --gpus-per-worker",
            f"no node can hold a worker of {options['num_cpus']:g} CPUs and {gpus:g} GPUs; "
            f"the largest has {cpus:g} CPUs and {most:g} GPUs",
            "Ask for less, or add nodes.",
        )
    return options


def places(options: dict[str, Any]) -> int:
    """How many workers the cluster's nodes hold, were nothing else there."""

    def fits(node: dict[str, float]) -> int:
        shares = [node.get(name, 0) / options[need] for name, need in NEEDS.items() if options[need] > 0]
        return int(min(shares, default=1) + 1e-6)

    return sum(map(fits, nodes()))


NEEDS = {"CPU": "num_cpus", "GPU": "num_gpus"}


def nodes() -> list[dict[str, float]]:
    """The resources of each node that is alive and stays."""
    gone = draining()
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in gone]


def draining() -> frozenset[str]:
    """The nodes that are about to be taken away. Ray has no public call for it outside Ray Train."""
    try:
        return frozenset(ray._private.state.state.get_draining_nodes())
    except AttributeError:  # another version of Ray
        return frozenset()


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """SIGTERM and Ctrl-C ask the job to commit and end; a second one ends it at once."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    # After ray.init(), which installs its own.
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Counts:
    """How far a job is: shards worked on, and samples, those of lost work too (for the rate)."""

    shards: int
    samples: int = 0
    refused: int = 0
    workers: int = 0


class Reporter:
    """Shows a job's progress: a bar on a terminal, else a line now and then."""

    def __init__(self, name: str, total: int, done: int, stream: TextIO = sys.stderr) -> None:
        self.name, self.total, self.first = name, total, done
        self.counts = Counts(done)
        self.begun = time.monotonic()
        self.last_line = self.begun
        self.stream = stream
        self.slowest = ""
        self.bar: Progress | None = None
        if stream.isatty():
            console = Console(file=stream)
            columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("shards, {task.fields[state]}"))
            self.bar = Progress(*columns, console=console)
            self.bar.add_task(name, total=total, completed=done, state="starting")
            self.bar.start()

    def state(self) -> str:
        """Samples, rate, time left, in words."""
        counts, seconds = self.counts, time.monotonic() - self.begun
        words = [f"{counts.samples} samples", f"{counts.samples / max(seconds, 1e-9):.1f} samples/s"]
        if counts.refused:
            words.append(f"{counts.refused} refused")
        words.append("1 worker" if counts.workers == 1 else f"{counts.workers} workers")
        done = counts.shards - self.first
        if done > 0 and counts.shards < self.total:
            words.append(f"{spoken(seconds / done * (self.total - counts.shards))} left")
        if self.slowest:
            words.append(f"at {self.slowest}")
        return ", ".join(words)

    def tick(self) -> None:
        """Show how far the job is, if it is time."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.counts.shards, state=self.state())
        elif time.monotonic() - self.last_line > LINE_EVERY:
            self.last_line = time.monotonic()
            self.line(f"{self.counts.shards}/{self.total} shards, {self.state()}")

    def line(self, text: str) -> None:
        """A line for the log."""
        target = self.bar.console.print if self.bar is not None else lambda t: print(t, file=self.stream, flush=True)
        target(f"{self.name}: {text}")

    def close(self) -> None:
        """Take the bar away and leave a last line."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        self.line(f"{self.counts.shards}/{self.total} shards, {self.state()}")


class ShardJob:
    """What the driver's side of every job over shards shares: a worker class, the pool, the progress.

    missing: shards that the job goes on without, and why.
    """

    bad_input: type[Exception] = UserError

    def __init__(
        self,
        name: str,
        run: Path,
        shards: Sequence[str],
        left: list[str],
        resources: Resources,
        commit_after: float | None,
    ) -> None:
        self.progress, self.beat = run / PROGRESS, -float("inf")
        self.left, self.resources, self.commit_after = left, resources, commit_after
        self.stall_timeout, self.attempts = resources.stall_timeout, 1 + resources.retries
        self.missing: dict[str, str] = {}
        self.reporter = Reporter(name, len(shards), len(shards) - len(left))
        self.begun = float("inf")
        self.at_work: dict[str, AtWork] = {}
        self.looked, self.found, self.gone = -float("inf"), 0, frozenset[str]()

    def run(self, worker: type, *arguments: object) -> None:
        """Work on what is left with workers made from these arguments and their share of the machine.

        Raises StoppedShortError where a signal came or more shards failed than may, after all else was committed.
        """
        if not self.left:
            return
        self.options = worker_options(self.resources)
        self.actor: Any = ray.remote(worker)
        self.arguments = arguments
        with stop_signals() as stop:
            try:
                outcome = pool.run(self.left, self, stop, self.tick)
            finally:
                self.reporter.close()
        self.missing = {shard: " ".join(str(error).split()) for shard, error in outcome.failed.items()}
        if len(self.missing) == self.reporter.total:  # nothing at all to go on with
            raise next(iter(outcome.failed.values()))
        for shard, reason in self.missing.items():
            self.reporter.line(reason if shard in reason else f"{shard}: {reason}")
        if outcome.undone:
            what = f"stopped with {len(outcome.undone)} of {self.reporter.total} shards undone"
            raise StoppedShortError(f"{what}; the same command goes on where this one ended")
        if len(self.missing) > self.resources.max_bad_shards:
            raise StoppedShortError(
                f"{len(self.missing)} of {self.reporter.total} shards cannot be used, {next(iter(self.missing))} the "
                "first. Mend them and give the same command again, or go on without them "
                f"by --max-bad-shards {len(self.missing)}"
            )

    def places(self) -> int:
        self.look()
        return min(max(self.found, self.resources.min_workers), self.resources.workers or sys.maxsize)

    def leaving(self, told: Place) -> bool:
        self.look()
        return told.node in self.gone

    def look(self) -> None:
        """See now and then what the cluster has."""
        if time.monotonic() - self.looked > LOOK_EVERY:
            self.found, self.gone, self.looked = places(self.options), draining(), time.monotonic()

    def spawn(self) -> Any:
        share = Share(self.options["num_cpus"], self.options["num_gpus"])
        return self.actor.options(**self.options).remote(*self.arguments, share)

    def started(self, told: Place) -> None:
        self.begun = min(self.begun, time.monotonic())
        self.reporter.counts.workers += 1
        self.reporter.line(str(told))

    def began(self, item: str) -> None:
        self.at_work[item] = AtWork(time.monotonic())

    def heard(self, item: str, told: ShardReport) -> None:
        before = self.at_work[item]
        self.reporter.counts.samples += told.samples - before.samples
        self.at_work[item] = AtWork(before.since, told.samples)

    def worked(self, item: str, told: ShardReport) -> None:
        del self.at_work[item]
        self.reporter.counts.shards += 1
        self.reporter.counts.refused += told.refused

    def lost(self, items: list[str]) -> None:
        self.reporter.counts.shards -= len(items)

    def counts(self, items: list[str], told: Any) -> None:
        """Items are done for good."""

    def tick(self) -> None:
        """Show how far the job is, and the shard that takes longest."""
        now = time.monotonic()
        slow = {item: now - work.since for item, work in self.at_work.items() if now - work.since > SLOW}
        longest = max(slow, key=lambda item: slow[item], default=None)
        self.reporter.slowest = "" if longest is None else f"{longest} for {spoken(slow[longest])}"
        self.reporter.tick()
        if now - self.beat > BEAT_EVERY:
            self.beat = now
            told = {
                "job": self.reporter.name,
                "time": time.time(),
                "shards": self.reporter.counts.shards,
                "of": self.reporter.total,
                "state": self.reporter.state(),
                "at_work": {shard: round(now - work.since, 1) for shard, work in self.at_work.items()},
            }
            write_json(self.progress, told)


@dataclass(frozen=True)
class AtWork:
    """A shard that a worker has: since when, and how many of its samples are done."""

    since: float
    samples: int = 0


def spoken(seconds: float) -> str:
    """A duration as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
