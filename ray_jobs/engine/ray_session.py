"""Ray, as every driver has it around it, and its nodes."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from patterns import UserError
from ray_jobs.config import Resources
from ray_jobs.engine.environment import choose_temporary_folder, ensure_token
from ray_jobs.engine.ray_address import no_answer_error, no_token_error, require_answer, resolve_address, version_error
from ray_jobs.engine.ray_tasks import InProcessTasks, RayTasks, Tasks
from ray_jobs.io.file_systems import message


@contextlib.contextmanager
def connect(resources: Resources) -> Iterator[Tasks]:
    """Ray: attached to the cluster that is meant, else started here; none for a job without workers.

    UserError where it does not answer.
    """
    if resources.workers == 0:
        yield InProcessTasks()
        return
    if ray.is_initialized():  # a notebook, or a test, that brought its own
        yield RayTasks()
        return
    terminated = signal.getsignal(signal.SIGTERM)
    start(resources.address or os.environ.get("RAY_ADDRESS", "").strip())
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminated)  # which Ray has made its own
    try:
        yield RayTasks()
    finally:
        ray.shutdown()


def start(named: str) -> None:
    """Attach to the cluster that is named, or start a Ray here. UserError if that fails, for whatever reason."""
    address = resolve_address(named)
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        require_answer(address)
    else:
        # A fresh Ray even if another runs on this machine: `auto` would attach to somebody else's.
        address = "local"
        ensure_token()
        options |= {"include_dashboard": False, "_temp_dir": choose_temporary_folder()}
    try:
        ray.init(address=address, **options)
    except AuthenticationError as error:
        raise no_token_error(address) from error
    except Exception as error:  # Ray has no common base for what can be wrong with a cluster or a machine
        if "Version mismatch" in str(error):
            raise version_error(address, str(error)) from error
        if address != "local":
            raise no_answer_error(address) from error
        what = f"Ray cannot be started here ({message(error)})"
        remedy = "Check memory, disk, `ulimit -n` and RAY_TMPDIR, or run with --workers 0."
        raise UserError("ray", what, remedy) from error


def worker_gpus(resources: Resources) -> float | None:
    """The GPUs of each worker: what is asked for, else one where there are any; None where no Ray can tell yet."""
    if resources.workers == 0:
        return 0.0
    if resources.gpus_per_worker is not None or not ray.is_initialized():
        return resources.gpus_per_worker
    return 1.0 if any(node.get("GPU", 0) for node in nodes()) else 0.0


def make_worker_options(resources: Resources) -> dict[str, Any]:
    """What each worker takes. UserError where no node could ever hold one."""
    gpus = worker_gpus(resources)
    options = {"num_cpus": resources.cpus_per_worker, "num_gpus": gpus, "max_restarts": 0, "max_task_retries": 0}
    if not (resources.min_workers or count_worker_slots(options)):
        cpus, most = (max(node.get(name, 0) for node in nodes()) for name in ("CPU", "GPU"))
        raise UserError(
            "--cpus-per-worker --gpus-per-worker",
            f"no node can hold a worker of {options['num_cpus']:g} CPUs and {gpus:g} GPUs; "
            f"the largest has {cpus:g} CPUs and {most:g} GPUs",
            "Ask for less, or add nodes.",
        )
    return options


def count_worker_slots(options: dict[str, Any]) -> int:
    """How many workers the cluster's nodes hold, were nothing else there."""

    def fits(node: dict[str, float]) -> int:
        shares = [node.get(name, 0) / options[need] for name, need in NEEDS.items() if options[need] > 0]
        return int(min(shares, default=1) + 1e-6)

    return sum(map(fits, nodes()))


NEEDS = {"CPU": "num_cpus", "GPU": "num_gpus"}


def nodes() -> list[dict[str, float]]:
    """The resources of each node that is alive and stays."""
    gone = draining()
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in gone]


def draining() -> frozenset[str]:
    """The nodes that are about to be taken away. Ray has no public call for it outside Ray Train."""
    try:
        return frozenset(ray._private.state.state.get_draining_nodes())
    except AttributeError:  # another version of Ray
        return frozenset()
