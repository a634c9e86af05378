"""Processes of this machine, read from /proc of Linux."""

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

CHECK_EVERY = 0.05  # seconds between two checks


@dataclass(frozen=True)
class Process:
    """A process that has not ended.

    Attributes:
        pid: Process id.
        parent: Process id of its parent.
        session: Process id of the first process of its session, which its descendants share unless they leave it.
        title: Command line; Ray's workers write the name of their class or function there.
    """

    pid: int
    parent: int
    session: int
    title: str


def processes() -> Iterator[Process]:
    """Yield every process of this machine except those that have ended and were not reaped."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        state, parent, _, session = fields[:4]
        if state not in "ZX":
            yield Process(int(folder.name), int(parent), int(session), title)


def processes_of_session(session: int) -> list[Process]:
    """Return the processes of a session."""
    return [p for p in processes() if p.session == session]


def descendants(ancestor: int) -> list[Process]:
    """Return the descendants of a process."""
    children: dict[int, list[Process]] = {}
    for process in processes():
        children.setdefault(process.parent, []).append(process)
    found, todo = [], [ancestor]
    while todo:
        offspring = children.get(todo.pop(), [])
        found += offspring
        todo += [p.pid for p in offspring]
    return found


def end_session(session: int, except_pid: int = 0) -> None:
    """Send SIGKILL to every process of a session except one, and wait until they have ended."""
    while others := [p.pid for p in processes_of_session(session) if p.pid != except_pid]:
        send(signal.SIGKILL, others)
        time.sleep(CHECK_EVERY)


def send(number: signal.Signals, pids: Iterable[int]) -> None:
    """Send a signal to processes; processes that have ended are skipped."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
