"""Faults that strike a job on a real cluster by a seeded schedule, and a record of what happened."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

from cluster.local import ROOT, LocalCluster
from cluster.processes import processes_of_session, send

DRIVER = {"driver-TERM": signal.SIGTERM, "driver-INT": signal.SIGINT, "driver-KILL": signal.SIGKILL}
WORKER = {"kill-worker": signal.SIGKILL, "stop-worker": signal.SIGSTOP}
# The kinds of faults, and their relative frequencies.
KINDS = {
    "kill-worker": 4, "stop-worker": 2, "kill-node": 2, "stop-node": 1, "add-node": 1,
    "driver-TERM": 2, "driver-INT": 1, "driver-KILL": 3,
}  # fmt: skip
STARTING = ("kill-worker", "kill-node", "driver-KILL")  # kinds that may also strike while a driver starts
WRITTEN = "moments", "explanations", "atlas", "evaluation"  # folders of a run that work on shards writes to
NODES = 2  # with one CPU each; lost nodes are replaced
MAX_LIVES = 8  # drivers after which a trial is given up
MAX_LIFE = 300.0  # seconds after which a driver is killed
END_TIMEOUT = 60.0  # seconds after a trial in which Ray may end its processes
POLL = 0.01  # seconds between two checks of a driver; a tenth of it while a fault waits for a file


@dataclass(frozen=True)
class Fault:
    """A fault of a schedule.

    Attributes:
        kind: Its kind, one of `KINDS`.
        after: Seconds since the last fault in the same driver's life, or since its first shard was done.
        starting: The seconds count from the start of the driver that follows a struck one instead.
        aimed: The fault also waits until the next file appears in the run's folder, so that it strikes during a write.
        choice: Which of the possible victims it strikes, in [0, 1).
    """

    kind: str
    after: float
    starting: bool
    aimed: bool
    choice: float


def schedule(seed: int) -> tuple[Fault, ...]:
    """Return one to three faults; the first strikes during the work on shards."""
    rng = random.Random(seed)
    faults: list[Fault] = []
    for kind in rng.choices(list(KINDS), list(KINDS.values()), k=rng.randint(1, 3)):
        starting = bool(faults) and faults[-1].kind in DRIVER and kind in STARTING and rng.random() < 0.5
        after = rng.uniform(0, 8) if starting else rng.uniform(0, 0.8)
        faults.append(Fault(kind, after, starting, not starting and rng.random() < 0.4, rng.random()))
    return tuple(faults)


class SlowStorage(SimpleHTTPRequestHandler):
    """A server that delays each shard, so that a run lasts long enough for faults.

    Attributes:
        delay: Seconds per shard.
    """

    delay = 0.0

    def do_GET(self) -> None:
        time.sleep(self.delay)
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        """Print nothing."""


@dataclass(frozen=True)
class Struck:
    """A fault that struck.

    Attributes:
        fault: The fault.
        life: Number of the driver's life.
        seconds: Time since the start of that life.
        victim: Name of the victim.
        midway: Whether work on shards had begun.
    """

    fault: Fault
    life: int
    seconds: float
    victim: str
    midway: bool


class Life:
    """One driver from its start to its end. Its process leads a session.

    Args:
        command: Arguments of the program.
        environment: Further environment variables.
        folder: The run's folder.
        log: File for the driver's output.
    """

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path, log: Path) -> None:
        self.folder, self.log = folder, log
        self.before = self.files()
        self.began = time.monotonic()
        self.counted_from: float | None = None
        with log.open("w") as file:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", "ray_jobs", *command],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def alive(self) -> bool:
        """Return whether the driver runs; a driver that has run for too long counts as ended."""
        return self.driver.poll() is None and time.monotonic() - self.began < MAX_LIFE

    def files(self) -> set[Path]:
        """Return the files that work on shards writes to the run's folder, including unfinished ones."""
        return {p for name in WRITTEN for p in (self.folder / name).rglob("*") if p.is_file()}

    def working(self) -> bool:
        """Return whether work on shards has written a file; the times of faults count from then on."""
        if self.counted_from is None and not self.files() <= self.before:
            self.counted_from = time.monotonic()
        return self.counted_from is not None

    def due(self, fault: Fault) -> bool:
        """Return whether it is time for a fault."""
        since = self.began if fault.starting else self.counted_from
        if since is None or time.monotonic() - since < fault.after:
            return False
        if fault.aimed:
            files = self.files()
            while self.alive() and self.files() <= files:
                time.sleep(POLL / 10)
        return self.alive()

    def end(self) -> int:
        """Kill the driver if it still runs, and return its exit status."""
        self.driver.kill()
        return self.driver.wait()


