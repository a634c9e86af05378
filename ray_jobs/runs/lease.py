"""A run has one driver at a time, and notes how it is doing, so that others see it from the run's files alone."""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from patterns import UserError
from patterns.io import write_json
from ray_jobs.io.object_store import published
from ray_jobs.runs.run_folder import PROGRESS, Run

BEAT_EVERY = 5.0  # seconds between two notes
STALE = 30.0  # seconds without a new note after which a driver counts as gone
WATCH_EVERY = 1.0  # seconds between two readings of another driver's notes


MINE: set[str] = set()  # tokens of the drivers in this process


class TakenOverError(UserError):
    """Another driver works on this run now."""


@dataclass(frozen=True)
class Driver:
    """A process that drives a job.

    Attributes:
        host: Its machine's name.
        pid: Its number.
        begun: When it started, in the kernel's ticks, because numbers of processes recur.
        token: Its own random name.
        space: The machine's boot and the namespace of its process numbers; containers may share a host's name.
    """

    host: str
    pid: int
    begun: str
    token: str
    space: str = ""

    @staticmethod
    def this() -> "Driver":
        """This process."""
        driver = Driver(socket.gethostname(), os.getpid(), begun(os.getpid()), uuid4().hex, space())
        MINE.add(driver.token)
        return driver

    def here(self) -> bool:
        """Whether this process sees it under its number, if it runs."""
        return self.host == socket.gethostname() and self.space in ("", space())

    def gone(self) -> bool:
        """Whether it is known to have ended; not known of other machines."""
        if not self.is_local():
            return False
        return begun(self.pid) != self.begun or (self.pid == os.getpid() and self.token not in MINE)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def begun(pid: int) -> str:
    """When a process of this machine started; empty where there is none, or no telling."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def space() -> str:
    """The machine's boot and the namespace of process numbers; empty if the kernel does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


class Heartbeat:
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
                    self.write()

    def write(self, **more: Any) -> None:
        note = {**self.told, **more, "driver": asdict(self.driver), "time": time.time()}
        with published(self.run.folder) as folder:
            write_json(folder / PROGRESS, note)

    def taken_over(self) -> bool:
        """Whether another driver has begun to work on the run, since this one was silent for long."""
        return bool(self.run.progress().get("driver", {}).get("token") != self.driver.token)

    def require_lease(self) -> None:
        """TakenOverError where another driver has begun to work on the run: what this one does no longer counts."""
        if self.taken_over():
            raise TakenOverError(str(self.run.folder), "another driver works on it now", "Leave it to that one.")


def remove_leftovers(run: Run) -> None:
    """Delete what the last driver left half written, if it died with its work done."""
    before = run.progress()
    if before.get("driver") and not before.get("ended") and Driver(**before["driver"]).has_ended():
        with hold_lease(run, before["job"]):
            run.clean()


def working(run: Run, patience: float, pause: float) -> Driver | None:
    """Return the driver that works on a run; None if there is none.

    Clocks of two machines may differ by hours. So a driver of another machine is judged by whether its notes change
    while this process watches, for at most `patience` seconds, and never by the times in them.
    """
    first = run.progress()
    if not first.get("driver") or first.get("ended"):
        return None
    other = Driver(**first["driver"])
    if other.has_ended():
        return None
    if other.is_local() and 0 <= time.time() - first["time"] < patience:  # the same clock
        return other
    print(f"watching for {patience:.0f} s whether {other} still works on {run.folder}", file=sys.stderr, flush=True)
    now = change(run, first, patience, pause)
    return Driver(**now["driver"]) if now.get("driver") and not now.get("ended") else None


def change(run: Run, first: dict[str, Any], patience: float, pause: float) -> dict[str, Any]:
    """Return the next note of a run's driver after the first; empty if there is none within `patience` seconds."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        time.sleep(pause)
        if (now := run.progress()) != first:
            return now
    return {}


@contextmanager
def hold_lease(run: Run, job: str) -> Iterator[Heartbeat]:
    """Drive a job of a run. UserError if another driver does."""
    if other := working(run, STALE, WATCH_EVERY):
        raise UserError(str(run.folder), f"{other} works on it", "Wait until it ends, or stop it.")
    heartbeat = Heartbeat(run, Driver.current(), job)
    heartbeat.write()
    heartbeat.thread.start()
    try:
        yield heartbeat
    finally:
        MINE.discard(heartbeat.driver.token)  # its last note may fail
        heartbeat.over.set()
        heartbeat.thread.join()
        if not heartbeat.taken_over():
            heartbeat.write(ended=True)
