"""A run has one driver at a time, and notes how it is doing, so that others see it from the run's files alone."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from patterns import UserError
from patterns.storage import write_json
from ray_jobs.files import published
from ray_jobs.run import PROGRESS, Run

BEAT_EVERY = 5.0  # seconds between two notes
STALE = 30.0  # seconds of silence after which a driver counts as gone


class TakenOverError(UserError):
    """Another driver works on this run now."""


@dataclass(frozen=True)
class Driver:
    """A process that drives a job. begun: when it started, in the kernel's ticks, since numbers of processes recur."""

    host: str
    pid: int
    begun: str
    token: str

    @staticmethod
    def this() -> "Driver":
        """This process."""
        return Driver(socket.gethostname(), os.getpid(), begun(os.getpid()), uuid4().hex)

    def gone(self) -> bool:
        """Whether it is known to have ended; not known of other machines."""
        return self.host == socket.gethostname() and begun(self.pid) != self.begun

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def begun(pid: int) -> str:
    """When a process of this machine started; empty where there is none, or no telling."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


class Beat:
    """Notes now and then, from a thread of its own, what was last `told` of a job."""

    def __init__(self, run: Run, driver: Driver, job: str) -> None:
        self.run, self.driver = run, driver
        self.told: dict[str, Any] = {"job": job}
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.go_on, daemon=True)

    def go_on(self) -> None:
        while not self.over.wait(BEAT_EVERY):
            with suppress(OSError, UserError):  # where the folder cannot be reached now, the next note may
                if not self.taken_over():
                    self.note()

    def note(self, **more: Any) -> None:
        note = {**self.told, **more, "driver": asdict(self.driver), "time": time.time()}
        with published(self.run.folder) as folder:
            write_json(folder / PROGRESS, note)

    def taken_over(self) -> bool:
        """Whether another driver has begun to work on the run, since this one was silent for long."""
        return bool(self.run.progress().get("driver", {}).get("token") != self.driver.token)

    def check(self) -> None:
        """TakenOverError where another driver has begun to work on the run: what this one does no longer counts."""
        if self.taken_over():
            raise TakenOverError(str(self.run.folder), "another driver works on it now", "Leave it to that one.")


def tidy(run: Run) -> None:
    """Delete what the last driver left half written, if it died with its work done."""
    before = run.progress()
    if before.get("driver") and not before.get("ended") and Driver(**before["driver"]).gone():
        with driving(run, before["job"]):
            run.clean()


@contextmanager
def driving(run: Run, job: str) -> Iterator[Beat]:
    """Drive a job of a run. UserError where another driver does, or was heard so lately that it may."""
    before = run.progress()
    if before.get("driver") and not before.get("ended"):
        other, silent = Driver(**before["driver"]), time.time() - before["time"]
        if not other.gone() and silent < STALE:
            what = f"{other} works on it, and was heard {max(silent, 0):.0f} s ago"
            remedy = f"Wait for its end; where it is dead, for {STALE:.0f} s of silence."
            raise UserError(str(run.folder), what, remedy)
    beat = Beat(run, Driver.this(), job)
    beat.note()
    beat.thread.start()
    try:
        yield beat
    finally:
        beat.over.set()
        beat.thread.join()
        if not beat.taken_over():
            beat.note(ended=True)
