"""Signals to the program: what the second one ends, and that no process is left running."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ray_jobs.runs import OPTIONS, wait_until

ROOT = Path(__file__).parents[2]
# A job whose only shard never yields a byte; a thread reads it, and the main thread waits for the thread.
BLOCKED = """
import sys, threading
from ray_jobs.engine.signals import Signals, end_process, stop_signals
from ray_jobs.data.byte_streams import open_stream

Signals.end = staticmethod(end_process)
def read():
    with open_stream("pipe:sleep 777; true") as stream:
        stream.read()
with stop_signals():
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    print("begun", flush=True)
    reader.join()
"""


def is_running(command: str, session: int) -> bool:
    """Return whether a process of a session has this command line."""
    listed = subprocess.run(["ps", "-o", "args=", "-s", str(session)], capture_output=True, text=True, check=False)
    return command in listed.stdout


def heed_signals() -> None:
    """Undo the ignoring of signals that this process has inherited, for example from `nohup`."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def blocked_job() -> Iterator[subprocess.Popen[str]]:
    """A job that is blocked in reading a shard, in a session of its own."""
    job = subprocess.Popen(
        [sys.executable, "-c", BLOCKED],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_signals,
    )
    with job:
        assert job.stdout is not None
        assert job.stdout.readline() == "begun\n"
        wait_until(lambda: is_running("sleep 777", job.pid))
        yield job
        job.kill()


@pytest.mark.full
def test_second_signal_ends_a_blocked_job_and_its_pipe(blocked_job: subprocess.Popen[str]) -> None:
    blocked_job.send_signal(signal.SIGINT)
    assert_alive(blocked_job)
    blocked_job.send_signal(signal.SIGINT)
    _, errors = blocked_job.communicate(timeout=60)
    assert blocked_job.returncode == 3
    assert errors.count("patternnet: ") == 1
    wait_until(lambda: not is_running("sleep 777", blocked_job.pid))


@pytest.mark.full
def test_second_sighup_lets_the_job_commit_because_a_closed_terminal_sends_it_twice(
    blocked_job: subprocess.Popen[str],
) -> None:
    for _ in range(2):
        blocked_job.send_signal(signal.SIGHUP)
        assert_alive(blocked_job)
    blocked_job.send_signal(signal.SIGTERM)
    blocked_job.communicate(timeout=60)
    assert blocked_job.returncode == 3


def assert_alive(job: subprocess.Popen[str]) -> None:
    """Assert that a job outlives a signal for a moment."""
    time.sleep(0.2)
    assert job.poll() is None


@pytest.mark.ray
def test_signal_while_ray_starts_stops_with_status_3_and_leaves_no_process(
    tmp_path: Path, shards: list[str], model_spec: str
) -> None:
    # Ray interrupted halfway aborts the process, or leaves some of its own.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # the names of sockets in it must be short
        command = [sys.executable, "-m", "ray_jobs", "fit", "--model", model_spec, "--shards", shards[0]]
        job = subprocess.Popen(
            [*command, "--workers", "1", "--out", str(tmp_path / "run"), *OPTIONS],
            cwd=ROOT,
            env={**os.environ, "RAY_TMPDIR": folder},
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heed_signals,
        )
        with job:
            wait_until(lambda: folder in running_commands("gcs_server"))
            job.send_signal(signal.SIGTERM)
            _, errors = job.communicate(timeout=300)
        assert job.returncode == 3
        assert errors.startswith("patternnet: interrupted")
        assert errors.count("\n") == 1
        wait_until(lambda: folder not in running_commands(folder))


def running_commands(text: str) -> str:
    """Return the command lines, with this text, of all processes."""
    listed = subprocess.run(["ps", "-ww", "-eo", "args="], capture_output=True, text=True, check=True).stdout
    return "\n".join(line for line in listed.splitlines() if text in line)
