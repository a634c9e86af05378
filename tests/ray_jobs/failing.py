"""A worker that fails in every way. It imports nothing slow, because a process is started for each lost worker."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path


class BadItemError(Exception):
    """An error that the user can fix."""


class BusyServerError(BadItemError):
    """Like BusyError of ray_jobs.io.refusals: the server asks for a pause before the item is begun."""

    begun, slow_down, retry_after = False, True, 3.0


class Actor:
    """Does what the name of an item says, and counts attempts in files.

    Args:
        folder: The folder for these files.
        unit: Seconds; all durations are multiples of it.
        sleep: Spends some seconds.
    """

    def __init__(self, folder: Path, unit: float = 0.1, sleep: Callable[[float], None] = time.sleep) -> None:
        self.folder, self.held, self.closed = folder, list[str](), False
        self.unit, self.sleep = unit, sleep

    def describe(self) -> tuple[int, int]:
        """Return the process and, because a process may hold several workers, a number."""
        return os.getpid(), id(self)

    def prepare(self) -> None:
        if (self.folder / "no-start").exists():
            raise RuntimeError("no such device")
        if (self.folder / "bad-start").exists():
            raise BadItemError("no such model")
        if (self.folder / "stop-at-start").exists():
            (self.folder / "stop-at-start").unlink()
            os.kill(os.getpid(), signal.SIGSTOP)

    def work(self, item: str, following: str | None) -> Iterator[int]:
        """Yield 1 for progress and 2 at the end."""
        with (self.folder / "assignments").open("a") as assignments:
            assignments.write(f"{os.getpid()}/{id(self)} {item} {following}\n")
        if following is not None and following.startswith("poison"):
            os.kill(os.getpid(), signal.SIGKILL)
        attempt = len(list(self.folder.glob(f"{item}@*")))
        (self.folder / f"{item}@{attempt}").touch()
        kind, _, number = item.partition("-")
        if kind == "busy" and (number == "always" or attempt < int(number)):
            raise BusyServerError(f"{item} is refused")
        yield 1
        fails = number == "always" or attempt == 0
        if kind == "bad" and fails:
            self.held = []
            raise BadItemError(f"{item} cannot be read")
        if kind == "bug" and fails:
            raise RuntimeError("the device is lost")
        if kind in ("kill", "poison") and fails:
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "stop" and fails:
            os.kill(os.getpid(), signal.SIGSTOP)
        if kind == "some":
            self.sleep(3 * self.unit)
        if kind == "long":
            while not (self.folder / "grown").exists():
                self.sleep(self.unit)
                yield 1
        if kind == "slow":
            for _ in range(20):
                self.sleep(self.unit)
                yield 1
        self.held.append(item)
        yield 2

    def commit(self) -> list[str]:
        if (self.folder / "bad-commit").exists():
            raise BadItemError("the disk is full")
        if (self.folder / "commit-takes").exists():
            self.sleep(float((self.folder / "commit-takes").read_text()) * self.unit)
        held, self.held = self.held, []
        return held

    def close(self) -> None:
        self.closed = True
