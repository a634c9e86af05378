"""`patternnet doctor` finds faults that are planted in a real cluster."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local import ROOT, LocalCluster
from ray_jobs.ops.node_probe import WRITTEN, write
from ray_jobs.ops.preflight import COMMON, SKEW, Node, node_problems, share
from tests.conftest import make_shards

# Hides this program from the processes of a node.
HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("patterns", "ray_jobs"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""
# Makes a cluster report that it was started with another Ray.
AS_OTHER_RAY = """
import json, sys
from ray._raylet import GcsClient
gcs = GcsClient(address=sys.argv[1])
metadata = json.loads(gcs.internal_kv_get(b"CLUSTER_METADATA", b"cluster"))
was, metadata["ray_version"] = metadata["ray_version"], sys.argv[2]
gcs.internal_kv_put(b"CLUSTER_METADATA", json.dumps(metadata).encode(), True, b"cluster")
print(was)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """A cluster that accepts any usage of the disk and the memory of this machine."""
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
    """A folder on a full disk."""
    folder = tmp_path / "full"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], check=False)
    if mounted.returncode:
        pytest.skip("needs the permission to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def doctor(cluster: LocalCluster, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ray_jobs", "doctor", *map(str, arguments)]
    env = {**os.environ, **cluster.environment}
    # Not in the checkout, because Ray's workers import from the folder in which their driver was started.
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=240, cwd="/")


def other_version(folder: Path) -> dict[str, str]:
    """Return the environment of a node with another version and other code of this program."""
    for name in ("patterns", "ray_jobs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "patterns" / "more.py").write_text("MORE = 1\n")
    (folder / "patternnet_ray-9.9.dist-info").mkdir()
    (folder / "patternnet_ray-9.9.dist-info" / "METADATA").write_text("Name: patternnet-ray\nVersion: 9.9\n")
    return {"PYTHONPATH": str(folder)}


def test_healthy_cluster_has_no_problems_and_no_file_is_left_behind(
    cluster: LocalCluster, shards: list[str], tmp_path: Path
) -> None:
    found = doctor(cluster, "--shards", f"{tmp_path}/shards/train-{{000..003}}.tar", "--out", tmp_path / "run")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "1 nodes, with room for 1 workers of 1 CPU; 4 shards checked" in found.stdout
    assert "doctor: no problems found" in found.stdout
    heading, row, *_ = (line.split() for line in found.stdout.splitlines())
    assert heading[-2:] == ["images/s", "code"]
    assert 10 < int(row[-3]) < 10_000, "one CPU decodes hundreds; the code has two words"
    (need,) = (line for line in found.stdout.splitlines() if line.startswith("images/s: "))
    assert "500×375" in need
    assert "an H200 takes 6500 in a forward pass of ResNet-50 (TF32), and about 1600 in its fit" in need
    assert not found.stderr
    assert not (tmp_path / "run").exists()


def test_every_planted_fault_is_reported_with_its_node(
    cluster: LocalCluster, shards: list[str], full: Path, tmp_path: Path
) -> None:
    (tmp_path / "hiding").mkdir()
    (tmp_path / "hiding" / "sitecustomize.py").write_text(HIDE)
    Path(shards[2]).write_bytes(b"not a tar file" * 100)
    gone = "http://127.0.0.1:9/gone.tar"
    added = [
        cluster.add_node(env=other_version(tmp_path / "other")),
        cluster.add_node(env={"PYTHONPATH": str(tmp_path / "hiding")}),
        cluster.add_node(env={"RAY_local_fs_capacity_threshold": "0.001"}, num_gpus=1),
    ]
    hung = cluster.add_node()  # the cluster gives it up after some seconds
    cluster.stop_node(hung.number)
    try:
        given = [word for shard in (*shards, gone) for word in ("--shards", shard)]
        found = doctor(cluster, *given, "--out", full, "--patience", "90s", "--gpus-per-worker", "2")
    finally:
        for node in (*added, hung):
            cluster.kill_node(node.number)
    assert found.returncode == 2
    faults = [line.strip() for line in found.stdout.splitlines() if line.startswith("  ")]
    node = "127.0.0.1 ("
    planted = {  # number of nodes with the fault; three nodes have this program unchanged
        "127.0.0.1: tasks do not run there (The task is not schedulable": 0,
        "patternnet-ray 9.9, but ": 1,
        "its code of patternnet-ray differs from the code here": 1,
        "patternnet-ray is not installed": 1,
        "Ray offers 1 GPUs, torch sees 0": 1,
        f"the disk of {full} is full": 3,
        "Ray starts nothing on a node whose disk is 0.1 % full": 1,
        f"{shards[2]} cannot be read (not a tar archive": 3,
        f"{gone} cannot be read, because the server does not respond (<urlopen error": 3,
        f"--out {full}: cannot be written (No space left on device)": 3,
        "--cpus-per-worker: no node can hold a worker of 1 CPUs and 2 GPUs": 0,
    }
    for what, nodes in planted.items():
        (fault,) = [fault for fault in faults if what in fault]
        assert fault[: fault.index(what)].count(node) == nodes, fault
    assert f"{len(faults)} problems" in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert not list(full.iterdir())


def test_other_ray_version_of_the_cluster_is_one_line(cluster: LocalCluster) -> None:
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


def test_folder_other_than_the_drivers_is_reported_and_unchanged(tmp_path: Path) -> None:
    """For example a path on the local disk of each node."""
    with pytest.raises(OSError, match="another folder"):
        write(str(tmp_path / "own"), "mark-of-the-driver")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mark-of-the-driver").touch()
    assert write(str(tmp_path), "mark-of-the-driver") == WRITTEN
    assert [path.name for path in tmp_path.iterdir()] == ["mark-of-the-driver"]


def test_clock_difference_is_reported_in_seconds() -> None:
    nothing = dict.fromkeys(("disks", "memory", "limits", "gpus", "unreadable"))
    facts = {"host": "h", "code": "c", "errors": {}, **nothing}
    assert not list(node_problems(Node("10.0.0.1", {}, facts, skew=SKEW / 2), None))
    (problem,) = node_problems(Node("10.0.0.1", {}, facts, skew=90.0), None)
    assert problem.where == "10.0.0.1 (h)"
    assert "off by 90 s" in problem.what


@pytest.mark.full
@pytest.mark.parametrize("count", [0, 1, 5, COMMON, 1000, 1001])
@pytest.mark.parametrize("nodes", [1, 3, 40])
def test_every_shard_is_read_by_a_node_and_some_by_all(count: int, nodes: int) -> None:
    shards = [f"{n}.tar" for n in range(count)]
    shares = [share(shards, number, nodes) for number in range(nodes)]
    assert set().union(*shares) == set(shards)
    assert len(set.intersection(*map(set, shares))) >= min(count, COMMON // 2)
    assert all(len(set(each)) == len(each) <= -(-count // nodes) + COMMON for each in shares)
