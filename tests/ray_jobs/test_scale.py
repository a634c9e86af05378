"""Many workers and many shards: the driver has little to do, and what it holds is small."""

import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from ray_jobs.config import ModelConfig, Resources
from ray_jobs.engine import worker_pool
from ray_jobs.engine.ray_tasks import LocalCall, LocalTasks
from ray_jobs.engine.shard_worker import ShardReport, WorkerInfo
from ray_jobs.jobs.moments_job import MomentsJob, MomentsSpec
from ray_jobs.runs.lease import hold_lease
from ray_jobs.runs.ledger import PartialMoments, combine_entries
from ray_jobs.runs.moments_store import MomentsStore, new_file
from ray_jobs.runs.run_folder import Run
from tests.ray_jobs.stub import Stub


class NoMerging(LocalTasks):
    """Stub workers write no files that could be merged."""

    def submit(self, function: Any, *arguments: Any) -> LocalCall:
        (_, parts) = arguments
        return LocalCall(combine_entries(new_file(), parts))


@dataclass(frozen=True)
class Simulated:
    """What a simulated run took. busy: share of the time that the driver's thread computed; useful: workers' share."""

    busy: float
    useful: float


def simulate(folder: Path, workers: int, shards: int, seconds: float) -> Simulated:
    names = tuple(f"s3://bucket/train-{i:06d}.tar" for i in range(shards))
    task = MomentsSpec(ModelConfig(spec="none"), names, MomentsStore(folder / "moments"), 32)
    with hold_lease(Run(folder), "fit") as heartbeat:
        resources = Resources(workers=workers, cpus_per_worker=0, max_loss=15.0)
        job = MomentsJob("fit", heartbeat, task, NoMerging(), resources)
        job.options = {"num_cpus": 0, "num_gpus": 0, "max_restarts": 0}
        actor = ray.remote(Stub).options(num_cpus=0)
        ready = folder / "ready"
        ready.mkdir()
        job.spawn = lambda: actor.remote(seconds, ready, workers)  # type: ignore[method-assign]
        task_of = job.make_task
        job.make_task = lambda item: (task_of(item).number, item)  # type: ignore[assignment,method-assign,return-value]  # no torch
        job.wanted_workers = lambda: workers  # type: ignore[method-assign]
        begun: list[tuple[float, float, int]] = []

        def tick() -> None:
            job.tick()
            if not begun and len(job.reporter.workers) == workers:
                begun.append((time.monotonic(), time.thread_time(), job.reporter.counts.shards))

        ended: list[tuple[float, float, int]] = []
        worked = job.on_done

        def note(item: str, told: ShardReport) -> None:
            worked(item, told)
            if job.reporter.counts.shards >= shards - workers and not ended:  # before the last ones wait for each other
                ended.append((time.monotonic(), time.thread_time(), job.reporter.counts.shards))

        job.on_done = note  # type: ignore[method-assign]
        worker_pool.run(names, job, lambda: False, tick)
        job.flush()
    ledger = MomentsStore(folder / "moments").read_ledger()
    assert sorted(s for part in ledger.parts for s in part.shards) == list(range(shards))
    assert ledger.samples == 100 * shards
    (start, cpu, first), (end, cpu_end, last) = begun[0], ended[0]
    return Simulated((cpu_end - cpu) / (end - start), (last - first) * seconds / (workers * (end - start)))


def test_a_cluster_of_simulated_workers_is_kept_busy_by_an_idle_driver(local_ray: None, tmp_path: Path) -> None:
    found = simulate(tmp_path, workers=8, shards=48, seconds=2.0)
    assert found.busy < 0.1
    assert found.useful > 0.9


@pytest.mark.slow
def test_sixty_four_workers_and_ten_thousand_shards(local_ray: None, tmp_path: Path) -> None:
    found = simulate(tmp_path, workers=64, shards=10_000, seconds=2.5)
    print(f"driver busy {found.busy:.2%}, workers useful {found.useful:.2%}")
    assert found.busy < 0.05
    assert found.useful >= 0.97


def test_a_driver_of_a_hundred_thousand_shards_stays_small(tmp_path: Path) -> None:
    names = tuple(f"s3://bucket/imagenet/train-{i:06d}.tar" for i in range(100_000))
    tracemalloc.start()
    with hold_lease(Run(tmp_path), "fit") as heartbeat:
        task = MomentsSpec(ModelConfig(spec="none"), names, MomentsStore(tmp_path / "moments"), 32)
        before = tracemalloc.get_traced_memory()[0]
        job = MomentsJob("fit", heartbeat, task, NoMerging(), Resources(workers=0))
        place = WorkerInfo("here", 1, "cpu", "")
        job.on_ready(place)
        for start in range(0, len(names), 100):
            items = list(names[start : start + 100])
            for item in items:
                job.on_assigned(item, place)
                job.on_done(item, ShardReport(1000, 0))
            job.on_committed(items, PartialMoments(new_file(), tuple(range(start, start + 100)), 100_000))
            if start % 5000 == 0:
                job.flush()
                job.tick()
        job.flush()
        held = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert held < 200 << 20, "the driver may use 1 GiB, of which Python, torch and Ray take a half"
    assert (tmp_path / "moments" / "ledger.json").stat().st_size < 1 << 20
    assert len(MomentsStore(tmp_path / "moments").read_ledger().counted_shards()) == len(names)
