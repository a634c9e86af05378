"""The process that owns the nodes of a local cluster and ends all of them when it ends.

`cluster.local` starts it. A line of JSON on stdin adds a node with these resources; the first node is the head. A line
on stdout answers once the node has joined. The process ends when its stdin is closed, so also when its owner is killed.
If the raylet of a node has died, all other processes of the node are ended, as on a lost machine.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from cluster.processes import end_session

CHECK_EVERY = 0.05  # seconds between two checks for raylets that have died
# Ray gives up a silent node after about 10 s instead of a minute. Nodes of a busy machine are silent for a few seconds.
QUICK_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 8,
}


def keep() -> None:
    """Serve the owner's requests until stdin is closed."""
    cluster = Cluster()
    while True:
        readable, _, _ = select.select([sys.stdin], [], [], CHECK_EVERY)
        if readable:
            request = sys.stdin.readline()
            if not request:
                break
            print(json.dumps(add_node(cluster, json.loads(request))), flush=True)
        remove_dead_nodes(cluster)
    cluster.shutdown()


def add_node(cluster: Cluster, resources: dict[str, Any]) -> dict[str, Any]:
    """Start a node, wait until it has joined, and return its id, addresses and the process id of its raylet."""
    # Any free ports, because another Ray on this machine may use the usual ones.
    options = {**resources, "dashboard_agent_listen_port": 0, "dashboard_port": None}
    if cluster.head_node is None:
        options["_system_config"] = QUICK_HEALTH_CHECKS
    node = cluster.add_node(**options)
    raylet = node.all_processes["raylet"][0].process.pid
    return {"id": node.node_id, "raylet": raylet, "address": cluster.address, "dashboard": cluster.webui_url}


def remove_dead_nodes(cluster: Cluster) -> None:
    """End the processes of nodes whose raylet has died: workers outlive a raylet that is not reaped."""
    for node in cluster.list_all_nodes():
        if node.all_processes["raylet"][0].process.poll() is not None:
            cluster.remove_node(node, allow_graceful=False)


def main(folder: Path) -> None:
    """Keep nodes until the owner is gone; then end every process of this session and delete its folder."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ["RAY_TMPDIR"] = str(folder)  # else Ray publishes the address to all programs of this machine
    try:
        with contextlib.suppress(KeyboardInterrupt):
            keep()
    finally:
        end_session(os.getsid(0), except_pid=os.getpid())
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
