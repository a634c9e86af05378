"""Special cases of a fit, in one process without Ray: passes, rounds, limits, and one driver at a time."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from patterns import UserError
from ray_jobs.config import FitConfig, Resources
from ray_jobs.engine.signals import StoppedShortError
from ray_jobs.jobs import moments_job
from ray_jobs.jobs.fit.fit import fit, merge, solve
from ray_jobs.jobs.fit.memory_plan import plan_passes
from ray_jobs.models import loading
from ray_jobs.runs import lease
from ray_jobs.runs.lease import Driver, TakenOverError, hold_lease
from ray_jobs.runs.moments_store import MomentsStore
from ray_jobs.runs.run_folder import Run
from tests.conftest import make_shards, write_tar
from tests.ray_jobs.runs import assert_same_patterns, make_fit_config

HERE = Resources(workers=0, max_loss=0.0, retries=0)
OVERFLOWING = """
import torch
from torch import nn


def overflowing():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 2))
    model[0].weight.data.abs_().mul_(1e36)
    return model
"""


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def tensors(count: int, seed: int = 0) -> list[dict[str, object]]:
    rng = np.random.default_rng(seed)
    return [
        {"__key__": f"t{seed}-{i}", "npy": npy(rng.normal(size=(3, 16, 16)).astype(np.float32))} for i in range(count)
    ]


def quarantined(run: Path) -> list[tuple[str, str]]:
    return sorted((row["key"], row["stage"]) for row in pq.read_table(run / "quarantine.parquet").to_pylist())


# --- rounds -----------------------------------------------------------------------------------------


@pytest.mark.full
def test_only_rejected_samples_are_tried_again_and_give_the_fit_of_fixed_data(model_spec: str, tmp_path: Path) -> None:
    good = tensors(6)
    cut = {**good[2], "npy": good[2]["npy"][:100]}  # type: ignore[index]
    lost = {**good[4], "npy": b""}
    shard, other = tmp_path / "a.tar", make_shards(tmp_path, 1, 5)[0]
    write_tar(shard, [*good[:2], cut, good[3], lost, good[5]])
    config = make_fit_config(model_spec, [str(shard), other], tmp_path / "run")
    config = replace(config, model=replace(config.model, precision="float64"))  # other batches, the same sums
    assert fit(config, HERE).manifest()["fit"]["samples"] == 9
    assert quarantined(tmp_path / "run") == [(cut["__key__"], "decode"), (lost["__key__"], "decode")]

    # One of them is fixed. A good sample is damaged, but it was counted before and is not read again.
    damaged = {**good[0], "npy": b"damaged"}
    write_tar(shard, [damaged, *good[1:4], lost, good[5]])
    once = fit(config, HERE, retry_quarantined=True).manifest()["fit"]
    assert (once["samples"], once["refused"], once["rounds_done"]) == (10, 1, 1)
    assert quarantined(tmp_path / "run") == [(lost["__key__"], "decode")]

    write_tar(shard, good)
    twice = fit(config, HERE, retry_quarantined=True).manifest()["fit"]
    assert (twice["samples"], twice["refused"]) == (11, 0)
    assert quarantined(tmp_path / "run") == []
    assert_same_patterns(tmp_path / "run", Path(str(fit(replace(config, out=str(tmp_path / "whole")), HERE).folder)))

    before = (tmp_path / "run" / "manifest.json").read_bytes()
    fit(config, HERE, retry_quarantined=True)
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before, "there was nothing to try again"


@pytest.mark.full
def test_estimators_that_were_solved_earlier_remain_when_a_fit_is_completed(model_spec: str, tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "s", 3, 4)
    whole = Path(shards[2]).read_bytes()
    Path(shards[2]).write_bytes(whole[:3000])
    config = make_fit_config(model_spec, shards, tmp_path / "run")
    fit(config, replace(HERE, max_bad_shards=1))
    solve(str(tmp_path / "run"), ["filter"], HERE)
    Path(shards[2]).write_bytes(whole)
    section = fit(config, HERE).manifest()["fit"]
    assert (section["samples"], section["missing"]) == (12, {})
    assert "0/filter" in load_file(tmp_path / "run" / "patterns.safetensors")
    assert "filter" in section["solved"]


def test_a_rejected_sample_that_is_no_longer_there_stays_in_the_quarantine(model_spec: str, tmp_path: Path) -> None:
    good = tensors(3)
    bad = {**good[1], "npy": b""}
    shard = write_tar(tmp_path / "a.tar", [good[0], bad, good[2]])
    config = make_fit_config(model_spec, [str(shard)], tmp_path / "run")
    fit(config, HERE)
    write_tar(shard, [good[0], good[2]])
    section = fit(config, HERE, retry_quarantined=True).manifest()["fit"]
    assert (section["samples"], section["refused"]) == (2, 1)
    assert quarantined(tmp_path / "run") == [(bad["__key__"], "read")]


@pytest.mark.full
def test_an_interrupted_round_is_resumed_with_and_without_the_option(
    model_spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = []
    for number in range(3):
        good = tensors(3, seed=number)
        shards.append(str(write_tar(tmp_path / f"{number}.tar", [good[0], {**good[1], "npy": b""}, good[2]])))
    config = make_fit_config(model_spec, shards, tmp_path / "run")
    fit(config, HERE)
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", tensors(3, seed=number))
    commit, commits = moments_job.MomentsWorker.commit, []

    def second_fails(self: moments_job.MomentsWorker) -> object:
        commits.append(self.shards)
        if len(commits) == 2:
            raise OSError(28, "No space left on device")
        return commit(self)

    monkeypatch.setattr(moments_job.MomentsWorker, "commit", second_fails)
    with pytest.raises(OSError, match="No space left"):
        fit(config, HERE, retry_quarantined=True)
    assert Run(tmp_path / "run").manifest()["fit"]["samples"] == 6
    section = fit(config, HERE).manifest()["fit"]
    assert (section["samples"], section["refused"]) == (9, 0)
    assert sum(len(shards) for shards in commits) == 4, "a shard whose samples counted was read again"


# --- samples without a finite output ------------------------------------------------------------------


@pytest.mark.full
def test_samples_without_a_finite_output_are_rejected_and_change_no_sum(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(OVERFLOWING)
    good, more = tensors(5, seed=1), tensors(4, seed=2)
    hot = {"__key__": "hot", "npy": npy(np.full((3, 16, 16), 1e3, np.float32))}
    clean = [str(write_tar(tmp_path / f"clean{i}.tar", s)) for i, s in enumerate((good, more))]
    mixed = [clean[0], str(write_tar(tmp_path / "mixed.tar", [*more[:2], hot, *more[2:]]))]
    spec = f"{tmp_path}/m.py:overflowing"
    patient = replace(HERE, max_loss=900.0, retries=1)
    run = fit(make_fit_config(spec, mixed, tmp_path / "run", estimators=("linear",)), patient)
    assert run.manifest()["fit"]["samples"] == 9
    assert quarantined(tmp_path / "run") == [("hot", "model")]
    assert_same_patterns(
        tmp_path / "run",
        Path(str(fit(make_fit_config(spec, clean, tmp_path / "c", estimators=("linear",)), HERE).folder)),
    )


# --- limits -------------------------------------------------------------------------------------------


@pytest.mark.full
def test_a_run_of_mostly_broken_samples_ends_with_an_error(model_spec: str, tmp_path: Path) -> None:
    shards = []
    for number in range(12):
        rows = tensors(20, seed=number)
        garbage = [{**row, "npy": b""} for row in rows[6:]]
        shards.append(str(write_tar(tmp_path / f"{number:02d}.tar", [*rows[:6], *garbage])))
    config = make_fit_config(model_spec, shards, tmp_path / "run")
    with pytest.raises(UserError, match=r"\d+ of 100 samples were rejected.*--max-bad-fraction"):
        fit(config, HERE)
    begun = MomentsStore(tmp_path / "run" / "moments").read_ledger()
    assert begun.samples == 30, "it read further shards, or lost committed moments"
    assert fit(config, replace(HERE, max_bad_fraction=0.8)).manifest()["fit"]["samples"] == 72


@pytest.mark.full
def test_passes_over_the_data_give_the_patterns_of_one_pass(model_spec: str, tmp_path: Path) -> None:
    shards = make_shards(tmp_path, 4, 5)
    config = make_fit_config(model_spec, shards, tmp_path / "one")
    whole = fit(config, HERE)
    network = loading.load(config.model).network
    enough = next(m for m in range(2**26, 2**28, 512) if fits(network, config, m))
    few = fit(replace(config, out=str(tmp_path / "few"), memory=enough), HERE)
    count = len(plan_passes(network, config.estimators, enough, config.batch_size))
    assert count > 2
    assert len(list((tmp_path / "few" / "moments").iterdir())) == count
    assert_same_patterns(tmp_path / "one", tmp_path / "few")
    neurons = [pq.read_table(tmp_path / name / "neurons.parquet") for name in ("one", "few")]
    assert neurons[0]["n"].equals(neurons[1]["n"])
    assert whole.manifest()["fit"]["samples"] == few.manifest()["fit"]["samples"] == 20
    with pytest.raises(UserError, match="the moments of operator") as error:
        fit(replace(config, out=str(tmp_path / "none"), memory=2**20), HERE)
    assert error.value.parameter == "memory"
    assert not (tmp_path / "none").exists()


def fits(network: object, config: FitConfig, memory: int) -> bool:
    try:
        plan_passes(network, config.estimators, memory, config.batch_size)  # type: ignore[arg-type]
    except UserError:
        return False
    return True


@pytest.mark.full
@pytest.mark.parametrize("limit", [2, 5])
def test_partial_moments_merged_during_a_fit_give_the_same_patterns(
    model_spec: str, tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make_shards(tmp_path / "s", 16, 2)
    bad = str(write_tar(tmp_path / "s" / "bad.tar", [*tensors(2), {"__key__": "cut", "npy": b""}]))
    config = make_fit_config(model_spec, [*shards, bad], tmp_path / "plain")
    fit(config, HERE)
    monkeypatch.setattr(moments_job, "MAX_FILES", limit)
    monkeypatch.setattr(moments_job, "MERGED_AT_ONCE", limit)
    merging = fit(replace(config, out=str(tmp_path / "merging")), HERE)
    assert_same_patterns(tmp_path / "plain", tmp_path / "merging")
    assert len(list((tmp_path / "merging" / "moments").glob("part-*.safetensors"))) <= limit + 1
    assert merging.manifest()["fit"]["samples"] == 34
    assert quarantined(tmp_path / "merging") == [("cut", "decode")]


@pytest.mark.full
def test_a_merged_fit_of_fixed_data_keeps_its_quarantine_and_its_rounds(model_spec: str, tmp_path: Path) -> None:
    folders = []
    for name in ("a", "b"):
        good = tensors(3, seed=ord(name))
        shard = write_tar(tmp_path / f"{name}.tar", [good[0], {**good[1], "npy": b""}, {**good[2], "npy": b""}])
        config = make_fit_config(model_spec, [str(shard)], tmp_path / name)
        fit(config, replace(HERE, max_bad_fraction=1.0))
        folders.append(str(config.out))
        if name == "a":
            write_tar(shard, [*good[:2], {**good[2], "npy": b""}])
            fit(config, replace(HERE, max_bad_fraction=1.0), retry_quarantined=True)
    merged = merge(folders, str(tmp_path / "both"), HERE).manifest()["fit"]
    assert (merged["samples"], merged["refused"], merged["rounds_done"]) == (3, 3, 1)
    assert len(quarantined(tmp_path / "both")) == 3


@pytest.mark.full
def test_a_full_disk_gives_one_line_and_loses_nothing(model_spec: str, tmp_path: Path) -> None:
    make_shards(tmp_path / "s", 3, 2)
    command = [sys.executable, "-m", "ray_jobs", "fit", "--model", model_spec, "--shards", f"{tmp_path}/s/*.tar"]
    command += ["--out", str(tmp_path / "run"), "--workers", "0", "--max-loss", "0", "--batch-size", "4"]
    command += ["--image-size", "16", "--resize", "16", "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"]

    def no_large_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))

    full = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=no_large_files)
    assert full.returncode == 2, full.stderr
    (line,) = [line for line in full.stderr.splitlines() if line.startswith("patternnet: ")]
    assert "cannot be written (File too large). Free disk space" in line
    assert "Traceback" not in full.stderr
    assert not [path for path in (tmp_path / "run").rglob("*") if ".aside-" in path.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fit: 6 samples of 3 shards, 0 rejected" in done.stdout


# --- one driver ---------------------------------------------------------------------------------------


def test_a_second_driver_is_rejected_while_the_first_is_alive(
    model_spec: str, shards: list[str], tmp_path: Path
) -> None:
    config = make_fit_config(model_spec, shards[:1], tmp_path / "run")
    run = Run(tmp_path / "run")
    with (
        hold_lease(run, "fit"),
        pytest.raises(UserError, match=rf"process {os.getpid()} on \S+ works on this run"),
    ):
        fit(config, HERE)
    fit(config, HERE)


def test_a_dead_driver_blocks_no_other(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    gone = replace(Driver.current(), pid=int(dead.stdout))
    (tmp_path / "progress.json").write_text(json.dumps({"driver": vars(gone), "time": time.time()}))
    with hold_lease(Run(tmp_path), "fit"):
        pass


def test_a_process_with_the_number_of_a_dead_driver_is_not_mistaken_for_it() -> None:
    assert not Driver.current().has_ended()
    assert replace(Driver.current(), begun="1").has_ended()


def test_a_driver_whose_run_was_taken_over_commits_nothing(
    model_spec: str, shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_fit_config(model_spec, shards[:3], tmp_path / "run")
    commit, taken = moments_job.MomentsWorker.commit, []

    def take_over(self: moments_job.MomentsWorker) -> object:
        if taken:
            lease.Heartbeat(Run(tmp_path / "run"), Driver.current(), "fit").write()
        taken.append(self.shards)
        return commit(self)

    monkeypatch.setattr(moments_job.MomentsWorker, "commit", take_over)
    with pytest.raises(TakenOverError, match="another driver has taken over"):
        fit(config, HERE)
    assert MomentsStore(tmp_path / "run" / "moments").read_ledger().counted_shards() == {0}


# --- logs and signals ---------------------------------------------------------------------------------


def test_json_log_lines_name_run_worker_and_shard(
    model_spec: str, shards: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.tar"
    broken.write_bytes(b"not a tar")
    config = make_fit_config(model_spec, [*shards[:2], str(broken)], tmp_path / "run")
    with pytest.raises(StoppedShortError):
        fit(config, replace(HERE, log="json"))
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert len(lines) >= 4
    assert all(line["run"] == str(tmp_path / "run") and line["job"] == "fit" and line["time"] for line in lines)
    failed = next(line for line in lines if line.get("shard") == str(broken))
    assert failed["worker"] == next(line["worker"] for line in lines if "worker" in line)
    assert "broken.tar" in failed["message"]
    assert all(line["message"] for line in lines)
    assert [line["samples"] for line in lines if "samples" in line][-1] == 12


def test_ctrl_c_without_ray_commits_finished_shards(
    model_spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make_shards(tmp_path / "s", 6, 2)
    work, done = moments_job.MomentsWorker.work, []

    def interrupted(self: moments_job.MomentsWorker, *task: object) -> object:
        done.append(task)
        if len(done) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return work(self, *task)  # type: ignore[arg-type]

    monkeypatch.setattr(moments_job.MomentsWorker, "work", interrupted)
    config = make_fit_config(model_spec, shards, tmp_path / "run")
    with pytest.raises(StoppedShortError, match="stopped with 3 of 6 shards left"):
        fit(config, replace(HERE, max_loss=900.0))
    assert MomentsStore(tmp_path / "run" / "moments").read_ledger().counted_shards() == {0, 1, 2}
