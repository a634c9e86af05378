"""A real Slurm of one node on this machine, with its own munge and its own folder, on the loopback interface."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

PROGRAMS = "munged", "slurmctld", "slurmd", "sbatch"
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Return what is missing on this machine to run Slurm; empty if nothing is missing."""
    lacking = [name for name in PROGRAMS if not found(name)]
    return f"no {lacking[0]}: apt-get install slurm-wlm" if lacking else "" if os.geteuid() == 0 else "not root"


def found(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Slurm:
    """Context manager; its `environment` directs `sbatch` to it. The folder's path must be short because of sockets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Self:
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        host = socket.gethostname()
        text = CONFIGURATION.format(host=host, folder=self.folder, ports=(free_port(), free_port()))
        (self.folder / "slurm.conf").write_text(text)
        at = {name: f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")}
        try:
            self.start("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *at.values())
            self.until(lambda: (self.folder / "munge.socket").exists())
            self.start("slurmctld", "-D")
            self.start("slurmd", "-D")
            self.until(lambda: self.output("sinfo", "--noheader", "--format=%T") == "idle")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def start(self, name: str, *options: str) -> None:
        program = found(name)
        assert program is not None
        with (self.folder / f"{name}.out").open("wb") as log:
            daemon = subprocess.Popen([program, *options], env=self.environment, stdout=log, stderr=log)
        self.daemons.append(daemon)

    def output(self, *command: str) -> str:
        """Return the output of a Slurm command; empty if it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    def until(self, holds: Callable[[], bool], within: float = 60.0) -> None:
        deadline = time.monotonic() + within
        while not holds():
            assert time.monotonic() < deadline, self.logs()
            assert all(daemon.poll() is None for daemon in self.daemons), self.logs()
            time.sleep(0.2)

    def logs(self) -> str:
        return "\n".join(path.read_text()[-2000:] for path in self.folder.glob("*.log"))

    def close(self) -> None:
        self.output("scancel", "--user=root")
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            daemon.wait(30)
