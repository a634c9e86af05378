"""How a job shows how far it is: a bar on a terminal, lines in a log."""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ray_jobs.units import format_duration

LINE_EVERY = 15.0  # seconds between the progress lines of a log
SLOW = 60.0  # seconds after which a shard is named in the progress line


@dataclass
class AtWork:
    """A worker, what it has done since it began, and the shard that it has now. Times are monotonic."""

    name: str
    since: float
    samples: int = 0
    waited: float = 0.0
    shard: str | None = None
    shard_since: float = 0.0
    shard_samples: int = 0
    shard_waited: float = 0.0

    def rate(self, now: float) -> float:
        """Samples a second, those of lost work too."""
        return self.samples / max(now - self.since, 1e-9)


@dataclass
class Counts:
    """How far a job is: shards worked on, and samples, those of lost work too (for the rate)."""

    shards: int
    samples: int = 0
    refused: int = 0


class Reporter:
    """Shows a job's progress.

    run: its folder, for lines that machines read.  as_json: whether a log's lines are JSON objects.
    """

    def __init__(
        self, name: str, run: str, total: int, done: int, as_json: bool = False, stream: TextIO | None = None
    ) -> None:
        self.name, self.run, self.total, self.first = name, run, total, done
        self.counts, self.workers = Counts(done), dict[Any, AtWork]()
        self.begun = self.last_line = time.monotonic()
        self.stream, self.as_json, self.remark = stream or sys.stderr, as_json, ""
        self.bar: Progress | None = None
        if self.stream.isatty() and not as_json:
            columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("shards, {task.fields[state]}"))
            self.bar = Progress(*columns, console=Console(file=self.stream))
            self.bar.add_task(name, total=total, completed=done, state="starting")
            self.bar.start()

    def state(self) -> str:
        """Samples, rates, time left, and what is slow, in words."""
        counts, now = self.counts, time.monotonic()
        seconds = now - self.begun
        words = [f"{counts.samples} samples", f"{counts.samples / max(seconds, 1e-9):.1f} samples/s"]
        if counts.refused:
            words.append(f"{counts.refused} refused")
        words.append(self.describe_workers(now))
        done = counts.shards - self.first
        if done > 0 and counts.shards < self.total:
            words.append(f"{format_duration(seconds / done * (self.total - counts.shards))} left")
        late = [w for w in self.workers.values() if w.shard is not None and now - w.shard_since > SLOW]
        if late:
            longest = min(late, key=lambda worker: worker.shard_since)
            words.append(f"at {longest.shard} for {format_duration(now - longest.shard_since)}")
        return ", ".join([*words, *([self.remark] if self.remark else [])])

    def describe_workers(self, now: float) -> str:
        """How many workers, and how fast each is."""
        workers = list(self.workers.values())
        text = "1 worker" if len(workers) == 1 else f"{len(workers)} workers"
        measured = [w for w in workers if w.samples]
        if len(measured) > 1:
            slowest, rates = min(measured, key=lambda w: w.rate(now)), [w.rate(now) for w in measured]
            text += f" of {statistics.median(rates):.1f}/s, the slowest {slowest.name} {min(rates):.1f}/s"
        waited = sum(w.waited for w in workers) / max(sum(now - w.since for w in workers), 1e-9)
        return text + (f", {waited:.0%} waiting for data" if waited > 0.05 else "")

    def tick(self) -> None:
        """Show how far the job is, if it is time."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.counts.shards, state=self.state())
        elif time.monotonic() - self.last_line > LINE_EVERY:
            self.last_line = time.monotonic()
            self.total_line()

    def total_line(self) -> None:
        self.log(f"{self.counts.shards}/{self.total} shards, {self.state()}", samples=self.counts.samples)

    def log(self, text: str, **about: Any) -> None:
        """A line for the log, with what machines want to know of it: worker, shard, …"""
        if self.as_json:
            when = datetime.now(UTC).isoformat(timespec="milliseconds")
            record = {"time": when, "job": self.name, "run": self.run, **about, "message": text}
            print(json.dumps(record), file=self.stream, flush=True)
        elif self.bar is not None:
            self.bar.console.print(f"{self.name}: {text}", markup=False, highlight=False)
        else:
            print(f"{self.name}: {text}", file=self.stream, flush=True)

    def close(self) -> None:
        """Take the bar away and leave a last line."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        self.total_line()

    def told(self) -> dict[str, Any]:
        """How far the job is, for those who read the run's files."""
        now = time.monotonic()
        workers = [
            {"worker": w.name, "shard": w.shard, "seconds": round(now - w.shard_since, 1), "rate": w.rate(now)}
            for w in self.workers.values()
        ]
        far = {"job": self.name, "shards": self.counts.shards, "of": self.total}
        return {**far, "samples": self.counts.samples, "state": self.state(), "workers": workers}
