"""The lease of a run: one driver works on it at a time, and its heartbeat in the run's folder shows that it lives."""

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
from ray_jobs.config.timing import PRODUCTION, Timing
from ray_jobs.io.object_store import publish
from ray_jobs.runs.run_folder import PROGRESS, Run
from ray_jobs.runs.usage import Usage

OWN_TOKENS: set[str] = set()  # of the drivers that work in this process


class TakenOverError(UserError):
    """Another driver has taken over the run."""


@dataclass(frozen=True)
class Driver:
    """A process that works on a job.

    Attributes:
        host: Name of its machine.
        pid: Number of the process.
        begun: Start of the process in the kernel's ticks, because process numbers recur.
        token: A random name.
        space: The machine's boot and the namespace of its process numbers; containers may share the name of their host.
    """

    host: str
    pid: int
    begun: str
    token: str
    space: str = ""

    @staticmethod
    def current() -> "Driver":
        """Return a new driver in this process."""
        pid = os.getpid()
        driver = Driver(socket.gethostname(), pid, read_start_time(pid), uuid4().hex, read_process_namespace())
        OWN_TOKENS.add(driver.token)
        return driver

    def is_local(self) -> bool:
        """Return whether this process would see the driver's process under its number."""
        return self.host == socket.gethostname() and self.space in ("", read_process_namespace())

    def has_ended(self) -> bool:
        """Return whether the driver is known to have ended; False for drivers of other machines."""
        if not self.is_local():
            return False
        return read_start_time(self.pid) != self.begun or (self.pid == os.getpid() and self.token not in OWN_TOKENS)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def read_start_time(pid: int) -> str:
    """Return when a process of this machine started; empty if there is no such process, or the kernel has no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def read_process_namespace() -> str:
    """Return the machine's boot and the namespace of process numbers; empty if the kernel has no /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


class Heartbeat:
    """Writes the progress of a job to the run's folder at regular intervals, in a thread.

    Args:
        run: The run.
        driver: The driver of the job.
        job: Name of the job.
        timing: Intervals.

    Attributes:
        progress: What to write; the job updates it.
        usage: What the job has used, with earlier commands.
        stopped: Set to end the thread.
    """

    def __init__(self, run: Run, driver: Driver, job: str, timing: Timing = PRODUCTION) -> None:
        self.run, self.driver, self.timing = run, driver, timing
        self.progress: dict[str, Any] = {"job": job}
        self.usage = Usage()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.write_regularly, daemon=True)

    def write_regularly(self) -> None:
        """Write until `stopped` is set, or another driver has taken over the run."""
        while not self.stopped.wait(self.timing.heartbeat_interval):
            with suppress(OSError, UserError):  # the folder may be reachable again at the next heartbeat
                if not self.is_taken_over():
                    self.write()

    def write(self, **more: Any) -> None:
        """Write one heartbeat.

        Args:
            more: Further fields.
        """
        note = {**self.progress, **more, "driver": asdict(self.driver), "time": time.time()}
        with publish(self.run.folder) as folder:
            write_json(folder / PROGRESS, note)

    def is_taken_over(self) -> bool:
        """Return whether another driver works on the run, because this one was silent for too long."""
        return bool(self.run.progress().get("driver", {}).get("token") != self.driver.token)

    def require_lease(self) -> None:
        """Raise TakenOverError if another driver has taken over the run."""
        if self.is_taken_over():
            raise TakenOverError(str(self.run.folder), "another driver has taken over this run", "Stop this driver.")


def remove_leftovers(run: Run) -> None:
    """Delete the unfinished files of the last driver, if it was killed after its work was done."""
    last = run.progress()
    if last.get("driver") and not last.get("ended") and Driver(**last["driver"]).has_ended():
        with hold_lease(run, last["job"]):
            run.remove_temporary_files()


def find_driver(run: Run, timing: Timing = PRODUCTION) -> Driver | None:
    """Return the driver that works on a run; None if there is none.

    The clocks of two machines may differ by hours. So a driver of another machine is judged by whether its heartbeat
    changes within `timing.stale_after`, and never by the time in it.

    Args:
        run: The run.
        timing: Intervals.
    """
    last = run.progress()
    if not last.get("driver") or last.get("ended"):
        return None
    other = Driver(**last["driver"])
    if other.has_ended():
        return None
    if other.is_local() and 0 <= time.time() - last["time"] < timing.stale_after:  # the same clock
        return other
    line = f"watching for {timing.stale_after:.0f} s whether {other} still works on {run.folder}"
    print(line, file=sys.stderr, flush=True)
    now = wait_for_heartbeat(run, last, timing.stale_after, timing.watch_interval)
    return Driver(**now["driver"]) if now.get("driver") and not now.get("ended") else None


def wait_for_heartbeat(run: Run, last: dict[str, Any], timeout: float, interval: float) -> dict[str, Any]:
    """Wait for the next heartbeat of a run's driver.

    Args:
        run: The run.
        last: The last heartbeat that was read.
        timeout: Seconds to wait.
        interval: Seconds between two readings.

    Returns:
        The next heartbeat; empty after the timeout.
    """
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        time.sleep(interval)
        if (now := run.progress()) != last:
            return now
    return {}


@contextmanager
def hold_lease(run: Run, job: str, timing: Timing = PRODUCTION) -> Iterator[Heartbeat]:
    """Hold the lease of a run while a job works.

    Args:
        run: The run.
        job: Name of the job.
        timing: Intervals.

    Yields:
        The heartbeat.

    Raises:
        UserError: If another driver works on the run.
    """
    if other := find_driver(run, timing):
        raise UserError(str(run.folder), f"{other} works on this run", "Wait until it ends, or stop it.")
    heartbeat = Heartbeat(run, Driver.current(), job, timing)
    heartbeat.write()
    heartbeat.thread.start()
    try:
        yield heartbeat
    finally:
        OWN_TOKENS.discard(heartbeat.driver.token)  # because writing the last heartbeat may fail
        heartbeat.stopped.set()
        heartbeat.thread.join()
        if not heartbeat.is_taken_over():
            heartbeat.write(ended=True)
