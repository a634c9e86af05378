"""Examine every node of a cluster before a long run and report each problem with its fix."""

import contextlib
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from patterns import UserError
from ray_jobs.config import Resources
from ray_jobs.engine.ray_session import choose_worker_cpus, connect, count_worker_slots, make_worker_options
from ray_jobs.io.object_store import locate, publish, remove
from ray_jobs.ops import node_probe
from ray_jobs.ops.node_probe import Facts
from ray_jobs.units import format_bytes

COMMON = 16  # shards that every node reads; each node also reads its share of the others
NAMED = 4  # maximum number of nodes that are named for one problem
SKEW = 5.0  # maximum difference of a node's clock in seconds, because heartbeats carry the time
FREE_DISK = 1 << 30  # minimum of free bytes on a disk
FREE_MEMORY = 2 << 30  # bytes of a worker with a model of moderate size


@dataclass(frozen=True)
class Node:
    """A node of the cluster.

    Attributes:
        address: IP address.
        offered: The node's resources as Ray reports them.
        facts: The probe's result; None if the node did not answer.
        lost: The reason why the node did not answer; empty if it did.
        skew: Lower bound of the difference of its clock, in seconds.
    """

    address: str
    offered: dict[str, float]
    facts: Facts | None
    lost: str = ""
    skew: float = 0.0

    def cells(self) -> list[str]:
        """Return the node's row: address, host, CPUs, GPUs, free memory and disk, read and decoding rate, version."""
        if self.facts is None:
            return [self.address, "?", *["-"] * 7]
        facts = self.facts
        total, used = facts["memory"] or (0, 0)
        free = min((free for _, free in (facts["disks"] or {}).values()), default=0)
        gpus = ", ".join(name for name, _, _ in facts["gpus"] or ()) or "-"
        speed = f"{format_bytes(int(facts['speed']))}/s" if facts["speed"] else "-"
        cpus = self.offered.get("CPU", 0)
        decoding = f"{cpus * facts['decoding']:.0f}" if facts["decoding"] else "-"
        version = f"{(facts['packages'] or {}).get('patternnet-ray', '-')} {facts['code'] or ''}"
        memory_and_disk = format_bytes(total - used), format_bytes(free)
        return [
            self.address,
            facts["host"] or "?",
            f"{cpus:g}",
            gpus,
            *memory_and_disk,
            speed,
            decoding,
            version,
        ]


@dataclass(frozen=True)
class Diagnosis:
    """The result of an examination.

    Attributes:
        nodes: The nodes of the cluster.
        workers: Number of workers that fit the cluster.
        cpus: Number of CPUs of each.
        problems: The problems, each with its place and fix.
    """

    nodes: list[Node]
    workers: int
    cpus: float
    problems: list[UserError]


def examine(resources: Resources, shards: Sequence[str], out: str | None, patience: float) -> Diagnosis:
    """Examine all nodes of a cluster at the same time.

    Args:
        resources: The resources of a worker, and the address of the cluster.
        shards: The shards that the job will read.
        out: The folder that the job will write; None to skip it.
        patience: Timeout of a node in seconds.

    Raises:
        UserError: If the cluster cannot be reached, or `out` cannot be written from here.
    """
    with connect(resources), marker_file(out) as mark:
        found = probe_nodes(shards, out, mark, patience)
        mine = node_probe.probe((), None, mark)
        problems = [p for node in found for p in (*node_problems(node, out), *version_differences(node, mine))]
        cpus = choose_worker_cpus(resources)
        try:
            workers = count_worker_slots(make_worker_options(resources))
        except UserError as error:
            workers, problems = 0, [*problems, error]
    return Diagnosis(found, workers, cpus, group(problems))


def group(problems: Sequence[UserError]) -> list[UserError]:
    """Return each problem once, with the nodes that have it."""
    nodes_of: dict[tuple[str, str, str | None], list[str]] = {}
    for problem in problems:
        nodes_of.setdefault((problem.what, problem.remedy, problem.parameter), []).append(problem.where)
    return [UserError(name_some(nodes), *problem) for problem, nodes in nodes_of.items()]


def name_some(nodes: Sequence[str]) -> str:
    """Return the names of the first nodes and the number of the others."""
    more = f" and {len(nodes) - NAMED} more" if len(nodes) > NAMED else ""
    return f"{', '.join(nodes[:NAMED])}{more}"


@contextlib.contextmanager
def marker_file(out: str | None) -> Iterator[str]:
    """Create a file in a folder for the duration of the block and yield its name.

    Other nodes look for the file to confirm that they see the same folder.

    Raises:
        UserError: If the file cannot be written.
    """
    mark = f"doctor-{secrets.token_hex(8)}"
    if out is None:
        yield mark
        return
    folder = locate(out)
    fresh = not folder.exists()
    with publish(folder) as local:
        (local / mark).touch()
    try:
        yield mark
    finally:
        remove(folder / mark)
        if fresh and folder.local is not None:
            with contextlib.suppress(OSError):  # a job uses the folder already
                folder.local.rmdir()


