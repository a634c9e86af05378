"""Faults thrown at a job on a real cluster, by a seeded schedule, and what became of it."""

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
from cluster.processes import of_session, send

DRIVER = {"driver-TERM": signal.SIGTERM, "driver-INT": signal.SIGINT, "driver-KILL": signal.SIGKILL}
WORKER = {"kill-worker": signal.SIGKILL, "stop-worker": signal.SIGSTOP}
# What may strike, and how often relative to the others.
KINDS = {
    "kill-worker": 4, "stop-worker": 2, "kill-node": 2, "stop-node": 1, "add-node": 1,
    "driver-TERM": 2, "driver-INT": 1, "driver-KILL": 3,
}  # fmt: skip
STARTING = ("kill-worker", "kill-node", "driver-KILL")  # what may strike while a driver starts, too
NODES = 2  # with a CPU each; those lost are replaced
LIVES = 8  # of a driver, before a trial is given up
LIFE = 300.0  # seconds of a driver's life, before a trial is given up
END_WITHIN = 15.0  # seconds after a trial, for what Ray is ending
TICK = 0.01  # seconds between two looks; one to strike amid writing looks ten times as often


@dataclass(frozen=True)
class Fault:
    """One thing to happen.

    after: seconds since the last fault of this driver's life, or since its first shard was done.
    starting: counts the seconds from the start of a driver instead, the one after a driver that was struck.
    aimed: waits further, for the next file in the run's folder to appear, and so strikes amid writing.
    choice: which of the possible victims, in [0, 1).
    """

    kind: str
    after: float
    starting: bool
    aimed: bool
    choice: float


def schedule(seed: int) -> tuple[Fault, ...]:
    """One to three faults, the first of them amid the work."""
    rng = random.Random(seed)
    faults: list[Fault] = []
    for kind in rng.choices(list(KINDS), list(KINDS.values()), k=rng.randint(1, 3)):
        starting = bool(faults) and faults[-1].kind in DRIVER and kind in STARTING and rng.random() < 0.5
        after = rng.uniform(0, 8) if starting else rng.uniform(0, 0.8)
        faults.append(Fault(kind, after, starting, not starting and rng.random() < 0.4, rng.random()))
    return tuple(faults)


class SlowStorage(SimpleHTTPRequestHandler):
    """Serves shards, each after a while, so that a run lasts long enough to be struck midway."""

    delay = 0.0  # seconds

    def do_GET(self) -> None:
        time.sleep(self.delay)
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        """Keep still."""


@dataclass(frozen=True)
class Struck:
    """A fault that struck. life, seconds: into which life.  midway: amid the work on shards."""

    fault: Fault
    life: int
    seconds: float
    victim: str
    midway: bool


class Life:
    """One driver, from its start to its end; its process id is that of a session of its own."""

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
        """Whether the driver runs; one that has run for too long counts as ended."""
        return self.driver.poll() is None and time.monotonic() - self.began < LIFE

    def files(self) -> set[Path]:
        """What work on shards leaves in the run's folder, finished or not."""
        return {p for name in ("moments", "explanations") for p in (self.folder / name).rglob("*") if p.is_file()}

    def working(self) -> bool:
        """Whether the work on shards has begun to show; from then on, faults' times are counted."""
        if self.counted_from is None and not self.files() <= self.before:
            self.counted_from = time.monotonic()
        return self.counted_from is not None

    def due(self, fault: Fault) -> bool:
        """Whether it is time for a fault."""
        since = self.began if fault.starting else self.counted_from
        if since is None or time.monotonic() - since < fault.after:
            return False
        if fault.aimed:
            files = self.files()
            while self.alive() and self.files() <= files:
                time.sleep(TICK / 10)
        return self.alive()

    def end(self) -> int:
        """The driver's exit status, after its end."""
        self.driver.kill()
        return self.driver.wait()


@dataclass
class Trial:
    """A command, given again until it exits 0, under faults. `folder` is the run's, `logs` for what drivers say.

    struck, lives, statuses: which faults struck, and the drivers with their exit statuses.
    hung: the nodes that hang until the trial's end.
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

    def run(self) -> None:
        """Until the command exits 0, or too many lives have passed."""
        left = deque(self.faults)
        try:
            while 0 not in self.statuses and len(self.statuses) < LIVES:
                self.live(left)
        finally:
            self.restore()

    def live(self, left: deque[Fault]) -> None:
        """One life of the driver, in which some of the faults that are left strike."""
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
                time.sleep(TICK)
        finally:
            self.statuses.append(life.end())

    def strike(self, fault: Fault, driver: subprocess.Popen[bytes]) -> str | None:
        """Do to one of the possible victims what a fault's kind says; gives its name, None where there is none."""
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
        """The cluster as it was, with no node that hangs."""
        for number in self.hung:
            self.cluster.kill_node(number)
        while len(self.cluster.nodes) > NODES:
            self.cluster.kill_node(max(self.cluster.nodes))

    def leaked(self) -> list[str]:
        """What still runs of drivers and workers, after a time in which Ray may end them."""
        deadline = time.monotonic() + END_WITHIN
        while left := [p.title for life in self.lives for p in of_session(life.driver.pid)] + [
            p.title for p in self.cluster.workers()
        ]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return left

    def story(self) -> str:
        """All that happened, to be read where a trial fails."""
        lines = [f"schedule: {fault}" for fault in self.faults] + [f"struck: {struck}" for struck in self.struck]
        for number, (life, status) in enumerate(zip(self.lives, self.statuses)):
            lines += [f"--- life {number} ended with {status}", life.log.read_text()]
        return "\n".join(lines)
