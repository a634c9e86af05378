"""How many CPUs a worker with a GPU takes by default."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from ray_jobs.config import Resources
from ray_jobs.config.timing import PRODUCTION
from ray_jobs.engine import ray_session, shard_job
from ray_jobs.engine.ray_session import choose_worker_cpus, count_on_node, share_cpus
from ray_jobs.engine.shard_job import ShardJob
from ray_jobs.runs.run_folder import Run

# A fit on a Ray with 5 CPUs and 2 GPUs that need not exist. It prints the section of the manifest, the CPUs that are
# free while both workers have their places, and the GPU of each worker.
FIT = """
import json, sys, time
import ray
from ray_jobs.config import FitConfig, ModelConfig, Resources
from ray_jobs.engine.shard_job import ShardJob
from ray_jobs.jobs.fit.fit import fit

spec, out, *shards = sys.argv[1:]
gpus, free, ready = [], [], ShardJob.on_ready

def record(self, worker):
    gpus.append(worker.gpus)
    deadline = time.monotonic() + 100
    while len(gpus) == 2 and (left := ray.available_resources().get("CPU", 0.0)) != 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    free.append(ray.available_resources().get("CPU", 0.0))
    ready(self, worker)

ShardJob.on_ready = record
ray.init(address="local", num_cpus=5, num_gpus=2, include_dashboard=False, log_to_driver=False)
model = ModelConfig(spec=spec, image_size=16, resize=16)
run = fit(FitConfig(model=model, shards=tuple(shards), out=out), Resources(workers=2))
print(json.dumps([run.manifest()["fit"], free[-1], sorted(gpus)]))
"""


@pytest.mark.parametrize(
    ("nodes", "gpus", "cpus"),
    [
        ([(16, 1)], 1, 8),  # more than a worker can use
        ([(16, 2)], 1, 7),  # one CPU is kept
        ([(16, 2)], 0.5, 3),
        ([(16, 2)], 2, 8),
        ([(4, 8)], 1, 1),  # four workers
        ([(8, 1), (4, 1)], 1, 3),  # the smaller node decides
        ([(8, 1), (64, 0), (0, 1)], 1, 7),  # the others hold no worker
        ([(1, 1)], 1, 1),
        ([(64, 0)], 1, 1),
        ([], 1, 1),
    ],
)
def test_cpus_of_the_nodes_are_shared(nodes: list[tuple[float, float]], gpus: float, cpus: float) -> None:
    assert share_cpus([{"CPU": c, "GPU": g} if g else {"CPU": c} for c, g in nodes], gpus) == cpus


@given(
    nodes=st.lists(st.builds(lambda c, g: {"CPU": float(c), "GPU": float(g)}, st.integers(0, 130), st.integers(0, 9))),
    gpus=st.sampled_from([0.25, 0.5, 1.0, 2.0]),
)
def test_no_node_holds_fewer_workers_than_with_one_cpu_for_each(nodes: list[dict[str, float]], gpus: float) -> None:
    cpus = share_cpus(nodes, gpus)
    assert 1 <= cpus <= 8
    for node in nodes:
        before, now = (count_on_node(node, {"num_cpus": each, "num_gpus": gpus}) for each in (1.0, cpus))
        assert now == before


def test_cpus_that_are_asked_for_are_taken() -> None:
    assert choose_worker_cpus(Resources(workers=0, cpus_per_worker=3)) == 3
    assert choose_worker_cpus(Resources(workers=0)) == 1


def test_workers_take_fewer_cpus_once_a_smaller_node_joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"CPU": 16.0, "GPU": 2.0}]
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray_session, "list_nodes", lambda: nodes)
    monkeypatch.setattr(shard_job, "list_draining_nodes", frozenset)
    resources = Resources(timing=replace(PRODUCTION, node_interval=0.0))
    heartbeat: Any = SimpleNamespace(run=Run(tmp_path))
    job = ShardJob("fit", heartbeat, ["a"] * 9, ["a"] * 9, resources, None)
    job.options = ray_session.make_worker_options(resources)
    assert (job.options["num_cpus"], job.wanted_workers()) == (7, 2)
    nodes.append({"CPU": 3.0, "GPU": 1.0})
    assert (job.wanted_workers(), job.options["num_cpus"]) == (3, 2)
    nodes.pop()
    assert (job.wanted_workers(), job.options["num_cpus"]) == (2, 2)  # of the other workers, some still have seven


@pytest.mark.full
def test_workers_take_the_cpus_of_their_node(model_spec: str, shards: list[str], tmp_path: Path) -> None:
    program = [sys.executable, "-c", FIT, model_spec, str(tmp_path / "run"), *shards]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    section, free, gpus = json.loads(done.stdout.splitlines()[-1])
    assert section["cpus_per_worker"] == 2  # (5 - 1) / 2
    assert free == 1
    assert gpus == ["0", "1"]
    assert "fit: 2 CPUs per worker; --cpus-per-worker changes it" in done.stderr
