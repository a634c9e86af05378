"""The contents of `patternnet report`."""

import shutil
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from patterns import UserError
from patterns.attribution.methods import BASELINES
from ray_jobs.config import EvaluateConfig, ExplainConfig, FitConfig, ModelConfig
from ray_jobs.jobs.evaluate import evaluate
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.jobs.quality import compute_medians
from ray_jobs.runs.run_folder import Run
from ray_jobs.views.report import write_report
from ray_jobs.views.report.charts import Scale
from ray_jobs.views.report.contents import FLAGS, Contents
from tests.conftest import make_shards
from tests.ray_jobs.runs import PREPROCESSING
from tests.views.reported import HERE, METHODS


def report(tmp_path: Path, *runs: Run, count: int = 0) -> list[Contents]:
    return write_report(tmp_path / "report.html", [str(run.folder) for run in runs], count)


@pytest.mark.full
def test_numbers_equal_those_of_the_tables(run: Run, tmp_path: Path) -> None:
    (page,) = report(tmp_path, run)
    assert page.rho is not None
    assert page.health is not None
    assert page.rho.medians == compute_medians(run)
    quality = pq.read_table(run.folder / "quality.parquet").drop_null().to_pandas()
    for operator, values in page.rho.rows:
        for one, value in zip(page.rho.estimators, values):
            own = quality[(quality.operator == operator) & (quality.estimator == one)].rho
            assert value is None if own.empty else value == pytest.approx(own.median(), rel=1e-12)
    flags = pq.read_table(run.folder / "neurons.parquet").to_pandas().groupby("operator").flag.value_counts()
    for operator, counts in page.health.rows:
        assert counts == [flags[operator].get(flag, 0) for flag in FLAGS]
    assert page.convergence
    assert page.curves is not None
    assert {method for method, *_ in page.curves.areas} == {*METHODS[1:], *BASELINES}
    assert len(page.curves.chart.bands) == 2 + len(BASELINES)


@pytest.mark.full
def test_evaluation_has_the_numbers_of_its_table(
    bare: Run, model: ModelConfig, shards: list[str], tmp_path: Path
) -> None:
    sized = replace(model, image_size=15, resize=15)  # grids need an even height
    methods = ("gradient", "patternattribution:linear")
    out = str(tmp_path / "run")
    fit(FitConfig(model=sized, shards=tuple(shards[:2]), out=out), HERE)
    evaluated = evaluate(
        EvaluateConfig(
            model=sized, patterns=out, shards=(shards[0],), out=out, methods=methods, patch=4, steps=3,
            measures=("class", "degradation", "pointing"),
        ),
        HERE,
    )  # fmt: skip
    first, second = report(tmp_path, evaluated, bare)
    assert first.evaluation is not None
    assert second.evaluation is None
    summary = pq.read_table(evaluated.folder / "evaluation-summary.parquet").to_pylist()
    expected = {(row["method"], row["measure"]): (row["mean"], row["error"], row["samples"]) for row in summary}
    rows = [*first.evaluation.methods, *first.evaluation.baselines]
    shown = {
        (row.method, column.name): (cell.mean, cell.error, cell.samples)
        for row in rows
        for column, cell in zip(first.evaluation.columns, row.cells)
        if cell is not None
    }
    assert shown == expected
    assert [row.method for row in first.evaluation.methods] == list(methods)
    assert [row.method for row in first.evaluation.baselines] == list(BASELINES)
    assert {c.name: c.higher_is_better for c in first.evaluation.columns} == {"class": False, "degradation": True}
    assert {row.method: row.time for row in rows} == evaluated.manifest()["evaluate"]["times"]
    text = (tmp_path / "report.html").read_text()
    for mean, error, _ in expected.values():
        assert f">{mean:.3f} ± {error:.3f}</td>" in text
    assert "Not measured: grid pointing game, because its input has no even height and width." in text
    assert first.compared["Evaluation"]["class: gradient"] == f"{expected['gradient', 'class'][0]:.3f}"


