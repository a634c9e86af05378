"""The process that owns the nodes of a cluster on this machine, and takes all of them with it when it ends.

`cluster.local` starts it and talks to it: a line of JSON on its stdin adds a node of these resources, the first of
them the head, and is answered by a line on stdout once the node has joined. It ends when its stdin does, so also
when its owner is killed. A node whose raylet has died is buried, as all processes of a lost machine end with it.
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

LOOK_EVERY = 0.05  # seconds between two looks for raylets that have died
# A node is given up some 10 s after it fell silent, which takes Ray's own figures a minute, and a busy machine's nodes
# may be silent for a few.
QUICK_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 8,
}


def keep() -> None:
    """Serve the owner's requests until there can be none any more."""
    cluster = Cluster()
    while True:
        readable, _, _ = select.select([sys.stdin], [], [], LOOK_EVERY)
        if readable:
            request = sys.stdin.readline()
            if not request:
                break
            print(json.dumps(add_node(cluster, json.loads(request))), flush=True)
        bury_the_dead(cluster)
    cluster.shutdown()


def add_node(cluster: Cluster, resources: dict[str, Any]) -> dict[str, Any]:
    """Start a node and wait until it has joined. Gives what its owner needs to know of it."""
    # Any free ports: another Ray of this machine may hold the usual ones.
    options = {**resources, "dashboard_agent_listen_port": 0, "dashboard_port": None}
    if cluster.head_node is None:
        options["_system_config"] = QUICK_HEALTH_CHECKS
    node = cluster.add_node(**options)
    raylet = node.all_processes["raylet"][0].process.pid
    return {"id": node.node_id, "raylet": raylet, "address": cluster.address, "dashboard": cluster.webui_url}


def bury_the_dead(cluster: Cluster) -> None:
    """End and reap what is left of nodes whose raylet has died: workers outlive a raylet that is not reaped."""
    for node in cluster.list_all_nodes():
        if node.all_processes["raylet"][0].process.poll() is not None:
            cluster.remove_node(node, allow_graceful=False)


def main(folder: Path) -> None:
    """Keep nodes until the owner is gone; then end every process of this session and delete the folder of its files."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ["RAY_TMPDIR"] = str(folder)  # else the address would be noted for every Ray of this machine
    try:
        with contextlib.suppress(KeyboardInterrupt):
            keep()
    finally:
        end_session(os.getsid(0), but=os.getpid())
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
