"""Several Ray nodes on this machine, for development and tests: `python -m cluster.local --nodes 4 --cpus 1`.

All of them listen on the loopback interface only. The command prints a token that the cluster requires, because
everyone who can reach a Ray cluster can run code on it, also other users of the machine.
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

from cluster.processes import CHECK_EVERY, Process, descendants, end_session, processes_of_session, send

ROOT = Path(__file__).parents[1]
PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"  # `python` in a job is this interpreter
END_WITHIN = 60.0  # seconds for the keeper to stop everything
GRACE = 2.0  # seconds for the processes of a killed node to end by themselves
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # listen on 127.0.0.1 instead of every interface


@dataclass(frozen=True)
class Node:
    """A node of a local cluster.

    Attributes:
        number: Its number, counted from 0, the head.
        id: Ray's id of the node.
        raylet: Process id of its raylet, the parent of its workers.
    """

    number: int
    id: str
    raylet: int


class LocalCluster:
    """A Ray cluster of several nodes on this machine, as a context manager.

    A separate process in its own session owns the nodes. It ends with this process, even if this process is killed,
    and ends every process of the cluster. Drivers attach with `environment`.

    Args:
        nodes: Number of nodes; the first is the head.
        cpus: CPUs that each node reports, independent of the machine.
        gpus: GPUs that each node reports, independent of the machine.
        dashboard: Start the dashboard, which `patternnet submit` needs; its URL is the attribute `dashboard`.
        token: Token that the cluster requires, 64 hexadecimal digits; empty for none.

    Raises:
        RuntimeError: If a node does not start; Ray's own error is on stderr.
    """

    def __init__(self, nodes: int = 2, cpus: int = 1, gpus: int = 0, dashboard: bool = False, token: str = "") -> None:
        self.size, self.resources, self.with_dashboard = nodes, {"num_cpus": cpus, "num_gpus": gpus}, dashboard
        # Explicit, because Ray otherwise uses the mode that earlier runs left in the home directory.
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
        """Environment variables with which a driver attaches to this cluster."""
        return {**self.settings, "RAY_ADDRESS": self.address}

    def add_node(self, env: dict[str, str] | None = None, **resources: int) -> Node:
        """Start another node and wait until it has joined.

        Args:
            env: Environment variables of its workers, in addition to those of this process.
            **resources: `num_cpus` and `num_gpus`; by default as for the other nodes.
        """
        return self.start({"env_vars": env or {}, **resources})

    def kill_node(self, number: int) -> None:
        """Kill a node: send SIGKILL to its raylet and wait until all of its processes have ended."""
        node = self.nodes.pop(number)
        pids = {node.raylet, *(p.pid for p in descendants(node.raylet))}
        send(signal.SIGKILL, [node.raylet])
        deadline = time.monotonic() + GRACE
        while left := pids & {p.pid for p in self.processes()}:
            if time.monotonic() > deadline:  # stopped processes do not notice that their raylet is gone
                send(signal.SIGKILL, left)
            time.sleep(CHECK_EVERY)

    def stop_node(self, number: int) -> None:
        """Make a node hang: send SIGSTOP to all of its processes. Only `kill_node` has an effect on it afterwards."""
        raylet = self.nodes[number].raylet
        send(signal.SIGSTOP, [raylet, *(p.pid for p in descendants(raylet))])

    def processes(self) -> list[Process]:
        """Return every process of the cluster."""
        return processes_of_session(self.keeper.pid)

    def workers(self) -> list[Process]:
        """Return the processes of running actors and tasks; their titles contain the class or function."""
        agents = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
        return [p for p in self.processes() if p.title.startswith("ray::") and not p.title.startswith(agents)]

    def close(self) -> None:
        """Stop every process of the cluster."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.keeper.communicate(timeout=END_WITHIN)  # it ends when its stdin is closed
        end_session(self.keeper.pid)  # for the case that it hangs or was killed
        self.keeper.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.nodes = {}

    def start(self, options: dict[str, Any]) -> Node:
        """Request a node from the keeper and return it once it has joined."""
        assert self.keeper.stdin is not None
        assert self.keeper.stdout is not None
        self.keeper.stdin.write(json.dumps({**self.resources, **options}) + "\n")
        self.keeper.stdin.flush()
        answer = self.keeper.stdout.readline()
        if not answer:
            raise RuntimeError("the cluster's node did not start")
        reply = json.loads(answer)
        self.address, self.dashboard = reply["address"], f"http://{reply['dashboard']}"
        node = self.nodes[self.started] = Node(self.started, reply["id"], reply["raylet"])
        self.started += 1
        return node


def main(
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes; the first is the head.")] = 2,
    cpus: Annotated[int, typer.Option(min=0, help="CPUs that each node reports.")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs that each node reports.")] = 0,
) -> None:
    """Run several Ray nodes on this machine until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), LocalCluster(nodes, cpus, gpus, True, token_hex(32)) as cluster:
        print(f"{nodes} nodes at {cluster.address}; Ctrl-C stops them. To run a job on them, set in a shell")
        print("  export " + " ".join(f"{name}={value}" for name, value in cluster.environment.items()))
        print("  patternnet fit …")
        print(f"  patternnet submit --address {cluster.dashboard} fit …", flush=True)
        while True:
            signal.pause()


if __name__ == "__main__":
    typer.run(main)
