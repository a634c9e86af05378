"""A local cluster of several nodes: joining, losing nodes, and ending without leftovers."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from cluster.local import ROOT, LocalCluster, Node
from cluster.processes import processes, processes_of_session

pytestmark = pytest.mark.full

# Drivers that attach to the cluster and print one line of JSON. This one ends once a node is dead.
NODES = """
import json, ray, time
ray.init()
while all(n["Alive"] for n in ray.nodes() if n["NodeID"] == "{id}"):
    time.sleep(0.2)
print(json.dumps({{n["NodeID"]: n["Alive"] for n in ray.nodes()}}))
"""
SPREAD = """
import json, os, ray
ray.init()

@ray.remote(num_cpus=2, num_gpus=1)
class Worker:
    def node(self):
        return ray.get_runtime_context().get_node_id(), os.environ["CUDA_VISIBLE_DEVICES"]

workers = [Worker.remote() for _ in range(2)]
print(json.dumps(ray.get([w.node.remote() for w in workers])))
"""
# An owner that prints the session of its cluster and then sleeps.
OWNER = """
import time
from cluster.local import LocalCluster

with LocalCluster(nodes=2) as cluster:
    print(cluster.keeper.pid, cluster.folder, flush=True)
    time.sleep(1000)
"""


def attached(cluster: LocalCluster, code: str) -> object:
    """Return the output of a driver with this code."""
    env = {**os.environ, **cluster.environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout.splitlines()[-1])


def wait_until_dead(cluster: LocalCluster, lost: Node) -> None:
    """Wait until the cluster reports this node, and only this one, as dead."""
    alive = attached(cluster, NODES.format(id=lost.id))
    assert isinstance(alive, dict)
    assert not alive[lost.id]
    assert all(alive[node.id] for node in cluster.nodes.values() if node != lost)


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    """Return whether a condition becomes true within some seconds."""
    deadline = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return held


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(nodes=2, cpus=2, gpus=1) as cluster:
        yield cluster


def test_every_node_offers_its_configured_resources(cluster: LocalCluster) -> None:
    ids = {node.id for node in cluster.nodes.values()}
    spread = attached(cluster, SPREAD)
    assert isinstance(spread, list)
    assert {node for node, _ in spread} == ids
    assert {gpus for _, gpus in spread} == {"0"}


@pytest.mark.parametrize("hangs", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["killed", "hung"])
def test_lost_node_is_dead_and_leaves_no_process(cluster: LocalCluster, hangs: bool) -> None:
    node = cluster.add_node()
    own = {p.pid for p in cluster.processes() if node.raylet in (p.pid, p.parent)}
    assert len(own) > 1
    if hangs:
        cluster.stop_node(node.number)
        wait_until_dead(cluster, node)
    cluster.kill_node(node.number)
    assert not own & {p.pid for p in processes()}
    wait_until_dead(cluster, node)


def test_killed_keeper_leaves_no_process_and_no_file() -> None:
    with LocalCluster(nodes=2) as cluster:
        session, folder = cluster.keeper.pid, Path(cluster.folder)
        assert len(processes_of_session(session)) > 5
        cluster.keeper.kill()
    assert not processes_of_session(session)
    assert not folder.exists()


def test_killed_owner_leaves_no_process_and_no_file() -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], cwd=ROOT, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        session, folder = owner.stdout.readline().split()
        assert len(processes_of_session(int(session))) > 5
        owner.kill()
    assert within(30, lambda: not processes_of_session(int(session)) and not Path(folder).exists())


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_command_prints_how_to_use_the_cluster_and_stops_it_on(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "cluster.local", "--nodes", "1", "--cpus", "1"]
    # The signal may be ignored in this process, for example in the background of a shell.
    heed = partial(signal.signal, number, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=heed) as owner:
        assert owner.stdout is not None
        said = [owner.stdout.readline() for _ in range(4)]
        (keeper,) = [p for p in processes() if p.parent == owner.pid]
        owner.send_signal(number)
        assert owner.wait(30) == 0
    assert not processes_of_session(keeper.session)
    assert said[0].startswith("1 nodes at 127.0.0.1:")
    assert re.search(
        r"export RAY_\S+ RAY_AUTH_MODE=token RAY_AUTH_TOKEN=[0-9a-f]{64} RAY_ADDRESS=127.0.0.1:\d+$", said[1]
    )
    assert "patternnet fit" in said[2]
    assert re.search(r"patternnet submit --address http://127.0.0.1:\d+ fit", said[3])
