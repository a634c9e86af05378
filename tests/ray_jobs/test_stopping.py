"""Signals to the program itself: what a second one ends, and what is left running."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ray_jobs.engine.signals import pause, stop_signals
from tests.ray_jobs.runs import until

ROOT = Path(__file__).parents[2]
# A job whose only shard never gives a byte, read in a thread while the main thread waits for it.
BLOCKED = """
import sys, threading
from ray_jobs.engine.signals import Signals, end_process, stop_signals
from ray_jobs.data.byte_streams import opened

Signals.end = staticmethod(end_process)
def read():
    with opened("pipe:sleep 777; true") as stream:
        stream.read()
with stop_signals():
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    print("begun", flush=True)
    reader.join()
"""


def running(command: str, group: int) -> bool:
    """Whether a process of a session has this command line."""
    listed = subprocess.run(["ps", "-o", "args=", "-s", str(group)], capture_output=True, text=True, check=False)
    return command in listed.stdout


@pytest.mark.parametrize(("signals", "ends"), [((signal.SIGINT,) * 2, True), ((signal.SIGHUP,) * 2, False)])
def test_a_second_signal_ends_a_job_that_is_blocked_and_its_pipe(signals: tuple[int, ...], ends: bool) -> None:
    job = subprocess.Popen(
        [sys.executable, "-c", BLOCKED],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert job.stdout is not None
    assert job.stdout.readline() == "begun\n"
    until(lambda: running("sleep 777", job.pid))
    for number in signals:
        job.send_signal(number)
        time.sleep(0.2)
    if ends:
        _, errors = job.communicate(timeout=60)
        assert job.returncode == 3
        assert errors.count("patternnet: ") == 1
        until(lambda: not running("sleep 777", job.pid))
    else:  # a terminal that is closed may send it twice: the job still commits
        assert job.poll() is None
        job.send_signal(signal.SIGTERM)
        job.communicate(timeout=60)


def test_a_pause_ends_when_the_job_is_to_stop() -> None:
    with stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        begun = time.monotonic()
        pause(3600, 0.01, stop)
    assert time.monotonic() - begun < 60