@pytest.mark.full
def test_shown_weights_are_equal_from_patterns_and_from_the_model(run: Run, bare: Run, tmp_path: Path) -> None:
    def weights(page: Contents) -> list[np.ndarray]:
        assert page.filters is not None
        assert page.filters.rows[0] == ("w", "weight")
        pictures = (neuron.pictures[0] for neuron in page.filters.neurons)
        return [np.asarray(Image.open(BytesIO(urlopen(uri).read()))).astype(int) for uri in pictures if uri]

    one, other = (weights(page) for page in report(tmp_path, run, bare))
    assert len(one) == len(other) == 6
    assert max(np.abs(a - b).max() for a, b in zip(one, other)) <= 1
    assert len({a.tobytes() for a in one}) == 6


@pytest.mark.full
def test_patterns_are_shown_without_the_model(
    model_spec: str, model: ModelConfig, shards: list[str], tmp_path: Path
) -> None:
    copy = tmp_path / "gone.py"
    shutil.copyfile(model_spec.partition(":")[0], copy)
    gone = ModelConfig(spec=f"{copy}:small", **PREPROCESSING)  # type: ignore[arg-type]
    run = fit(FitConfig(model=gone, shards=tuple(shards[:2]), out=str(tmp_path / "run")), HERE)
    copy.unlink()
    (page,) = report(tmp_path, run)
    assert page.filters is not None
    assert page.filters.rows[0] == ("a", "linear")
    assert (
        "The weights w are not shown because the model cannot be loaded here" in (tmp_path / "report.html").read_text()
    )


def test_missing_results_name_the_command_that_makes_them(bare: Run, tmp_path: Path) -> None:
    report(tmp_path, bare, count=200)
    text = (tmp_path / "report.html").read_text()
    for command in ("quality", "explain", "degrade", "evaluate"):
        assert f"<code>patternnet {command} --patterns {bare.folder} --shards …</code>" in text
    assert "--until-converged" in text
    assert "<img" not in text.partition("run0-convergence-title")[2].partition("<script>")[0]


@pytest.mark.full
def test_missing_photographs_do_not_hide_other_results(run: Run, model: ModelConfig, tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "s", 1, 4)
    explain(
        ExplainConfig(
            model=model, patterns=str(run.folder), shards=tuple(shards), out=str(tmp_path / "run"), methods=METHODS
        ),
        HERE,
    )
    Path(shards[0]).unlink()
    (page,) = write_report(tmp_path / "x.html", [str(tmp_path / "run")])
    assert page.samples is None
    assert shards[0] in page.unseen
    assert "The explanations cannot be shown" in (tmp_path / "x.html").read_text()


@pytest.mark.full
def test_same_seed_draws_the_same_samples(run: Run, tmp_path: Path) -> None:
    def keys(seed: int) -> list[str]:
        (page,) = write_report(tmp_path / "x.html", [str(run.folder)], 5, None, seed)
        assert page.samples is not None
        return [card.key for card in page.samples.cards]

    assert keys(1) == keys(1) != keys(2)


@pytest.mark.full
def test_folder_without_a_run_is_an_error_and_nothing_is_written(run: Run, tmp_path: Path, complaint: Any) -> None:
    out = tmp_path / "report.html"
    for folders in ([tmp_path], [run.folder, tmp_path / "nowhere"]):
        assert "holds no run. Name the folder" in complaint("report", *folders, "--out", out, "--samples", 0)
    assert not out.exists()
    with pytest.raises(UserError, match="cannot be read"):
        write_report(out, [str(run.folder)], classes=str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("scale", "texts"),
    [
        (Scale(0, 1, 0, 100), ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (Scale(0, 37, 0, 100), ["0", "10", "20", "30"]),
        (Scale(0.02, 0.5, 0, 100, log=True), ["0.03", "0.1", "0.3"]),
        (Scale(30, 72, 0, 100, log=True), ["30", "40", "50", "60", "70"]),
        (Scale(8, 2_000_000, 0, 100, log=True), ["10", "100", "1k", "10k", "100k", "1M"]),
    ],
)
def test_axes_have_round_numbers(scale: Scale, texts: list[str]) -> None:
    assert [tick.text for tick in scale.ticks()] == texts
