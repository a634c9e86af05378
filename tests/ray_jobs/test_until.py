"""A fit with `until_converged` stops early when its patterns have converged, says so, and resumes alike."""

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from ray_jobs.config import FitConfig, ModelConfig, Resources
from ray_jobs.engine.signals import StoppedShortError
from ray_jobs.jobs.fit.fit import fit
from tests.conftest import make_shards
from tests.ray_jobs.runs import PREPROCESSING

HERE = Resources(workers=0, max_loss=0.0)


@pytest.fixture(scope="module")
def config(model_spec: str, tmp_path_factory: pytest.TempPathFactory) -> FitConfig:
    folder = tmp_path_factory.mktemp("until")
    shards = make_shards(folder / "s", 40, 8, seed=3)
    model = ModelConfig(spec=model_spec, **PREPROCESSING)  # type: ignore[arg-type]
    return FitConfig(
        model=model,
        shards=tuple(shards),
        out=str(folder / "run"),
        batch_size=8,
        estimators=("linear",),
        until_converged=0.4,
    )


@pytest.mark.full
def test_fit_stops_when_its_patterns_have_converged_and_draws_the_curve(config: FitConfig) -> None:
    section = fit(config, HERE).manifest()["fit"]
    converged = section["converged"]
    assert section["status"] == "complete"
    assert 4 * 8 <= section["samples"] < 40 * 8
    assert section["samples"] - 8 <= converged["samples"] <= section["samples"], "it read more than the current shard"
    assert converged["error"] <= 0.4
    folder = Path(config.out)
    rows = pq.read_table(folder / "convergence.parquet").to_pylist()
    checks = sorted({row["samples"] for row in rows})
    worst = [max((row["p90"] or 9.0) for row in rows if row["samples"] == n) for n in checks]
    assert len(checks) > 3
    assert worst[-1] == converged["error"]
    assert all(error > 0.4 for error in worst[:-1]), "it continued although it had converged"
    assert {row["operator"] for row in rows} == {"0", "2.conv1", "2.conv2", "addition.0", "average_pool.0", "6"}
    assert any(row["change"] for row in rows)
    with Image.open(folder / "convergence.png") as picture:
        assert picture.width > 300
    before = (folder / "patterns.safetensors").stat().st_mtime_ns
    fit(config, HERE)
    assert (folder / "patterns.safetensors").stat().st_mtime_ns == before


@pytest.mark.full
def test_fit_that_does_not_converge_reads_all_shards_and_reports_its_error(config: FitConfig, tmp_path: Path) -> None:
    few = replace(config, shards=config.shards[:6], out=str(tmp_path / "run"), until_converged=1e-6)
    section = fit(few, HERE).manifest()["fit"]
    assert section["samples"] == 48
    assert section["converged"]["error"] > 1e-6
    assert section["converged"]["samples"] == 48


@pytest.mark.full
def test_fit_that_was_killed_after_it_converged_reads_no_more(
    config: FitConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = replace(config, out=str(tmp_path / "run"))
    with monkeypatch.context() as patched:
        patched.setattr("ray_jobs.jobs.fit.fit.finish", stop)
        with pytest.raises(StoppedShortError):
            fit(again, HERE)
    monkeypatch.setattr("ray_jobs.jobs.moments_job.MomentsWorker.work", lambda *_: pytest.fail("a shard was read"))
    section = fit(again, HERE).manifest()["fit"]
    assert section["converged"]["error"] <= 0.4
    assert section["samples"] == section["converged"]["samples"]  # the last check covers the current shard too


def stop(*_: object) -> None:
    """End a fit before it writes its patterns, as a kill would."""
    raise StoppedShortError


@pytest.mark.slow
def test_convergence_checks_of_several_workers_stop_a_fit_too(
    local_ray: None, config: FitConfig, tmp_path: Path
) -> None:
    out = replace(config, out=str(tmp_path / "run"))
    section = fit(out, Resources(workers=2, gpus_per_worker=0, max_loss=0.0)).manifest()["fit"]
    assert section["converged"]["error"] <= 0.4
    assert 32 <= section["samples"] <= 320