def probe_nodes(shards: Sequence[str], out: str | None, mark: str, patience: float) -> list[Node]:
    """Run the probe on every node that is alive; a node without an answer in time is reported as lost."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    cloudpickle.register_pickle_by_value(node_probe)  # nodes may lack this program, or have another version
    probe = ray.remote(node_probe.probe)
    begun, asked = time.time(), {}
    for number, node in enumerate(alive):
        on_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = probe.options(num_cpus=0, max_retries=0, scheduling_strategy=on_node)
        asked[task.remote(share(shards, number, len(alive)), out, mark)] = node
    answers, waiting, deadline = {}, list(asked), time.monotonic() + patience
    while waiting and time.monotonic() < deadline:
        done, waiting = ray.wait(waiting, timeout=deadline - time.monotonic())
        for each in done:
            answers[each] = answer(each, asked[each], begun)
    silent = f"no answer within {patience:.0f} s"
    return [answers.get(each) or describe_node(node, None, silent) for each, node in asked.items()]


def answer(task: Any, node: dict[str, Any], begun: float) -> Node:
    """Return a node with the probe's result."""
    try:
        facts = ray.get(task)
    except Exception as error:  # any failure is a property of the node to be reported
        return describe_node(node, None, f"tasks do not run there ({' '.join(str(error).split())[:200]})")
    skew = max(begun - facts["time"], facts["time"] - time.time(), 0.0)
    return describe_node(node, facts, skew=skew)


def describe_node(node: dict[str, Any], facts: Facts | None, lost: str = "", skew: float = 0.0) -> Node:
    """Return a node from Ray's description of it and the probe's result."""
    return Node(node["NodeManagerAddress"], node["Resources"], facts, lost, skew)


def share(shards: Sequence[str], number: int, of: int) -> list[str]:
    """Return the shards that a node reads: first its share of all shards, then some that every node reads."""
    common = shards[:: -(-len(shards) // COMMON) or 1]
    return list(dict.fromkeys((*shards[number::of], *common)))


def node_problems(node: Node, out: str | None) -> Iterator[UserError]:
    """Yield the problems of a node that do not depend on other nodes."""
    if node.facts is None:
        yield UserError(node.address, node.lost, "Read the log of its raylet, or remove the node from the cluster.")
        return
    facts, where = node.facts, f"{node.address} ({node.facts['host']})"
    if facts["code"] is None:
        yield UserError(where, "patternnet-ray is not installed", "Install it, or submit with --working-dir.")
        return
    max_disk, max_memory = facts["limits"] or (node_probe.RAYS_LIMIT,) * 2
    for folder, (total, free) in (facts["disks"] or {}).items():
        rays = folder != out
        if free < FREE_DISK or (rays and free < (1 - max_disk) * total):
            what = f"the disk of {folder} is full: {format_bytes(free)} of {format_bytes(total)} are free"
            rule = f" Ray starts nothing on a node whose disk is {100 * max_disk:g} % full." if rays else ""
            yield UserError(where, what, f"Free disk space.{rule}")
    if facts["memory"]:
        total, used = facts["memory"]
        if total - used < FREE_MEMORY or used > max_memory * total:
            what = f"{format_bytes(total - used)} of {format_bytes(total)} memory are free"
            rule = f"Ray kills workers on a node that is {100 * max_memory:g} % full"
            yield UserError(where, what, f"Stop other processes on the node. {rule}.")
    yield from gpu_problems(node, where)
    for shard, reason in (facts["unreadable"] or {}).items():
        yield UserError(
            where, f"{shard} {reason}", "Fix the shard, mount its folder on the node, or pass the credentials."
        )
    for name, error in facts["errors"].items():
        what, remedy = FAILED.get(name, (f"cannot determine its {name}", "Read the log of its raylet."))
        yield UserError(where, f"{what.format(out=out)}: {error}", remedy)
    if node.skew > SKEW:
        yield UserError(where, f"its clock is off by {node.skew:.0f} s", "Synchronize it by NTP.")


FAILED = {
    "written": (
        "--out {out}",
        "Mount the folder on the node, free disk space, fix the permissions, or pass the credentials.",
    ),
    "gpus": ("its GPUs do not work", "Run `nvidia-smi` on the node and check the version of the driver."),
}


def gpu_problems(node: Node, where: str) -> Iterator[UserError]:
    """Yield differences between the GPUs that Ray offers and those that torch can use."""
    assert node.facts is not None
    offered, seen = round(node.offered.get("GPU", 0)), len(node.facts["gpus"] or ())
    if seen < offered and "gpus" not in node.facts["errors"]:
        remedy = "Install the driver and torch for CUDA on the node, or start it with fewer GPUs (--num-gpus)."
        yield UserError(where, f"Ray offers {offered} GPUs, torch sees {seen}", remedy)
    if seen > offered:
        yield UserError(
            where, f"torch sees {seen} GPUs, Ray offers {offered}", f"Start the node with --num-gpus {seen}."
        )


def version_differences(node: Node, mine: Facts) -> Iterator[UserError]:
    """Yield an error for each package whose version on a node differs from that of this process, and for other code."""
    if node.facts is None or node.facts["code"] is None:
        return
    where = f"{node.address} ({node.facts['host']})"
    for name, wanted in {"Python": mine["python"], **mine["packages"]}.items():
        there = node.facts["python"] if name == "Python" else node.facts["packages"].get(name, "none")
        if there != wanted:
            yield UserError(where, f"{name} {there}, but {wanted} here", "Install the same version on all nodes.")
    if node.facts["code"] != mine["code"]:
        yield UserError(
            where, "its code of patternnet-ray differs from the code here", "Install the same version on all nodes."
        )
