"""Whether a cluster is fit for a long run, before it begins: looked at from every node, said with what to mend."""

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
from ray_jobs.engine.ray_session import connect, count_worker_slots, make_worker_options
from ray_jobs.io.object_store import located, published, remove
from ray_jobs.ops import node_probe
from ray_jobs.ops.node_probe import Facts
from ray_jobs.units import format_bytes

EVERYWHERE = 16  # shards that every node tries; of more, each node tries its share beside them
NAMED = 4  # nodes with the same trouble that are named
SKEW = 5.0  # seconds that a node's clock may differ: drivers are held for dead by the time they were last heard
ROOM = 1 << 30  # bytes that a disk should have free
MEMORY = 2 << 30  # bytes that a worker takes with a model of moderate size


@dataclass(frozen=True)
class Node:
    """A node of the cluster. facts: what it found out about itself; None where it did not answer, and `lost` says why.

    offered: its resources as Ray has them.  skew: seconds that its clock differs at least.
    """

    address: str
    offered: dict[str, float]
    facts: Facts | None
    lost: str = ""
    skew: float = 0.0

    def cells(self) -> list[str]:
        """Address, host, CPUs, GPUs, free memory and disk, bytes a second of the source, and version of the code."""
        if self.facts is None:
            return [self.address, "?", *["-"] * 6]
        facts = self.facts
        total, used = facts["memory"] or (0, 0)
        free = min((free for _, free in (facts["disks"] or {}).values()), default=0)
        gpus = ", ".join(name for name, _, _ in facts["gpus"] or ()) or "-"
        speed = f"{format_bytes(int(facts['speed']))}/s" if facts["speed"] else "-"
        version = f"{(facts['packages'] or {}).get('patternnet-ray', '-')} {facts['code'] or ''}"
        room = format_bytes(total - used), format_bytes(free)
        return [self.address, facts["host"] or "?", f"{self.offered.get('CPU', 0):g}", gpus, *room, speed, version]


@dataclass(frozen=True)
class Diagnosis:
    """workers: how many the cluster holds.  troubles: what must be mended, where, and how."""

    nodes: list[Node]
    workers: int
    troubles: list[UserError]


def examine(resources: Resources, shards: Sequence[str], out: str | None, patience: float) -> Diagnosis:
    """Look at a cluster from each of its nodes at the same time.

    patience: seconds that a node may take. UserError where the cluster itself cannot be reached.
    """
    with connect(resources), marked(out) as mark:
        found = looked(shards, out, mark, patience)
        mine = node_probe.look((), None, mark)
        troubles = [trouble for node in found for trouble in (*of_node(node, out), *differences(node, mine))]
        try:
            workers = count_worker_slots(make_worker_options(resources))
        except UserError as error:
            workers, troubles = 0, [*troubles, error]
    return Diagnosis(found, workers, together(troubles))


def together(troubles: Sequence[UserError]) -> list[UserError]:
    """Each trouble once, with the places that have it."""
    places_of: dict[tuple[str, str], list[str]] = {}
    for trouble in troubles:
        places_of.setdefault((trouble.what, trouble.remedy), []).append(trouble.where)
    return [UserError(listed(where), what, remedy) for (what, remedy), where in places_of.items()]


def listed(places: Sequence[str]) -> str:
    more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
    return f"{', '.join(places[:NAMED])}{more}"


@contextlib.contextmanager
def marked(out: str | None) -> Iterator[str]:
    """The name of a file that stands in a folder meanwhile. UserError where it cannot be written."""
    mark = f"doctor-{secrets.token_hex(8)}"
    if out is None:
        yield mark
        return
    folder = located(out)
    fresh = not folder.exists()
    with published(folder) as local:
        (local / mark).touch()
    try:
        yield mark
    finally:
        remove(folder / mark)
        if fresh and folder.local is not None:
            with contextlib.suppress(OSError):  # it is in use by now
                folder.local.rmdir()


def looked(shards: Sequence[str], out: str | None, mark: str, patience: float) -> list[Node]:
    alive = [node for node in ray.nodes() if node["Alive"]]
    cloudpickle.register_pickle_by_value(node_probe)  # so that it runs where this program is missing, or another
    look = ray.remote(node_probe.look)
    begun, asked = time.time(), {}
    for number, node in enumerate(alive):
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = look.options(num_cpus=0, max_retries=0, scheduling_strategy=there)
        asked[task.remote(share(shards, number, len(alive)), out, mark)] = node
    answers, waiting, deadline = {}, list(asked), time.monotonic() + patience
    while waiting and time.monotonic() < deadline:
        done, waiting = ray.wait(waiting, timeout=deadline - time.monotonic())
        for each in done:
            answers[each] = answer(each, asked[each], begun)
    silent = f"it did not answer within {patience:.0f} s"
    return [answers.get(each) or named(node, None, silent) for each, node in asked.items()]


