"""Several Ray nodes on this machine, for development and tests: `python -m cluster.local --nodes 4 --cpus 1`.

All of them listen on loopback only. The command's cluster asks for a token, which it prints, since whoever reaches a
Ray cluster runs what they like on it, other users of the machine too.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import Annotated, Any, Self

import typer

from cluster.processes import LOOK_EVERY, Process, below, end_session, of_session, send

ROOT = Path(__file__).parents[1]
PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"  # so that `python` in a job is this one
END_WITHIN = 60.0  # seconds that the keeper has to stop everything
GRACE = 2.0  # seconds that the processes of a killed node have to end by themselves
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # listen on 127.0.0.1, rather than on every interface


@dataclass(frozen=True)
class Node:
    """A node of a local cluster. id: Ray's name of it.  raylet: the process id of its raylet, the parent of workers."""

    number: int
    id: str
    raylet: int


class LocalCluster:
    """A Ray cluster of several nodes on this machine, as a context manager.

    Its nodes belong to a process of their own, in a session of its own, which ends with its owner whatever happens
    to that, and takes every process of the cluster along. Drivers attach with `environment`.

    nodes: how many to start, the first the head.  cpus, gpus: of each node, whatever the machine has.
    dashboard: whether `patternnet submit` works, at the URL of that name.
    token: what the cluster asks of all that attach to it, 64 hexadecimal digits; none, if empty.
    Raises RuntimeError where a node does not start; Ray's own error is on stderr.
    """

    def __init__(self, nodes: int = 2, cpus: int = 1, gpus: int = 0, dashboard: bool = False, token: str = "") -> None:
        self.size, self.resources, self.with_dashboard = nodes, {"num_cpus": cpus, "num_gpus": gpus}, dashboard
        # The mode explicitly, else Ray goes by what earlier runs left in the home directory.
        access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
        self.settings = LOOPBACK | access
        self.nodes: dict[int, Node] = {}
        self.started = 0
        self.address = self.dashboard = ""

    def __enter__(self) -> Self:
        self.folder = tempfile.mkdtemp(prefix="ray-")
        self.keeper = subprocess.Popen(
            [sys.executable, "-m", "cluster.keeper", self.folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **self.settings, "RAY_USAGE_STATS_ENABLED": "0", "PATH": PATH},
            start_new_session=True,
        )
        try:
            self.start({"include_dashboard": self.with_dashboard})
            for _ in range(self.size - 1):
                self.add_node()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which a driver attaches to this cluster."""
        return {**self.settings, "RAY_ADDRESS": self.address}

    def add_node(self, env: dict[str, str] | None = None, **resources: int) -> Node:
        """Start a further node and wait until it has joined.

        env: variables that its workers have beside this process's.  resources: num_cpus, num_gpus; else as the others.
        """
        return self.start({"env_vars": env or {}, **resources})

    def kill_node(self, number: int) -> None:
        """Lose a node: SIGKILL its raylet, and wait until all of its processes have ended."""
        node = self.nodes.pop(number)
        pids = {node.raylet, *(p.pid for p in below(node.raylet))}
        send(signal.SIGKILL, [node.raylet])
        deadline = time.monotonic() + GRACE
        while left := pids & {p.pid for p in self.processes()}:
            if time.monotonic() > deadline:  # such as are stopped cannot see that their raylet is gone
                send(signal.SIGKILL, left)
            time.sleep(LOOK_EVERY)

    def stop_node(self, number: int) -> None:
        """Let a node hang: SIGSTOP all of its processes. Only `kill_node` does anything to it afterwards."""
        raylet = self.nodes[number].raylet
        send(signal.SIGSTOP, [raylet, *(p.pid for p in below(raylet))])

    def processes(self) -> list[Process]:
        """Every process of the cluster."""
        return of_session(self.keeper.pid)

    def workers(self) -> list[Process]:
        """The processes of actors and of tasks that run now; their titles say of which class or function."""
        agents = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
        return [p for p in self.processes() if p.title.startswith("ray::") and not p.title.startswith(agents)]

    def close(self) -> None:
        """Stop every process of the cluster."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.keeper.communicate(timeout=END_WITHIN)  # the end of its stdin ends it
        end_session(self.keeper.pid)  # where it hangs, or was killed itself
        self.keeper.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.nodes = {}

    def start(self, options: dict[str, Any]) -> Node:
        assert self.keeper.stdin is not None
        assert self.keeper.stdout is not None
        self.keeper.stdin.write(json.dumps({**self.resources, **options}) + "\n")
        self.keeper.stdin.flush()
        answer = self.keeper.stdout.readline()
        if not answer:
            raise RuntimeError("the cluster's node did not start")
        told = json.loads(answer)
        self.address, self.dashboard = told["address"], f"http://{told['dashboard']}"
        node = self.nodes[self.started] = Node(self.started, told["id"], told["raylet"])
        self.started += 1
        return node


def main(
    nodes: Annotated[int, typer.Option(min=1, help="How many, the first of them the head.")] = 2,
    cpus: Annotated[int, typer.Option(min=0, help="CPUs that each node claims to have.")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs that each node claims to have.")] = 0,
) -> None:
    """Several Ray nodes on this machine, until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), LocalCluster(nodes, cpus, gpus, True, token_hex(32)) as cluster:
        print(f"{nodes} nodes at {cluster.address}; Ctrl-C stops them. To run a job on them, in a shell with")
        print("  export " + " ".join(f"{name}={value}" for name, value in cluster.environment.items()))
        print("  patternnet fit …")
        print(f"  patternnet submit --address {cluster.dashboard} fit …", flush=True)
        while True:
            signal.pause()


if __name__ == "__main__":
    typer.run(main)
