"""The connection of a driver to Ray, and the nodes of the cluster."""

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from patterns import UserError
from ray_jobs.config import Resources
from ray_jobs.engine.environment import choose_temporary_folder, ensure_token
from ray_jobs.engine.ray_address import (
    no_answer_error,
    no_token_error,
    require_answer,
    resolve_address,
    version_error,
)
from ray_jobs.engine.ray_tasks import LocalTasks, RayTasks, Tasks
from ray_jobs.engine.signals import stop_signals
from ray_jobs.io.file_systems import format_message

MAX_CPUS = 8  # that a worker with a GPU takes by default; more decoding processes than that feed it no faster
REQUIREMENTS = {"CPU": "num_cpus", "GPU": "num_gpus"}  # a node's resources, and the actor options that take them


@contextlib.contextmanager
def connect(resources: Resources) -> Iterator[Tasks]:
    """Connect to the cluster that is asked for, or start a Ray on this machine. A job without workers needs no Ray.

    Args:
        resources: What the job takes from the cluster.

    Yields:
        Where to call pure functions.

    Raises:
        UserError: If the cluster does not answer, or Ray cannot be started.
    """
    if resources.workers == 0:
        yield LocalTasks()
        return
    if ray.is_initialized():  # a notebook or a test has connected already
        yield RayTasks()
        return
    address = resources.address or os.environ.get("RAY_ADDRESS", "").strip()
    # In the main thread, ray.init() would replace the handler of SIGTERM. Ray's processes end with the thread that
    # started them, so this one lives as long as the connection.
    with ThreadPoolExecutor(1) as thread:
        try:
            with uninterrupted():
                thread.submit(attach_or_start, address).result()
            yield RayTasks()
        finally:
            with uninterrupted():
                ray.shutdown()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay signals until the block ends, because Ray aborts or leaves processes behind if it is interrupted."""
    with stop_signals() as stopped:
        yield
    if stopped():
        raise KeyboardInterrupt


def attach_or_start(address: str) -> None:
    """Attach to a cluster, or start Ray on this machine.

    Args:
        address: The address of the cluster, `auto` for a cluster on this machine, or an empty string to start Ray.

    Raises:
        UserError: If Ray cannot be started, or no cluster of the same version answers and accepts the token.
    """
    address = resolve_address(address)
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        require_answer(address)
    else:
        # "auto" would attach to another Ray on this machine, which may be somebody else's.
        address = "local"
        ensure_token()
        options |= {"include_dashboard": False, "_temp_dir": choose_temporary_folder()}
    try:
        ray.init(address=address, **options)
    except AuthenticationError as error:
        raise no_token_error(address) from error
    except Exception as error:  # Ray's errors about a cluster or a machine have no common base
        if "Version mismatch" in str(error):
            raise version_error(address, str(error)) from error
        if address != "local":
            raise no_answer_error(address) from error
        what = f"Ray cannot be started here ({format_message(error)})"
        remedy = "Check memory, disk, `ulimit -n` and RAY_TMPDIR, or run with --workers 0."
        raise UserError("ray", what, remedy) from error


def worker_gpus(resources: Resources) -> float | None:
    """Return the number of GPUs per worker: as asked for, else 1 if the cluster has any.

    Returns:
        The number; None if it depends on a cluster that is not connected yet.
    """
    if resources.workers == 0:
        return 0.0
    if resources.gpus_per_worker is not None or not ray.is_initialized():
        return resources.gpus_per_worker
    return 1.0 if any(node.get("GPU", 0) for node in list_nodes()) else 0.0


def choose_worker_cpus(resources: Resources) -> float:
    """Return the number of CPUs per worker: as asked for, else those that the nodes have for each worker with a GPU.

    It is 1 for workers without a GPU, if the cluster is not connected, and if the cluster is asked to grow, by nodes
    that may have fewer CPUs.

    Args:
        resources: What the job takes from the cluster.
    """
    gpus = worker_gpus(resources)
    if resources.cpus_per_worker is not None or not gpus or resources.min_workers or not ray.is_initialized():
        return 1.0 if resources.cpus_per_worker is None else resources.cpus_per_worker
    return share_cpus(list_nodes(), gpus)


def share_cpus(nodes: Sequence[dict[str, float]], gpus: float) -> float:
    """Return how many CPUs each worker with a GPU can have.

    Each node keeps a CPU for the driver and its tasks, so that it holds as many workers as with one CPU for each. The
    node with the fewest CPUs for each worker decides.

    Args:
        nodes: The resources of each node.
        gpus: The number of GPUs per worker, more than 0.
    """
    workers = [count_on_node(node, {"num_cpus": 1.0, "num_gpus": gpus}) for node in nodes]
    shares = [int((node["CPU"] - 1) / count) for node, count in zip(nodes, workers) if count]
    return float(max(1, min([MAX_CPUS, *shares]))) if shares else 1.0


def make_worker_options(resources: Resources) -> dict[str, Any]:
    """Return the actor options of a worker.

    Args:
        resources: What the job takes from the cluster.

    Raises:
        UserError: If no node of the cluster can hold a worker, and the cluster is not asked to grow.
    """
    gpus = worker_gpus(resources)
    cpus = choose_worker_cpus(resources)
    options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "max_task_retries": 0}
    if not (resources.min_workers or count_worker_slots(options)):
        max_cpus, max_gpus = (max(node.get(name, 0) for node in list_nodes()) for name in REQUIREMENTS)
        raise UserError(
            "",
            f"no node can hold a worker of {options['num_cpus']:g} CPUs and {gpus:g} GPUs; "
            f"the largest has {max_cpus:g} CPUs and {max_gpus:g} GPUs",
            "Ask for less, or add nodes.",
            "cpus_per_worker",
        )
    return options


def count_worker_slots(options: dict[str, Any]) -> int:
    """Return how many workers the nodes of the cluster could hold if nothing else ran on them.

    Args:
        options: Actor options of a worker.
    """
    return sum(count_on_node(node, options) for node in list_nodes())


def count_on_node(node: dict[str, float], options: dict[str, Any]) -> int:
    """Return how many workers a node could hold if nothing else ran on it.

    Args:
        node: The resources of the node.
        options: Actor options of a worker.
    """
    ratios = [node.get(name, 0) / options[need] for name, need in REQUIREMENTS.items() if options[need] > 0]
    return int(min(ratios, default=1) + 1e-6)


def list_nodes() -> list[dict[str, float]]:
    """Return the resources of each node that is alive and not draining."""
    draining = list_draining_nodes()
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]


def list_draining_nodes() -> frozenset[str]:
    """Return the ids of the nodes that are about to be taken away."""
    try:
        # Ray has no public call for it outside Ray Train.
        return frozenset(ray._private.state.state.get_draining_nodes())
    except AttributeError:  # another version of Ray
        return frozenset()
