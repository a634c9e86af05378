"""Display of a job's progress: a bar on a terminal, lines in a log."""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ray_jobs.config.timing import PRODUCTION, Timing
from ray_jobs.units import format_duration

MIN_WAITED = 0.05  # fraction of their time that workers wait for data from which it is shown


@dataclass
class WorkerProgress:
    """The progress of a worker since its start, and of its current shard. Times are monotonic.

    Attributes:
        name: Its short name.
        since: When it started.
        samples: Number of its samples, including those of lost work.
        waited: Seconds that it waited for data.
        shard: Its current shard.
        shard_since: When it began with the shard.
        shard_samples: Number of samples of the shard until now.
        shard_waited: Seconds that it waited for the shard's data.
    """

    name: str
    since: float
    samples: int = 0
    waited: float = 0.0
    shard: str | None = None
    shard_since: float = 0.0
    shard_samples: int = 0
    shard_waited: float = 0.0

    def rate(self, now: float) -> float:
        """Return the samples per second since its start."""
        return self.samples / max(now - self.since, 1e-9)


@dataclass
class Counts:
    """The progress of a job.

    Attributes:
        shards: Number of shards that are done.
        samples: Number of samples that went through the model, including those of lost work.
        rejected: Number of samples that were rejected.
    """

    shards: int
    samples: int = 0
    rejected: int = 0


class ProgressReporter:
    """Shows the progress of a job.

    Args:
        name: Name of the job.
        run: The run's folder, for lines that machines read.
        total: Number of shards of the job.
        done: Number of shards that earlier commands did.
        as_json: Whether a log's lines are JSON objects.
        stream: Where to write; by default stderr.
        timing: Intervals of the lines.

    Attributes:
        counts: The job's progress; the job updates it.
        workers: The workers' progress, by their description; the job updates it.
        remark: A text to add to the progress line.
    """

    def __init__(
        self,
        name: str,
        run: str,
        total: int,
        done: int,
        as_json: bool = False,
        stream: TextIO | None = None,
        timing: Timing = PRODUCTION,
    ) -> None:
        self.name, self.run, self.total, self.done_before, self.timing = name, run, total, done, timing
        self.counts, self.workers = Counts(done), dict[Any, WorkerProgress]()
        self.begun = self.last_line = time.monotonic()
        self.stream, self.as_json, self.remark = stream or sys.stderr, as_json, ""
        self.bar: Progress | None = None
        if self.stream.isatty() and not as_json:
            columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("shards, {task.fields[state]}"))
            self.bar = Progress(*columns, console=Console(file=self.stream))
            self.bar.add_task(name, total=total, completed=done, state="starting")
            self.bar.start()

    def describe_state(self) -> str:
        """Return a text with samples, rates, the time left, and the shard that takes longest."""
        counts, now = self.counts, time.monotonic()
        seconds = now - self.begun
        words = [f"{counts.samples} samples", f"{counts.samples / max(seconds, 1e-9):.1f} samples/s"]
        if counts.rejected:
            words.append(f"{counts.rejected} rejected")
        words.append(self.describe_workers(now))
        done = counts.shards - self.done_before
        if done > 0 and counts.shards < self.total:
            words.append(f"{format_duration(seconds / done * (self.total - counts.shards))} left")
        active = [worker for worker in self.workers.values() if worker.shard is not None]
        oldest = min(active, key=lambda worker: worker.shard_since, default=None)
        if oldest is not None and now - oldest.shard_since > self.timing.slow_shard:
            words.append(f"at {oldest.shard} for {format_duration(now - oldest.shard_since)}")
        return ", ".join([*words, *([self.remark] if self.remark else [])])

    def describe_workers(self, now: float) -> str:
        """Return a text with the number of workers, their median rate, the slowest worker, and the waits for data."""
        workers = list(self.workers.values())
        text = "1 worker" if len(workers) == 1 else f"{len(workers)} workers"
        measured = [worker for worker in workers if worker.samples]
        if len(measured) > 1:
            slowest, rates = min(measured, key=lambda w: w.rate(now)), [w.rate(now) for w in measured]
            text += f" of {statistics.median(rates):.1f}/s, the slowest {slowest.name} {min(rates):.1f}/s"
        waited = sum(w.waited for w in workers) / max(sum(now - w.since for w in workers), 1e-9)
        return text + (f", {waited:.0%} waiting for data" if waited > MIN_WAITED else "")

    def tick(self) -> None:
        """Update the bar, or write a line if the last one is old enough."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.counts.shards, state=self.describe_state())
        elif time.monotonic() - self.last_line > self.timing.log_interval:
            self.last_line = time.monotonic()
            self.log_progress()

    def log_progress(self) -> None:
        """Write a line with the job's progress."""
        self.log(f"{self.counts.shards}/{self.total} shards, {self.describe_state()}", samples=self.counts.samples)

    def log(self, text: str, **fields: Any) -> None:
        """Write a line to the log.

        Args:
            text: The message.
            fields: Further fields of a JSON line, such as `worker` and `shard`.
        """
        if self.bar is not None:
            self.bar.console.print(f"{self.name}: {text}", markup=False, highlight=False)
        else:
            write_line(self.stream, self.name, self.run, text, self.as_json, **fields)

    def close(self) -> None:
        """Remove the bar and write a last line."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        self.log_progress()

    def snapshot(self) -> dict[str, Any]:
        """Return the job's progress for progress.json."""
        now = time.monotonic()
        workers = [
            {"worker": w.name, "shard": w.shard, "seconds": round(now - w.shard_since, 1), "rate": w.rate(now)}
            for w in self.workers.values()
        ]
        shards = {"job": self.name, "shards": self.counts.shards, "of": self.total}
        counts = {"samples": self.counts.samples, "rejected": self.counts.rejected}
        return {**shards, **counts, "state": self.describe_state(), "workers": workers}


def write_line(stream: TextIO, job: str, run: str, text: str, as_json: bool, **fields: Any) -> None:
    """Write a line of a job to a log.

    Args:
        stream: The log.
        job: Name of the job.
        run: The run's folder.
        text: The message.
        as_json: Whether the line is a JSON object.
        fields: Further fields of the object.
    """
    if as_json:
        when = datetime.now(UTC).isoformat(timespec="milliseconds")
        print(json.dumps({"time": when, "job": job, "run": run, **fields, "message": text}), file=stream, flush=True)
    else:
        print(f"{job}: {text}", file=stream, flush=True)
