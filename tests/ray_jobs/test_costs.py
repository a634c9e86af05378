"""What jobs take: hours in the manifest, prices, and the forecast of a pilot against what a fit then takes."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patterns import UserError
from ray_jobs.cli.app import exit_status
from ray_jobs.config import Resources
from ray_jobs.config.parsing import split_price
from ray_jobs.engine.signals import StoppedShortError
from ray_jobs.jobs.fit import cost_pilot
from ray_jobs.jobs.fit.cost_pilot import Pilot, Range, forecast, measure_batches, plan_cost, student_quantile
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.runs.run_folder import Run
from ray_jobs.runs.usage import Usage
from ray_jobs.views.report import write_report
from ray_jobs.views.status import status_lines
from tests.conftest import make_shards
from tests.ray_jobs.runs import OPTIONS, make_fit_config, read_command

HERE = Resources(workers=0)


@pytest.mark.parametrize(
    ("text", "value"), [("2.5/gpu-hour", 2.5 * 3), ("0.5/worker-hour", 0.5 * 6), ("0.01/cpu-hour", 0.01 * 24)]
)
def test_price_is_per_hour_of_a_worker_a_gpu_or_a_cpu(text: str, value: float) -> None:
    usage = Usage.of(6 * 3600.0, cpus=4, gpus=0.5)
    assert usage.cost(text) == pytest.approx(value)
    assert f"at {text}" in usage.describe(text)


def test_price_of_gpus_without_a_gpu_says_so() -> None:
    without, free = Usage.of(3600.0, cpus=4, gpus=0), "(no worker has a GPU)"
    assert without.describe("2.5/gpu-hour").endswith(f"cost 0 at 2.5/gpu-hour {free}")
    assert free not in without.describe("2.5/cpu-hour")
    assert free not in Usage.of(3600.0, cpus=4, gpus=0.25).describe("2.5/gpu-hour")
    assert free not in Usage().describe("2.5/gpu-hour")  # no worker yet


@pytest.mark.parametrize("text", ["2.5", "2.5/hour", "x/gpu-hour", "-1/gpu-hour", "inf/gpu-hour", "nan/gpu-hour", ""])
def test_anything_else_is_no_price(text: str, complaint: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match="is no price"):
        split_price(text)
    assert "is no price" in complaint("status", "run", "--price", text)


@pytest.mark.full
def test_hours_add_up_over_interruptions_and_are_shown_with_their_cost(
    model_spec: str, shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone.tar"
    config = make_fit_config(model_spec, [*shards[:2], str(gone)], tmp_path / "run")
    spent = []
    for _ in range(2):
        begun = time.monotonic()
        with pytest.raises(StoppedShortError):
            fit(config, replace(HERE, retries=0, price="3600/worker-hour"))
        spent.append(time.monotonic() - begun)
        section = Run(tmp_path / "run").manifest()["fit"]
        assert section["status"] == "begun"
        assert 0 < 3600 * section["usage"]["worker_hours"] <= sum(spent)
    gone.write_bytes(Path(shards[2]).read_bytes())
    before = section["usage"]["worker_hours"]
    # A driver that is killed records its hours only in its heartbeat.
    progress = json.loads((tmp_path / "run" / "progress.json").read_text())
    progress["usage"]["worker_hours"] = before + 1.0
    (tmp_path / "run" / "progress.json").write_text(json.dumps(progress))
    section = fit(config, HERE).manifest()["fit"]
    hours = section["usage"]["worker_hours"]
    assert before + 1.0 < hours < before + 1.1
    assert section["price"] == "3600/worker-hour"
    *_, used = status_lines(Run(tmp_path / "run"), time.time())
    assert f"cost {Usage(worker_hours=hours).cost('3600/worker-hour'):,.0f} at 3600/worker-hour" in used
    write_report(tmp_path / "page.html", [str(tmp_path / "run")], price="2/worker-hour")
    assert "at 2/worker-hour" in (tmp_path / "page.html").read_text()


@given(st.integers(3, 200))
def test_quantile_of_few_batches_is_that_of_students_t(freedom: int) -> None:
    stats = pytest.importorskip("scipy.stats", reason="needs scipy: pip install scipy")
    assert student_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=0.01)


def reports_of(rng: np.random.Generator, batches: int, seconds: float, noise: float) -> list[tuple[float, int]]:
    """Return reports of a worker on batches of 8, of which the first takes half a second longer."""
    times = seconds * np.exp(noise * rng.normal(size=batches))
    times[1] += 0.5
    return [(float(at), 8 * (n + 1)) for n, at in enumerate(np.cumsum(times))]


def test_interval_covers_the_time_of_a_sample_and_the_first_batches_do_not_count() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        found, spread, late, batches = measure_batches([reports_of(rng, 10, 0.8, 0.3) for _ in range(2)])
        truth = 0.8 * np.exp(0.3**2 / 2) / 8
        covered += abs(found - truth) <= spread * found
        assert batches == 16
        assert 0 <= late < 3
    assert 0.9 <= covered / 400 <= 1.0
    with pytest.raises(UserError, match="too few samples"):
        measure_batches([[(1.0, 8)]])
    assert measure_batches([[(1.0, 8), (2.0, 16)]])[1] == cost_pilot.UNKNOWN_SPREAD


PILOT = Pilot(
    start=10.0, warm_up=1.0, per_sample=0.1, spread=0.2, batches=20, prepare=2.0, commit=0.5, end=5.0,
    moments_bytes=1000, result_bytes=500, workers=4, cpus=2.0, gpus=0.5, passes=1,
)  # fmt: skip


def test_forecast_scales_the_pilot_to_all_samples_and_rounds(model_spec: str, tmp_path: Path) -> None:
    config = make_fit_config(model_spec, [f"{n}.tar" for n in range(10)], tmp_path)
    found = forecast(PILOT, config, Range(900, 1000, 1100), 4, max_loss=900.0, ratio=200.0)
    # Ten shards on four workers: one of them has three shards of 100 samples.
    assert found.seconds.value == pytest.approx(10 + 5 + 3 * 100 * 0.1 + 1 + 0.5)
    assert found.seconds.low == pytest.approx((10 + 5) * 0.8 + 3 * 90 * 0.1 * 0.8 + 1.5)
    assert found.seconds.high == pytest.approx((10 + 5) * 1.2 + 3 * 110 * 0.1 * 1.2 + 1.5)
    assert 3600 * found.usage[1].worker_hours == pytest.approx(4 * (2 + 31.5))
    assert found.cost("3600/gpu-hour").value == pytest.approx(4 * (2 + 31.5) * 0.5)
    assert found.written == 4 * 1000 + 500
    twice = forecast(replace(PILOT, passes=2), config, Range(900, 1000, 1100), 4, 900.0, 200.0)
    assert twice.seconds.value == pytest.approx(15 + 2 * 31.5)
    assert forecast(PILOT, config, Range(900, 1000, 1100), 4, 0.0, 200.0).written == 12 * 1000 + 500


@pytest.mark.full
def test_pilot_leaves_nothing_and_counts_all_samples(model_spec: str, shards: list[str], tmp_path: Path) -> None:
    config = make_fit_config(model_spec, shards, tmp_path / "out")
    pilot, found = plan_cost(config, HERE)
    assert found.samples == 72
    assert found.seconds.low < found.seconds.value < found.seconds.high
    assert pilot.moments_bytes > 0
    assert pilot.start > 0
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(UserError, match="need a folder"):
        plan_cost(replace(config, out=""), Resources(workers=2, address="head:6379"))
    with pytest.raises(UserError, match="number of workers"):
        plan_cost(config, Resources())


@pytest.mark.full
def test_command_of_the_page_runs(
    model_spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(tmp_path / "data", 3, 20)
    monkeypatch.chdir(tmp_path)
    words = [
        model_spec if word == "torchvision:resnet50" else word for word in read_command("operations.md", "### A pilot")
    ]
    place = words.index("--workers")
    words[place + 1] = "0"
    assert exit_status([*words, *OPTIONS, "--batch-size", "4"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^  cost: 0 \(0 to 0\) at 2.5/gpu-hour \(no worker has a GPU\)$", out, re.M)
    assert "fit of about 60 samples in 3 shards with 1 workers:" in out


@pytest.mark.slow
@pytest.mark.ray
def test_fit_takes_what_its_pilot_said(tmp_path: Path) -> None:
    """Within 20 %, with two workers on two cores. Both parts run on the same machine, one after the other."""
    from benchmarks.forecasting import compare  # its imports take seconds

    found = compare(make_shards(tmp_path / "data", 24, 64, seed=1), tmp_path, workers=2)
    print(found)
    assert abs(found.forecast.seconds.value - found.seconds) <= 0.2 * found.seconds
    assert abs(found.forecast.usage[1].worker_hours - found.worker_hours) <= 0.2 * found.worker_hours
    assert found.forecast.seconds.low <= found.seconds <= found.forecast.seconds.high
    assert found.kept <= 1.2 * found.forecast.kept
