"""Small fits to run, and a comparison of their patterns."""

import os
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ray_jobs.config import FitConfig, ModelConfig
from ray_jobs.engine.shard_job import ShardJob
from ray_jobs.engine.shard_worker import WorkerInfo

PREPROCESSING = {"image_size": 16, "resize": 16, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}

# A shard that is delayed until the file {gate} exists, at most 5 minutes.
LATE = "pipe:for i in $(seq 3000); do [ -e {gate} ] && break; sleep 0.1; done; cat {shard}"
OPTIONS = ["--image-size", "16", "--resize", "16", "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"]


def make_fit_config(spec: str, shards: list[str], out: Path | str, **options: object) -> FitConfig:
    """Return the config of a fit of a model for 16×16 images."""
    return FitConfig(
        model=ModelConfig(spec=spec, **PREPROCESSING), shards=tuple(shards), out=str(out), batch_size=4, **options
    )  # type: ignore[arg-type]


def assert_same_patterns(one: Path, other: Path) -> None:
    """Assert that two runs have the same patterns, to 1e-9 relative for each float32 tensor: almost to the bit."""
    a, b = load_file(one / "patterns.safetensors"), load_file(other / "patterns.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].double() - b[name].double()).norm() <= 1e-9 * a[name].double().norm(), name


def wait_until(holds: Callable[[], object]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def read_command(page: str, heading: str) -> list[str]:
    """Return the words after `patternnet` of the first command below a heading of a page of docs/."""
    text = (Path(__file__).parents[2] / "docs" / page).read_text().partition(f"{heading}\n")[2]
    return shlex.split(text.partition("```console\n")[2].partition("```")[0].replace("\\\n", ""))[1:]


def kill_first_worker(monkeypatch: pytest.MonkeyPatch, after: int) -> list[str]:
    """Kill the first worker of a job over shards once some shards are done.

    Args:
        monkeypatch: Records and kills until it is undone.
        after: The number of shards.

    Returns:
        The shards that are done, in the order in which they are; one may be done twice.
    """
    pids: list[int] = []
    worked: list[str] = []
    started, done = ShardJob.on_ready, ShardJob.on_done

    def record_pid(self: ShardJob, worker: WorkerInfo) -> None:
        pids.append(worker.pid)
        started(self, worker)

    def kill(self: ShardJob, item: str, report: object) -> None:
        worked.append(item)
        done(self, item, report)  # type: ignore[arg-type]
        if len(worked) == after:
            os.kill(pids[0], signal.SIGKILL)

    monkeypatch.setattr(ShardJob, "on_ready", record_pid)
    monkeypatch.setattr(ShardJob, "on_done", kill)
    return worked