@dataclass
class Trial:
    """A command that is repeated under faults until it exits with 0.

    Attributes:
        cluster: The cluster.
        command: Arguments of the program.
        folder: The run's folder.
        logs: Folder for the drivers' output.
        faults: The schedule.
        struck: The faults that struck.
        lives: The drivers.
        statuses: Their exit statuses.
        hung: Numbers of the nodes that hang until the trial's end.
        stopped: Workers that hang until then.
    """

    cluster: LocalCluster
    command: list[str]
    folder: Path
    logs: Path
    faults: tuple[Fault, ...]
    struck: list[Struck] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    hung: set[int] = field(default_factory=set)
    stopped: set[int] = field(default_factory=set)

    def run(self) -> None:
        """Repeat the command until it exits with 0, or the trial is given up."""
        left = deque(self.faults)
        try:
            while 0 not in self.statuses and len(self.statuses) < MAX_LIVES:
                self.live(left)
        finally:
            self.restore()

    def live(self, left: deque[Fault]) -> None:
        """Run one driver; some of the remaining faults strike."""
        number = len(self.lives)
        life = Life(self.command, self.cluster.environment, self.folder, self.logs / f"life-{number}.txt")
        self.lives.append(life)
        try:
            while life.alive():
                midway = life.working()
                untouched = all(struck.life < number for struck in self.struck)
                if left and (untouched or not left[0].starting) and life.due(left[0]):
                    seconds = time.monotonic() - life.began
                    victim = self.strike(left[0], life.driver)
                    if victim is not None:
                        fault = left.popleft()
                        self.struck.append(Struck(fault, number, seconds, victim, midway))
                        life.counted_from = time.monotonic() if midway else None
                        if fault.kind == "driver-KILL":
                            break
                time.sleep(POLL)
        finally:
            self.statuses.append(life.end())

    def strike(self, fault: Fault, driver: subprocess.Popen[bytes]) -> str | None:
        """Strike one of the possible victims, and return its name; None if there is no victim."""
        cluster = self.cluster
        if fault.kind in DRIVER:
            driver.send_signal(DRIVER[fault.kind])
            return f"process {driver.pid}"
        if fault.kind == "add-node":
            return f"node {cluster.add_node().number}"
        if fault.kind in WORKER:
            workers = sorted((p for p in cluster.workers() if "Worker" in p.title), key=lambda p: p.pid)
            if not workers:
                return None
            worker = workers[int(fault.choice * len(workers))]
            send(WORKER[fault.kind], [worker.pid])
            self.stopped |= {worker.pid} if fault.kind == "stop-worker" else set()
            return f"process {worker.pid}, {worker.title}"
        others = sorted(cluster.nodes.keys() - self.hung)[1:]  # the head holds the driver and the cluster's state
        number = others[int(fault.choice * len(others))]
        if fault.kind == "kill-node":
            cluster.kill_node(number)
        else:
            cluster.stop_node(number)
            self.hung.add(number)
        cluster.add_node()
        return f"node {number}"

    def restore(self) -> None:
        """Restore the cluster: remove hung and surplus nodes, and continue hung workers.

        Ray kills hung workers, except one that was already ending when it was stopped.
        """
        send(signal.SIGCONT, self.stopped & {p.pid for p in self.cluster.workers()})
        for number in self.hung:
            self.cluster.kill_node(number)
        while len(self.cluster.nodes) > NODES:
            self.cluster.kill_node(max(self.cluster.nodes))

    def list_leaked_processes(self) -> list[str]:
        """Return the titles of drivers' and workers' processes that still run after `END_TIMEOUT`."""
        deadline = time.monotonic() + END_TIMEOUT
        while left := [p.title for life in self.lives for p in processes_of_session(life.driver.pid)] + [
            p.title for p in self.cluster.workers()
        ]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return left

    def report(self) -> str:
        """Return all that happened, to explain a failed trial."""
        lines = [f"schedule: {fault}" for fault in self.faults] + [f"struck: {struck}" for struck in self.struck]
        for number, (life, status) in enumerate(zip(self.lives, self.statuses)):
            lines += [f"--- life {number} ended with {status}", life.log.read_text()]
        return "\n".join(lines)
