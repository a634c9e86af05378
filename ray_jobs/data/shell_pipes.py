"""Shell commands whose output is read as a shard: start them, and kill their process groups."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ray_jobs.data.samples import ShardError

PIPES: set[int] = set()  # process groups of the running commands


@contextmanager
def open_pipe(command: str) -> Iterator[Any]:
    """Run a shell command and yield its output.

    Raises:
        ShardError: If the command fails.
    """
    # A separate process group: the command's children can be killed with it, and Ctrl-C does not reach it, because
    # the job finishes its shards first.
    process = subprocess.Popen(command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, process_group=0)
    assert process.stdout is not None
    PIPES.add(process.pid)
    try:
        yield process.stdout
        if status := process.wait():
            raise ShardError(f"the command ended with exit status {status}")
    finally:
        process.stdout.close()
        kill_group(process.pid)
        process.wait()
        PIPES.discard(process.pid)


def kill_group(leader: int) -> None:
    """Kill the remaining processes of a group."""
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def kill_pipes() -> None:
    """Kill all running commands that shards are read from."""
    for leader in list(PIPES):
        kill_group(leader)
