"""Shell commands whose output is read, and how they are ended."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ray_jobs.data.samples import ShardError

PIPES: set[int] = set()  # process groups of the commands that are read from


@contextmanager
def open_pipe(command: str) -> Iterator[Any]:
    """Give the output of a shell command. ShardError if it fails."""
    # A process group of its own: all that the command starts is ended with it, and Ctrl-C, which lets the job end
    # its shards, does not reach it.
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
    """Kill the processes of a group, if any are left."""
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def kill_pipes() -> None:
    """Kill all commands that shards are read from."""
    for leader in list(PIPES):
        kill_group(leader)