def answer(task: Any, node: dict[str, Any], begun: float) -> Node:
    try:
        facts = ray.get(task)
    except Exception as error:  # whatever is wrong with the node is what is to be told
        return named(node, None, f"nothing runs there ({' '.join(str(error).split())[:200]})")
    skew = max(begun - facts["time"], facts["time"] - time.time(), 0.0)
    return named(node, facts, skew=skew)


def named(node: dict[str, Any], facts: Facts | None, lost: str = "", skew: float = 0.0) -> Node:
    return Node(node["NodeManagerAddress"], node["Resources"], facts, lost, skew)


def share(shards: Sequence[str], number: int, of: int) -> list[str]:
    """The shards that a node tries: some that all do, and its share of the others. It reads its own first."""
    common = shards[:: -(-len(shards) // EVERYWHERE) or 1]
    return list(dict.fromkeys((*shards[number::of], *common)))


def of_node(node: Node, out: str | None) -> Iterator[UserError]:
    """What is wrong with a node by itself."""
    if node.facts is None:
        yield UserError(node.address, node.lost, "Look at its log, or take it out of the cluster.")
        return
    facts, where = node.facts, f"{node.address} ({node.facts['host']})"
    if facts["code"] is None:
        yield UserError(where, "patternnet-ray is not installed there", "Install it, or submit with --working-dir.")
        return
    most_disk, most_memory = facts["limits"] or (node_probe.RAYS_LIMIT,) * 2
    for place, (total, free) in (facts["disks"] or {}).items():
        rays = place != out
        if free < ROOM or (rays and free < (1 - most_disk) * total):
            what = f"the disk of {place} is full: {format_bytes(free)} of {format_bytes(total)} are free"
            rule = f"; on a disk of Ray's that is {100 * most_disk:g} % full it starts nothing" if rays else ""
            yield UserError(where, what, f"Make room{rule}.")
    if facts["memory"]:
        total, used = facts["memory"]
        if total - used < MEMORY or used > most_memory * total:
            what = f"{format_bytes(total - used)} of {format_bytes(total)} memory are free"
            rule = f"Ray kills workers on a node that is {100 * most_memory:g} % full"
            yield UserError(where, what, f"End what else runs there; {rule}.")
    yield from of_gpus(node, where)
    for shard, reason in (facts["unreadable"] or {}).items():
        yield UserError(where, f"{shard} {reason}", "Mend it, mount it there, or give the credentials.")
    for name, error in facts["errors"].items():
        what, remedy = COULD_NOT.get(name, (f"no telling of its {name}", "Look at its log."))
        yield UserError(where, f"{what.format(out=out)}: {error}", remedy)
    if node.skew > SKEW:
        yield UserError(where, f"its clock is off by {node.skew:.0f} s", "Have it kept by NTP.")


COULD_NOT = {
    "written": ("--out {out}", "Mount it there, make room, or give the right or the credentials."),
    "gpus": ("its GPUs do not work", "Check `nvidia-smi` and the driver's version there."),
}


def of_gpus(node: Node, where: str) -> Iterator[UserError]:
    assert node.facts is not None
    offered, seen = round(node.offered.get("GPU", 0)), len(node.facts["gpus"] or ())
    if seen < offered and "gpus" not in node.facts["errors"]:
        remedy = "Install the driver and torch for CUDA there, or start the node with fewer GPUs (--num-gpus)."
        yield UserError(where, f"Ray offers {offered} GPUs, torch sees {seen}", remedy)
    if seen > offered:
        yield UserError(
            where, f"torch sees {seen} GPUs, Ray offers {offered}", f"Start the node with --num-gpus {seen}."
        )


def differences(node: Node, mine: Facts) -> Iterator[UserError]:
    """Where a node has not what this process has."""
    if node.facts is None or node.facts["code"] is None:
        return
    where = f"{node.address} ({node.facts['host']})"
    for name, wanted in {"Python": mine["python"], **mine["packages"]}.items():
        there = node.facts["python"] if name == "Python" else node.facts["packages"].get(name, "none")
        if there != wanted:
            yield UserError(where, f"{name} {there}, but {wanted} here", "Install the same everywhere.")
    if node.facts["code"] != mine["code"]:
        yield UserError(where, "its code of patternnet-ray is not the code here", "Install the same everywhere.")
