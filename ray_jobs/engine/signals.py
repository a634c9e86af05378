"""How jobs are stopped by signals, and how they end."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ray_jobs.data.shell_pipes import end_pipes

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
INTERRUPTED = "interrupted; the same command goes on where this one ended"


class StoppedShortError(Exception):
    """The job ended with shards undone. Nothing is lost: the same command goes on."""


def end_process() -> None:
    """End this process at once, with exit status 3, and all that it started: pipes, and a Ray with its workers."""
    for process in descendants(os.getpid()):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)
    os.write(2, f"patternnet: {INTERRUPTED}\n".encode())
    os._exit(3)


def descendants(process: int) -> list[int]:
    """Return the numbers of the processes below one, parents first; empty where the kernel has no /proc."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            parent = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = list(children.get(process, ()))
    for each in found:  # which grows
        found += children.get(each, ())
    return found


def interrupt() -> None:
    """Raise KeyboardInterrupt; commands that are read from are killed, or the threads that read them would not end."""
    end_pipes()
    raise KeyboardInterrupt


class Signals:
    """What signals do in this process.

    Attributes:
        end: What a second signal does. The program ends its process; a notebook must not be ended.
    """

    end: Callable[[], None] = staticmethod(interrupt)


def pause(seconds: float, step: float, stop: Callable[[], bool]) -> None:
    """Sleep in steps, until the time is over or `stop()` is true."""
    end = time.monotonic() + seconds
    while not stop() and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, step))


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Let SIGTERM, SIGHUP and Ctrl-C ask the job to commit and end; a second one ends it at once.

    A terminal that is closed may send SIGHUP twice: it never counts as the second. Only the main thread gets signals;
    in another one nothing asks the job to end.
    """
    received: list[int] = []

    def note(number: int, _: object) -> None:
        if received and number != signal.SIGHUP:
            Signals.end()
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    # After ray.init(), which installs its own. `nohup` has SIGHUP ignored.
    kept = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in kept}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
