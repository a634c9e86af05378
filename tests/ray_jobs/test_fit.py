"""The fit job: the patterns stay the same whatever happens while it runs."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.request import urlopen

import pytest
import ray
import torch
from safetensors.torch import load_file

from patterns import CHOICES, UserError, accumulate, solve
from ray_jobs.config import FITTED, FitConfig, ModelConfig, Resources
from ray_jobs.data.shard_reader import ReaderConfig, ShardReader
from ray_jobs.engine.ray_session import count_worker_slots, make_worker_options
from ray_jobs.engine.shard_worker import WorkerResources
from ray_jobs.engine.signals import StoppedShortError
from ray_jobs.jobs import reduction
from ray_jobs.jobs.fit.fit import fit, make_observer, merge
from ray_jobs.jobs.fit.fit import solve as solve_more
from ray_jobs.jobs.moments_job import MomentsTask, MomentsWorker, Observe
from ray_jobs.models import loading
from ray_jobs.runs.ledger import Ledger
from ray_jobs.runs.moments_store import MomentsStore
from ray_jobs.runs.run_folder import Run
from ray_jobs.runs.usage import Usage
from ray_jobs.units import format_duration
from ray_jobs.views.status import status_lines
from tests.conftest import make_shards, write_tar
from tests.ray_jobs.runs import PREPROCESSING, assert_same_patterns, kill_first_worker, make_fit_config


def worker_of(config: FitConfig) -> tuple[loading.TracedModel, MomentsStore, int, Observe, None]:
    """Return the arguments of a worker of a fit."""
    loaded = loading.load(config.model)
    observe = partial(make_observer, replace(config, positions=None), tuple(loaded.network.operators))
    return loaded.traced, MomentsStore(f"{config.out}/moments"), config.batch_size, observe, None


def ledger_of(folder: Path) -> Ledger:
    return MomentsStore(folder).read_ledger()


def on_cpu(workers: int, max_loss: float = 300) -> Resources:
    return Resources(workers=workers, gpus_per_worker=0, max_loss=max_loss)


HERE = Resources(workers=0)
# Further trials of what `make test` shows with one worker.
SEVERAL = [pytest.param(n, marks=[pytest.mark.slow, pytest.mark.ray]) for n in (2, 4)]


@pytest.fixture(scope="module")
def undisturbed(model_spec: str, shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(fit(make_fit_config(model_spec, shards, tmp_path_factory.mktemp("runs") / "one"), HERE).folder)


@pytest.mark.full
def test_the_job_computes_what_one_process_computes(undisturbed: Path, model_spec: str, shards: list[str]) -> None:
    torch.set_num_threads(1)
    loaded = loading.load(ModelConfig(spec=model_spec, **PREPROCESSING))  # type: ignore[arg-type]
    batches = [b.images for s in shards for b in ShardReader(s, ReaderConfig(loaded.preprocessing, batch_size=4))]
    moments = accumulate(loaded.network, batches)
    saved = load_file(undisturbed / "patterns.safetensors")
    for name, operator in loaded.network.operators.items():
        for row, pattern in solve(operator, moments[name], ["linear", "two-component"]).patterns.items():
            assert (saved[f"{name}/{row}"] - pattern).norm() <= 1e-6 * pattern.norm(), (name, row)


@pytest.mark.full
@pytest.mark.parametrize("workers", [0, *SEVERAL])
def test_the_number_of_workers_and_the_order_of_shards_change_no_digit(
    ray_of_workers: None, undisturbed: Path, model_spec: str, shards: list[str], tmp_path: Path, workers: int
) -> None:
    order = torch.randperm(len(shards), generator=torch.Generator().manual_seed(workers)).tolist()
    run = fit(make_fit_config(model_spec, [shards[i] for i in order], tmp_path / "run"), on_cpu(workers, max_loss=0.01))
    assert_same_patterns(undisturbed, run.folder)
    assert run.manifest()["fit"]["samples"] == 72


def test_a_killed_worker_changes_no_digit(
    local_ray: None,
    undisturbed: Path,
    model_spec: str,
    shards: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worked = kill_first_worker(monkeypatch, after=5)
    run = fit(make_fit_config(model_spec, shards, tmp_path / "run"), on_cpu(2))
    assert len(worked) > len(shards), "no shard was processed again: the killed worker had nothing to lose"
    assert_same_patterns(undisturbed, run.folder)
    assert run.manifest()["fit"]["samples"] == 72


@pytest.mark.full
@pytest.mark.parametrize("workers", [0, SEVERAL[0]])
def test_a_fit_resumed_after_its_driver_was_stopped_and_killed_changes_no_digit(
    model_spec: str, tmp_path_factory: pytest.TempPathFactory, ray_of_workers: None, workers: int
) -> None:
    folder = tmp_path_factory.mktemp("driver")
    many = make_shards(folder / "shards", 30, 3, seed=5)
    out = folder / "run"
    command = [sys.executable, "-m", "ray_jobs", "fit", "--model", model_spec, "--shards", f"{folder}/shards/*.tar"]
    command += ["--out", str(out), "--workers", str(workers), "--gpus-per-worker", "0", "--max-loss", "0"]
    command += ["--batch-size", "4", "--image-size", "16", "--resize", "16"]
    command += ["--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"]
    environment = {**os.environ, **({"RAY_ADDRESS": ray.get_runtime_context().gcs_address} if workers else {})}
    ledger = out / "moments" / "ledger.json"

    def until_it_grows(number: signal.Signals) -> tuple[int, str]:
        """Run until the ledger grows, then send a signal: exit status and stderr."""
        size = len(json.loads(ledger.read_text())["parts"]) if ledger.exists() else 0
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as driver:
            while driver.poll() is None and (
                not ledger.exists() or len(json.loads(ledger.read_text())["parts"]) == size
            ):
                time.sleep(0.002)
            driver.send_signal(number)
            return driver.wait(60), driver.communicate()[1]

    status, err = until_it_grows(signal.SIGTERM)
    assert status == 3
    assert "of 30 shards left; run the same command again to resume" in err
    assert until_it_grows(signal.SIGKILL)[0] == -signal.SIGKILL
    before = ledger_of(ledger.parent)
    assert 0 < len(before.counted_shards()) < len(many), "the driver was not killed midway"
    (out / "moments" / "part-orphan.safetensors").write_bytes(b"of a worker whose driver died")
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    after = ledger_of(ledger.parent)
    assert sorted(n for part in after.entries for n in part.shards) == list(range(len(many)))
    assert after.samples == 90
    assert {p.name for p in (out / "moments").glob("*.safetensors")} == {part.file for part in after.entries}
    whole = fit(make_fit_config(model_spec, sorted(many), folder / "whole"), HERE)
    assert_same_patterns(whole.folder, out)


def test_a_killed_reducer_changes_no_digit(
    local_ray: None,
    undisturbed: Path,
    model_spec: str,
    shards: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed, solve_group = tmp_path / "killed", reduction.solve_group

    def killed_once(*arguments: object) -> object:
        if not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return solve_group(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(reduction, "solve_group", killed_once)
    run = fit(make_fit_config(model_spec, shards, tmp_path / "run"), on_cpu(1))
    assert killed.exists()
    assert_same_patterns(undisturbed, Path(str(run.folder)))


def test_each_worker_has_a_gpu_of_its_own(local_ray: None, model_spec: str, shards: list[str], tmp_path: Path) -> None:
    options = make_worker_options(Resources())
    assert count_worker_slots(options) == 2
    actor, arguments = ray.remote(MomentsWorker), worker_of(make_fit_config(model_spec, shards, tmp_path / "run"))
    workers = [actor.options(**options).remote(*arguments, WorkerResources(1, 1)) for _ in range(2)]
    workers_info = ray.get([w.describe.remote() for w in workers])
    for worker in workers:
        ray.kill(worker)
    assert sorted(p.gpus for p in workers_info) == ["0", "1"]


class WorkerThatListsModules(MomentsWorker):
    """A worker that reports what it has imported."""

    def modules(self) -> set[str]:
        return set(sys.modules)


def test_workers_import_neither_the_compiler_nor_the_code_of_the_model(
    local_ray: None, model_spec: str, shards: list[str], tmp_path: Path
) -> None:
    arguments = worker_of(make_fit_config(model_spec, shards, tmp_path / "run"))
    worker = ray.remote(WorkerThatListsModules).options(num_gpus=0).remote(*arguments, WorkerResources())
    ray.get(worker.prepare.remote())
    imported = ray.get(worker.modules.remote())
    ray.kill(worker)
    assert "torch" in imported
    assert not {"torch._dynamo", "torchvision", "timm", "small_model"} & imported
    # `import torch` itself imports some modules of torch.export.
    program = [sys.executable, "-c", "import sys, torch; print(*sys.modules)"]
    by_torch = subprocess.run(program, capture_output=True, text=True, check=True).stdout.split()
    exporting = {name for name in imported if name.startswith(("torch.export", "torch._export"))}
    assert exporting <= set(by_torch)
    assert "torch.export._trace" not in exporting


def test_more_gpus_than_a_node_has_are_rejected(
    local_ray: None, model_spec: str, shards: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no node can hold a worker of 1 CPUs and 8 GPUs"):
        fit(make_fit_config(model_spec, shards, tmp_path / "run"), Resources(gpus_per_worker=8))


def test_a_finished_run_is_not_repeated(undisturbed: Path, model_spec: str, shards: list[str]) -> None:
    before = (undisturbed / "patterns.safetensors").stat().st_mtime_ns
    fit(make_fit_config(model_spec, shards, undisturbed), HERE)
    assert (undisturbed / "patterns.safetensors").stat().st_mtime_ns == before


def test_further_estimators_are_solved_from_the_moments_alone(
    local_ray: None, model_spec: str, shards: list[str], tmp_path: Path
) -> None:
    whole = fit(make_fit_config(model_spec, shards, tmp_path / "whole", estimators=tuple(CHOICES)), HERE)
    run = fit(make_fit_config(model_spec, shards, tmp_path / "run"), HERE)
    assert "0/filter" not in load_file(run.folder / "patterns.safetensors")
    further = ["two-component-own-mean", "*=filter", "random"]
    solve_more(str(run.folder), further, HERE)
    assert_same_patterns(whole.folder, run.folder)
    assert run.manifest()["fit"]["solved"] == [*FITTED, *further]
    few = fit(make_fit_config(model_spec, shards, tmp_path / "few", estimators=("default",)), HERE)
    with pytest.raises(UserError, match=r"a fit of default has no sums of 0 for linear\. Fit with"):
        solve_more(str(few.folder), ["linear"])


def test_estimators_are_fitted_for_the_operators_that_match_their_pattern(
    local_ray: None, model_spec: str, shards: list[str], tmp_path: Path
) -> None:
    run = fit(make_fit_config(model_spec, shards, tmp_path / "run", estimators=("2.conv*=linear", "6=filter")), HERE)
    rows: dict[str, set[str]] = {}
    for key in load_file(run.folder / "patterns.safetensors"):
        operator, _, row = key.rpartition("/")
        rows.setdefault(operator, set()).add(row)
    assert rows == {
        "0": {"positive", "positive-own-mean"}, "2.conv1": {"linear"}, "2.conv2": {"linear"},
        "addition.0": {"positive", "positive-own-mean"},
        "average_pool.0": {"linear"}, "6": {"filter"},
    }  # fmt: skip
    with pytest.raises(UserError, match=r"no operator matches 'convs\.\*'"):
        fit(make_fit_config(model_spec, shards, tmp_path / "none", estimators=("convs.*=linear",)), HERE)
    assert not (tmp_path / "none").exists()


def test_merged_fits_equal_the_fit_of_all_their_shards(
    undisturbed: Path, local_ray: None, model_spec: str, shards: list[str], tmp_path: Path
) -> None:
    halves = [
        fit(make_fit_config(model_spec, part, tmp_path / name), HERE).folder
        for name, part in (("a", shards[:5]), ("b", shards[5:]))
    ]
    merged = merge([str(half) for half in halves], str(tmp_path / "all"), HERE)
    assert_same_patterns(undisturbed, merged.folder)
    assert merged.manifest()["fit"]["samples"] == 72
    before = Path(merged.folder / "patterns.safetensors").stat().st_mtime_ns
    fit(make_fit_config(model_spec, shards, tmp_path / "all"), HERE)  # it is finished already
    assert Path(merged.folder / "patterns.safetensors").stat().st_mtime_ns == before


def test_fits_with_different_options_or_common_shards_are_not_merged(
    undisturbed: Path, local_ray: None, model_spec: str, shards: list[str], tmp_path: Path
) -> None:
    other = fit(make_fit_config(model_spec, shards[:2], tmp_path / "b", seed=1), HERE).folder
    with pytest.raises(UserError, match="this fit was done with seed 0, now 1 in comparison with"):
        merge([str(undisturbed), str(other)], str(tmp_path / "out"))
    same = fit(make_fit_config(model_spec, shards[:2], tmp_path / "c"), HERE).folder
    with pytest.raises(UserError, match=r"train-000\.tar: is in .* and in .*; each needs shards of its own"):
        merge([str(undisturbed), str(same)], str(tmp_path / "out"))
    with pytest.raises(UserError, match="holds no finished fit"):
        merge([str(undisturbed), str(tmp_path)], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_status_reads_the_progress_of_a_run_from_its_files_alone(undisturbed: Path, tmp_path: Path) -> None:
    now = time.time()
    line, used = status_lines(Run(undisturbed), now, price="2/worker-hour")
    assert line.startswith("fit: complete, 72 samples (")
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    usage = manifest["fit"]["usage"]
    assert 0 < usage["worker_hours"] == usage["cpu_hours"] < 1
    assert used == f"  {Usage(**usage).describe('2/worker-hour')}"
    manifest["fit"]["status"] = "begun"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    progress = json.loads((undisturbed / "progress.json").read_text())
    assert (progress["of"], progress["ended"]) == (12, True)
    worker = {"worker": "here/7", "shard": "x.tar", "seconds": 10.0, "rate": 2.5}
    driver = {"host": "elsewhere", "pid": 1, "begun": "", "token": ""}
    for ended, silent, last in ((False, 20, None), (False, 90, "stale"), (True, 20, "stopped")):
        note = {**progress, "time": now - silent, "ended": ended, "workers": [worker], "driver": driver}
        (tmp_path / "progress.json").write_text(json.dumps(note))
        first, work, *more, used = status_lines(Run(tmp_path), now)
        assert first.startswith(f"fit: {progress['shards']}/12 shards, ")
        assert work == f"  here/7: 2.5 samples/s, {format_duration(10 + silent)} at x.tar"
        assert [line.split()[0].rstrip(":") for line in more] == [last] * (last is not None)
        assert "worker-hours" in used
    early = {"job": "fit", "time": now - 90, "driver": driver}  # the driver was killed before it had a worker
    (tmp_path / "progress.json").write_text(json.dumps(early))
    first, stale, _ = status_lines(Run(tmp_path), now)
    assert first.startswith("fit: started, no shard processed yet")
    assert stale.startswith("  stale: no heartbeat from its driver for")
    with pytest.raises(UserError, match="holds no run"):
        list(status_lines(Run(tmp_path / "none"), now))


@pytest.mark.slow
def test_prometheus_reads_the_progress_of_a_job_from_rays_metrics(
    local_ray: None, model_spec: str, shards: list[str], tmp_path: Path
) -> None:
    fit(make_fit_config(model_spec, shards[:3], tmp_path / "run"), on_cpu(1))
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = {"samples": 18, "shards": 3, "batches": 6}
    deadline = time.monotonic() + 60  # Ray publishes metrics every few seconds
    while True:
        with urlopen(address) as answer:
            lines = answer.read().decode().splitlines()
        mine = [line for line in lines if line.startswith("ray_patternnet_") and f'run="{tmp_path}/run"' in line]
        found = {
            name: sum(float(line.split()[-1]) for line in mine if line.startswith(f"ray_patternnet_{name}_total"))
            for name in wanted
        }
        if found == wanted or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert found == wanted
    assert all('job="fit"' in line for line in mine)


@pytest.mark.slow
def test_max_samples_selects_the_same_samples_for_any_number_of_workers(
    local_ray: None, model_spec: str, shards: list[str], tmp_path: Path
) -> None:
    runs = [fit(make_fit_config(model_spec, shards, tmp_path / f"{n}", max_samples=30), on_cpu(n)) for n in (0, 2)]
    assert [r.manifest()["fit"]["samples"] for r in runs] == [30, 30]
    assert_same_patterns(runs[0].folder, runs[1].folder)


def test_a_rejected_sample_is_listed_and_the_run_continues(
    local_ray: None, model_spec: str, shards: list[str], tmp_path: Path
) -> None:
    import pyarrow.parquet as pq

    bad = str(write_tar(tmp_path / "bad.tar", [{"__key__": "cut", "jpg": b"\xff\xd8\xff\xe0 no more"}]))
    run = fit(make_fit_config(model_spec, [*shards, bad], tmp_path / "run"), HERE)
    (row,) = pq.read_table(run.folder / "quarantine.parquet").to_pylist()
    assert (row["job"], row["shard"], row["key"]) == ("fit", bad, "cut")
    counted = run.manifest()["fit"]
    assert (counted["samples"], counted["refused"], counted["status"]) == (72, 1, "complete")


def test_a_broken_shard_stops_no_other_and_is_processed_once_it_is_fixed(
    local_ray: None, model_spec: str, shards: list[str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.tar"
    broken.write_bytes(Path(shards[0]).read_bytes()[:3000])
    config = make_fit_config(model_spec, [*shards, str(broken)], tmp_path / "run")
    once = replace(HERE, retries=0)
    with pytest.raises(StoppedShortError, match=r"1 of 13 shards cannot be used, the first is \S+/broken\.tar"):
        fit(config, replace(on_cpu(1, max_loss=0.01), retries=0))
    folder = tmp_path / "run" / "moments"
    assert ledger_of(folder).remaining(range(13)) == [12]
    section = fit(config, replace(once, max_bad_shards=1)).manifest()["fit"]
    assert (section["status"], section["shards"], section["samples"]) == ("complete", 12, 72)
    assert "broken.tar: " in section["missing"][str(broken)]
    broken.write_bytes(Path(make_shards(tmp_path / "good", 1, 6, seed=9)[0]).read_bytes())
    fixed = fit(config, HERE).manifest()["fit"]
    assert (fixed["shards"], fixed["samples"], fixed["missing"]) == (13, 78, {})
    assert sorted(n for part in ledger_of(folder).entries for n in part.shards) == list(range(13))


def test_a_worker_that_fails_drops_its_uncommitted_moments(model_spec: str, shards: list[str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.tar"
    broken.write_bytes(Path(shards[0]).read_bytes()[:-4096])
    config = make_fit_config(model_spec, [*shards, str(broken)], tmp_path / "run")
    worker = MomentsWorker(*worker_of(config))
    worker.prepare()
    list(worker.work(MomentsTask(shards[0], number=0), MomentsTask(str(broken), number=12)))
    with pytest.raises(UserError, match="truncated") as error:
        list(worker.work(MomentsTask(str(broken), number=12), MomentsTask(shards[1], number=1)))
    assert error.value.where == str(broken)
    list(worker.work(MomentsTask(shards[1], number=1)))
    part = worker.commit()
    assert part.shards == (1,)
    assert part.samples == 6
