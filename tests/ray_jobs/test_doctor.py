"""Faults planted in a real cluster, and whether they are found."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local import ROOT, LocalCluster
from ray_jobs.ops.node_probe import WRITTEN, write
from ray_jobs.ops.preflight import EVERYWHERE, SKEW, Node, of_node, share
from tests.conftest import make_shards

# What hides this program from the processes of a node.
HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("patterns", "ray_jobs"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""
# What makes a cluster say that it was started with another Ray.
AS_OTHER_RAY = """
import json, sys
from ray._raylet import GcsClient
gcs = GcsClient(address=sys.argv[1])
told = json.loads(gcs.internal_kv_get(b"CLUSTER_METADATA", b"cluster"))
was, told["ray_version"] = told["ray_version"], sys.argv[2]
gcs.internal_kv_put(b"CLUSTER_METADATA", json.dumps(told).encode(), True, b"cluster")
print(was)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """One that is content with the disk and the memory that this machine happens to have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_local_fs_capacity_threshold", "1")
        patch.setenv("RAY_memory_usage_threshold", "1")
        with LocalCluster(nodes=1, cpus=1) as cluster:
            yield cluster


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    return [str(path) for path in make_shards(tmp_path / "shards", 4, 2)]


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk without room."""
    folder = tmp_path / "full"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], check=False)
    if mounted.returncode:
        pytest.skip("no right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def doctor(cluster: LocalCluster, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ray_jobs", "doctor", *map(str, arguments)]
    env = {**os.environ, **cluster.environment}
    # From elsewhere than the checkout, since Ray's workers look first where their driver was started.
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=240, cwd="/")


def other_version(folder: Path) -> dict[str, str]:
    """The environment of a node with another version of this program, of other code."""
    for name in ("patterns", "ray_jobs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "patterns" / "more.py").write_text("MORE = 1\n")
    (folder / "patternnet_ray-9.9.dist-info").mkdir()
    (folder / "patternnet_ray-9.9.dist-info" / "METADATA").write_text("Name: patternnet-ray\nVersion: 9.9\n")
    return {"PYTHONPATH": str(folder)}


def test_a_cluster_in_order_has_nothing_to_mend_and_nothing_is_left_behind(
    cluster: LocalCluster, shards: list[str], tmp_path: Path
) -> None:
    found = doctor(cluster, "--shards", f"{tmp_path}/shards/train-{{000..003}}.tar", "--out", tmp_path / "run")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "1 nodes, with room for 1 workers; 4 shards looked at" in found.stdout
    assert "doctor: nothing to mend" in found.stdout
    assert not found.stderr
    assert not (tmp_path / "run").exists()


def test_every_planted_fault_is_found_and_named_with_its_node(
    cluster: LocalCluster, shards: list[str], full: Path, tmp_path: Path
) -> None:
    (tmp_path / "hiding").mkdir()
    (tmp_path / "hiding" / "sitecustomize.py").write_text(HIDE)
    Path(shards[2]).write_bytes(b"no tar at all" * 100)
    gone = "http://127.0.0.1:9/gone.tar"
    added = [
        cluster.add_node(env=other_version(tmp_path / "other")),
        cluster.add_node(env={"PYTHONPATH": str(tmp_path / "hiding")}),
        cluster.add_node(env={"RAY_local_fs_capacity_threshold": "0.001"}, num_gpus=1),
    ]
    hung = cluster.add_node()  # which the cluster gives up after some seconds
    cluster.stop_node(hung.number)
    try:
        given = [word for shard in (*shards, gone) for word in ("--shards", shard)]
        found = doctor(cluster, *given, "--out", full, "--patience", "45s", "--gpus-per-worker", "2")
    finally:
        for node in (*added, hung):
            cluster.kill_node(node.number)
    assert found.returncode == 2
    faults = [line.strip() for line in found.stdout.splitlines() if line.startswith("  ")]
    node = "127.0.0.1 ("
    planted = {  # how many nodes have it; three have this program as it is
        "127.0.0.1: nothing runs there (The task is not schedulable": 0,
        "patternnet-ray 9.9, but ": 1,
        "its code of patternnet-ray is not the code here": 1,
        "patternnet-ray is not installed there": 1,
        "Ray offers 1 GPUs, torch sees 0": 1,
        f"the disk of {full} is full": 3,
        " of Ray's that is 0.1 % full it starts nothing": 1,
        f"{shards[2]} cannot be read (not a tar archive": 3,
        f"{gone} cannot be read, because the server does not answer (<urlopen error": 3,
        f"--out {full}: cannot be written (No space left on device)": 3,
        "--cpus-per-worker --gpus-per-worker: no node can hold a worker of 1 CPUs and 2 GPUs": 0,
    }
    for what, nodes in planted.items():
        (fault,) = [fault for fault in faults if what in fault]
        assert fault[: fault.index(what)].count(node) == nodes, fault
    assert (
        found.stderr == f"patternnet: doctor: {len(faults)} things to mend before a long run. They are listed above.\n"
    )
    assert not list(full.iterdir())


def test_a_cluster_of_another_ray_is_named_in_one_line(cluster: LocalCluster) -> None:
    def as_if(version: str) -> str:
        command = [sys.executable, "-c", AS_OTHER_RAY, cluster.address, version]
        env = {**os.environ, **cluster.environment}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()

    true = as_if("2.9.9")
    try:
        found = doctor(cluster)
    finally:
        assert as_if(true) == "2.9.9"
    assert found.returncode == 2
    assert "The cluster was started with Ray 2.9.9 Python" in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_a_folder_that_is_not_the_drivers_is_told_and_left_as_it_was(tmp_path: Path) -> None:
    """As where `--out` is a path of each machine's own."""
    with pytest.raises(OSError, match="not the folder that the driver sees"):
        write(str(tmp_path / "own"), "mark-of-the-driver")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mark-of-the-driver").touch()
    assert write(str(tmp_path), "mark-of-the-driver") == WRITTEN
    assert [path.name for path in tmp_path.iterdir()] == ["mark-of-the-driver"]


def test_a_clock_that_is_off_is_told_by_how_much() -> None:
    nothing = dict.fromkeys(("disks", "memory", "limits", "gpus", "unreadable"))
    facts = {"host": "h", "code": "c", "errors": {}, **nothing}
    assert not list(of_node(Node("10.0.0.1", {}, facts, skew=SKEW / 2), None))
    (trouble,) = of_node(Node("10.0.0.1", {}, facts, skew=90.0), None)
    assert str(trouble) == "10.0.0.1 (h): its clock is off by 90 s. Have it kept by NTP."


@pytest.mark.parametrize("count", [0, 1, 5, EVERYWHERE, 1000, 1001])
@pytest.mark.parametrize("nodes", [1, 3, 40])
def test_every_shard_is_tried_by_some_node_and_some_by_all(count: int, nodes: int) -> None:
    shards = [f"{n}.tar" for n in range(count)]
    shares = [share(shards, number, nodes) for number in range(nodes)]
    assert set().union(*shares) == set(shards)
    assert len(set.intersection(*map(set, shares))) >= min(count, EVERYWHERE // 2)
    assert all(len(set(each)) == len(each) <= -(-count // nodes) + EVERYWHERE for each in shares)
