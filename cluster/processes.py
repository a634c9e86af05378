"""What runs on this machine, as Linux's /proc tells it."""

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

LOOK_EVERY = 0.05  # seconds between two looks


@dataclass(frozen=True)
class Process:
    """A process that has not ended. title: its command line; Ray's workers write there what they do.

    session: the process id of the first process of its session, which all its descendants share unless they leave it.
    """

    pid: int
    parent: int
    session: int
    title: str


def processes() -> Iterator[Process]:
    """Every process of this machine but those that have ended and wait to be reaped."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        state, parent, _, session = fields[:4]
        if state not in "ZX":
            yield Process(int(folder.name), int(parent), int(session), title)


def of_session(session: int) -> list[Process]:
    """The processes of a session."""
    return [p for p in processes() if p.session == session]


def below(ancestor: int) -> list[Process]:
    """The descendants of a process."""
    children: dict[int, list[Process]] = {}
    for process in processes():
        children.setdefault(process.parent, []).append(process)
    found, todo = [], [ancestor]
    while todo:
        offspring = children.get(todo.pop(), [])
        found += offspring
        todo += [p.pid for p in offspring]
    return found


def end_session(session: int, but: int = 0) -> None:
    """SIGKILL every process of a session but one, and wait until none is left."""
    while others := [p.pid for p in of_session(session) if p.pid != but]:
        send(signal.SIGKILL, others)
        time.sleep(LOOK_EVERY)


def send(number: signal.Signals, pids: Iterable[int]) -> None:
    """Send a signal to processes, of which some may have ended meanwhile."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
