"""Processes of workers that are kept between jobs: one set of processes, the same results, also if one is killed."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest

from patterns import UserError
from ray_jobs.config import ExplainConfig, FitConfig, ModelConfig, Resources
from ray_jobs.data.shard_reader import read_shard
from ray_jobs.engine.ray_session import connect
from ray_jobs.engine.shard_job import ShardJob
from ray_jobs.engine.shard_worker import WorkerInfo
from ray_jobs.engine.worker_hosts import keep_workers, kept_actors, pack, unpack
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.runs.run_folder import Run
from ray_jobs.studies import demo, reproduce, vgg16
from tests.ray_jobs.runs import assert_same_patterns, make_fit_config, wait_until

pytestmark = pytest.mark.full
ONE = Resources(workers=1, gpus_per_worker=0)


@pytest.fixture
def pids(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The process of each worker, as it becomes ready."""
    found: list[int] = []
    ready = ShardJob.on_ready

    def record(self: ShardJob, worker: WorkerInfo) -> None:
        found.append(worker.pid)
        ready(self, worker)

    monkeypatch.setattr(ShardJob, "on_ready", record)
    return found


def explain_run(config: FitConfig, resources: Resources) -> Run:
    return explain(
        ExplainConfig(model=config.model, patterns=config.out, shards=config.shards, out=config.out, outputs=("npy",)),
        resources,
    )


def read_maps(run: Run) -> dict[str, np.ndarray]:
    shards = sorted((run.folder.local / "explanations").glob("*.tar"))  # type: ignore[operator]
    return {f"{s.key}.{name}": data for path in shards for s in read_shard(str(path)) for name, data in s.files.items()}


@pytest.mark.parametrize("killed", [False, True])
def test_jobs_share_processes_and_give_the_results_of_jobs_that_do_not(
    local_ray: None, model_spec: str, shards: list[str], tmp_path: Path, pids: list[int], killed: bool
) -> None:
    alone, kept = (make_fit_config(model_spec, shards, tmp_path / name) for name in ("alone", "kept"))
    here = Resources(workers=0)
    expected = fit(alone, here), explain_run(alone, here)
    pids.clear()
    with connect(ONE), keep_workers():
        fitted = fit(kept, ONE)
        (first,) = pids
        if killed:
            os.kill(first, signal.SIGKILL)
            wait_until(lambda: not psutil.pid_exists(first))
        explained = explain_run(kept, ONE)
    assert (first in pids[1:]) != killed
    assert_same_patterns(expected[0].folder, fitted.folder)  # type: ignore[arg-type]
    assert read_maps(explained) == read_maps(expected[1])
    wait_until(lambda: not any(map(psutil.pid_exists, pids)))


def test_workers_with_other_resources_are_not_used_again(
    local_ray: None, model_spec: str, shards: list[str], tmp_path: Path, pids: list[int]
) -> None:
    one, two = (make_fit_config(model_spec, shards[:2], tmp_path / name) for name in ("one", "two"))
    with keep_workers():
        fit(one, Resources(workers=1, cpus_per_worker=1, gpus_per_worker=0))
        fit(two, Resources(workers=1, cpus_per_worker=2, gpus_per_worker=0))
    assert len(set(pids)) == len(pids) == 2


def test_without_the_block_workers_end_with_their_job(
    local_ray: None, model_spec: str, shards: list[str], tmp_path: Path, pids: list[int]
) -> None:
    fit(make_fit_config(model_spec, shards[:2], tmp_path / "run"), ONE)
    assert not kept_actors()
    wait_until(lambda: not any(map(psutil.pid_exists, pids)))


def test_experiments_use_one_process_for_all_their_jobs(
    local_ray: None, model: ModelConfig, shards: list[str], tmp_path: Path, pids: list[int]
) -> None:
    experiment = reproduce.Experiment(model, tuple(shards[:2]), tuple(shards[2:3]), steps=2)
    reproduce.reproduce(experiment, tmp_path / "out", ONE)
    assert len(pids) >= 4
    assert len(set(pids)) == 1


def test_demo_uses_one_process_for_both_networks(
    local_ray: None,
    model_spec: str,
    shards: list[str],
    tmp_path: Path,
    pids: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fits of a small network stand for those of the demo's networks, which take minutes."""
    for file in ("weights.safetensors", vgg16.FILE):
        (tmp_path / file).touch()

    def fit_small(network: demo.Network, out: Path, crops: object, whole: object, resources: Resources) -> Run:
        return fit(make_fit_config(model_spec, shards[:2], out), resources)

    monkeypatch.setattr(demo, "CROPS", 1)
    monkeypatch.setattr(demo, "explain_network", fit_small)
    monkeypatch.setattr(demo, "draw", lambda run, path: path)
    assert demo.demo(tmp_path, ONE) == [tmp_path / "signals.png", tmp_path / "classes.png"]
    assert len(pids) == 2
    assert len(set(pids)) == 1


def test_a_worker_does_not_use_a_damaged_model(
    local_ray: None, model_spec: str, shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[bytes] = []

    def pack_and_damage(values: Sequence[object]) -> tuple[bytes, str]:
        content, digest = pack(values)
        packed.append(content)
        return content[:-200] + bytes([content[-200] ^ 1]) + content[-199:], digest

    monkeypatch.setattr("ray_jobs.engine.shard_job.pack", pack_and_damage)
    with pytest.raises(UserError, match=r"the model that this worker received has the digest [0-9a-f]{16} instead of"):
        fit(make_fit_config(model_spec, shards[:2], tmp_path / "run"), ONE)
    assert len(packed) == 1
    assert len(packed[0]) > 1000


def test_every_damaged_byte_of_what_is_sent_is_found() -> None:
    content, digest = pack([dict, {"weights": list(range(100))}])
    assert unpack(content, digest) == (dict, {"weights": list(range(100))})
    for at in range(len(content)):
        with pytest.raises(UserError) as caught:
            unpack(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :], digest)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError) as caught:
        unpack(content[:-1], digest)
    assert "has the digest" in caught.value.what


def test_a_worker_that_cannot_be_made_ends_the_job_with_its_error(
    local_ray: None, model_spec: str, shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object, *arguments: object) -> None:
        raise UserError("here", "cannot be made", "Try again.")

    config = make_fit_config(model_spec, shards[:2], tmp_path / "run")
    from ray_jobs.jobs.moments_job import MomentsWorker

    class Broken(MomentsWorker):
        __init__ = fail

    monkeypatch.setattr("ray_jobs.jobs.moments_job.MomentsWorker", Broken)
    with pytest.raises(UserError, match="cannot be made"):
        fit(config, ONE)
