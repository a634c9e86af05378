"""Signals that stop a job, and the end of its process."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ray_jobs.data.shell_pipes import kill_pipes

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
INTERRUPTED = "interrupted; run the same command again to resume"


class StoppedShortError(Exception):
    """The job ended before all shards were done. All finished work is kept, and the same command resumes the job."""


def end_process() -> None:
    """End this process at once with exit status 3, and all its descendants: pipes, and Ray with its workers."""
    for process in list_descendants(os.getpid()):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)
    os.write(2, f"patternnet: {INTERRUPTED}\n".encode())
    os._exit(3)


def list_descendants(process: int) -> list[int]:
    """Return the numbers of the descendants of a process, parents first; empty if the kernel has no /proc."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            parent = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = list(children.get(process, ()))
    for each in found:  # the list grows meanwhile
        found += children.get(each, ())
    return found


def interrupt() -> None:
    """Kill the commands of `pipe:` shards, so that the threads that read them end, and raise KeyboardInterrupt.

    Raises:
        KeyboardInterrupt: Always.
    """
    kill_pipes()
    raise KeyboardInterrupt


class Signals:
    """The effect of signals on this process.

    Attributes:
        end: Called at the second signal. The program ends its process; a notebook's process must not end.
    """

    end: Callable[[], None] = staticmethod(interrupt)


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Let SIGTERM, SIGHUP and Ctrl-C ask the job to commit and end; a second signal ends it at once.

    A closed terminal may send SIGHUP twice, so SIGHUP never counts as the second signal. In a thread other than the
    main one, which gets no signals, nothing is installed.

    Yields:
        A function that returns whether a signal has come.
    """
    received: list[int] = []

    def handle(number: int, _: object) -> None:
        if received and number != signal.SIGHUP:
            Signals.end()
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    # `nohup` ignores SIGHUP, and so does the job.
    handled = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in handled}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
