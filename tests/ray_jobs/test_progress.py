"""The progress of a job as its log shows it."""

import io
import json
import time

from ray_jobs.config.timing import Timing
from ray_jobs.engine.progress import ProgressReporter, WorkerProgress


def make_reporter(stream: io.StringIO, as_json: bool = False, **timing: float) -> ProgressReporter:
    """Return the reporter of a job with 10 shards, of which an earlier command did 2."""
    return ProgressReporter("fit", "/runs/a", 10, 2, as_json, stream, Timing(**timing))


def test_progress_line_comes_once_per_interval() -> None:
    stream = io.StringIO()
    reporter = make_reporter(stream, log_interval=3600.0)
    for _ in range(3):
        reporter.tick()
    assert stream.getvalue() == ""
    reporter = make_reporter(stream, log_interval=0.0)
    time.sleep(0.001)
    reporter.tick()
    assert stream.getvalue().startswith("fit: 2/10 shards, 0 samples")


def test_state_names_the_slowest_worker_the_oldest_shard_and_the_rejected_samples() -> None:
    reporter, now = make_reporter(io.StringIO(), slow_shard=10.0), time.monotonic()
    reporter.workers = {
        1: WorkerProgress("fast/1", now - 100, samples=1000, shard="young.tar", shard_since=now - 5),
        2: WorkerProgress("slow/2", now - 100, samples=100, waited=50.0, shard="old.tar", shard_since=now - 40),
    }
    reporter.counts.rejected = 7
    state = reporter.describe_state()
    assert "7 rejected" in state
    assert "2 workers" in state
    assert "the slowest slow/2" in state
    assert "25% waiting for data" in state
    assert "at old.tar" in state
    assert "young.tar" not in state


def test_snapshot_holds_what_status_reads() -> None:
    reporter, now = make_reporter(io.StringIO()), time.monotonic()
    reporter.workers = {1: WorkerProgress("here/1", now - 10, samples=50, shard="a.tar", shard_since=now - 5)}
    snapshot = reporter.snapshot()
    assert {name: snapshot[name] for name in ("job", "shards", "of", "samples")} == {
        "job": "fit", "shards": 2, "of": 10, "samples": 0,
    }  # fmt: skip
    (worker,) = snapshot["workers"]
    assert (worker["worker"], worker["shard"]) == ("here/1", "a.tar")
    assert worker["seconds"] >= 5
    assert 0 < worker["rate"] <= 5


def test_json_lines_hold_the_run_the_job_and_further_fields() -> None:
    stream = io.StringIO()
    make_reporter(stream, as_json=True).log("shard failed", shard="a.tar")
    line = json.loads(stream.getvalue())
    assert (line["run"], line["job"], line["shard"], line["message"]) == ("/runs/a", "fit", "a.tar", "shard failed")
