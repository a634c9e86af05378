"""The evaluate job: planted outcomes, the values of the library's measures, and the same bytes after a kill."""

import io
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from patterns import UserError
from patterns.attribution.explainer import Explainer
from patterns.evaluation import heat, randomize, spearman
from ray_jobs import config as configs
from ray_jobs.cli.app import exit_status
from ray_jobs.config import EvaluateConfig, FitConfig, ModelConfig, Resources
from ray_jobs.data.shard_reader import ReaderConfig, ShardReader
from ray_jobs.jobs.evaluate import evaluate, format_summary
from ray_jobs.jobs.evaluation_measures import MEASURES
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.models import loading
from tests.conftest import write_tar
from tests.ray_jobs.runs import wait_until

HERE = Resources(workers=0)
ROOT = Path(__file__).parents[2]
# Class k is the share of pixels in one of four colors. Black pixels have no effect.
COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}
MODEL = """
import torch
from torch import nn


class Colors(nn.Module):
    def __init__(self):
        super().__init__()
        self.detect = nn.Conv2d(3, 4, 1)
        self.out = nn.Linear(4, 4)
        with torch.no_grad():
            self.detect.weight[:, :, 0, 0] = torch.tensor(
                [[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [0.6, 0.6, -1]]
            )
            self.detect.bias[:] = torch.tensor([0.0, 0, 0, -0.7])
            self.out.weight[:] = 20 * torch.eye(4)
            self.out.bias[:] = 0

    def forward(self, x):
        return self.out(torch.relu(self.detect(x)).mean((2, 3)))


def colors():
    return Colors()
"""
METHODS = ("gradient-x-input", "patternattribution:class-specific", "patternattribution:paper", "patternnet")
PREPROCESSING = {"image_size": 16, "resize": 16, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def picture(rng: np.random.Generator, color: tuple[int, int, int]) -> bytes:
    """Return a black picture with a square in shades of a color, because patterns need variance."""
    array = np.zeros((16, 16, 3), np.uint8)
    top, left = rng.integers(1, 8, 2)
    array[top : top + 7, left : left + 7] = rng.uniform(0.8, 1, (7, 7, 1)) * color
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "colors.py"
    path.write_text(MODEL)
    return f"{path}:colors"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    rng, folder = np.random.default_rng(3), tmp_path_factory.mktemp("colors")
    samples = [
        [
            {"__key__": f"{number}-{i}-{name}", "png": picture(rng, color), "cls": str(k).encode()}
            for i in range(3)
            for k, (name, color) in enumerate(COLORS.items())
        ]
        for number in range(3)
    ]
    return [str(write_tar(folder / f"colors-{n}.tar", each)) for n, each in enumerate(samples)]


@pytest.fixture(scope="module")
def fitted(spec: str, shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fit")
    fit(FitConfig(model=ModelConfig(spec=spec, **PREPROCESSING), shards=tuple(shards), out=str(out)), HERE)  # type: ignore[arg-type]
    return out


@pytest.fixture(scope="module")
def config(spec: str, shards: list[str], fitted: Path) -> EvaluateConfig:
    model = ModelConfig(spec=spec, **PREPROCESSING)  # type: ignore[arg-type]
    return EvaluateConfig(
        model=model, patterns=str(fitted), shards=tuple(shards), out=str(fitted), methods=METHODS, patch=4, steps=8,
        batch_size=5,
    )  # fmt: skip


@pytest.fixture(scope="module")
def values(config: EvaluateConfig) -> dict[tuple[str, str], dict[str, list[float]]]:
    """The values of a finished job, by measure and method, then by key."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in pq.read_table(Path(str(evaluate(config, HERE).folder)) / "evaluation.parquet").to_pylist():
        found.setdefault((row["measure"], row["method"]), {}).setdefault(row["key"], []).append(row["value"])
    return found


def mean(values: dict[str, list[float]]) -> float:
    return float(np.mean([v for each in values.values() for v in each]))


@pytest.mark.full
def test_pointing_is_1_for_maps_of_the_object_and_a_quarter_for_noise(
    values: dict[tuple[str, str], dict[str, list[float]]],
) -> None:
    assert mean(values["pointing", "gradient-x-input"]) == pytest.approx(1.0)
    assert mean(values["pointing", "patternattribution:class-specific"]) > 0.99
    shares = [v for each in values["pointing", "random"].values() for v in each]
    assert np.mean(shares) == pytest.approx(0.25, abs=4 * np.std(shares) / len(shares) ** 0.5)
    assert len(shares) == 4 * 36  # a grid for each sample, with four targets


@pytest.mark.full
def test_class_cosine_is_that_of_the_maps_of_the_two_likeliest_classes(
    config: EvaluateConfig, values: dict[tuple[str, str], dict[str, list[float]]]
) -> None:
    loaded = loading.load(config.model)
    explainer = Explainer.load(config.patterns, loaded.model, METHODS)
    for batch in ShardReader(config.shards[1], ReaderConfig(loaded.preprocessing, 4)):
        scores = loaded.model(batch.images)
        both = explainer(batch.images, scores.topk(2).indices).maps
        for method in METHODS:
            for key, (one, other) in zip(batch.keys, both[method].flatten(2).numpy()):
                expected = one @ other / max(np.linalg.norm(one) * np.linalg.norm(other), 1e-30)
                (found,) = values["class", method][key]
                assert found == pytest.approx(1.0 if (one == other).all() else expected, abs=1e-5)


@pytest.mark.full
def test_maps_that_ignore_the_model_keep_their_ranks_if_its_weights_are_random(
    values: dict[tuple[str, str], dict[str, list[float]]],
) -> None:
    for measure in ("random-top", "random-half", "random-all"):
        assert mean(values[measure, "signal:identity"]) == pytest.approx(1.0)
        assert mean(values[measure, "sobel"]) == pytest.approx(1.0)
    # The maps of this network rank pixels by their brightness, which random weights keep, unless the gate closes.
    assert set(np.round([v for each in values["random-all", "gradient-x-input"].values() for v in each])) <= {0.0, 1.0}


@pytest.mark.full
def test_refitted_patterns_are_those_of_a_fit_of_the_model_with_random_weights(
    config: EvaluateConfig, values: dict[tuple[str, str], dict[str, list[float]]], tmp_path: Path
) -> None:
    loaded = loading.load(config.model)
    random = randomize(loaded.network, ["out", "detect"], torch.Generator().manual_seed(config.seed))
    state = {f"{name}.weight": op.weight for name, op in random.operators.items() if name in ("out", "detect")}
    state |= {f"{name}.bias": random.operators[name].bias for name in ("out", "detect")}
    torch.save(state, tmp_path / "random.pt")
    model = replace(config.model, weights=str(tmp_path / "random.pt"))
    fit(FitConfig(model=model, shards=config.shards, out=str(tmp_path / "fit"), positions=16, batch_size=5), HERE)
    after = loading.load(model)
    explainers = [
        Explainer.load(folder, each.model, METHODS)
        for folder, each in ((config.patterns, loaded), (tmp_path / "fit", after))
    ]
    changed = 0
    for batch in ShardReader(config.shards[1], ReaderConfig(loaded.preprocessing, 4)):
        classes = loaded.model(batch.images).argmax(1)
        one, other = (explainer(batch.images, classes).maps for explainer in explainers)
        for method in METHODS:
            expected = spearman(heat(one[method]), heat(other[method])).nan_to_num(0.0)
            for key, value in zip(batch.keys, expected.tolist()):
                (found,) = values["random-all-refit", method][key]
                assert found == pytest.approx(value, abs=1e-3)
                changed += values["random-all", method][key] != [found]
    assert changed  # refitting makes a difference
    assert values["random-all-refit", "gradient-x-input"] == values["random-all", "gradient-x-input"]


@pytest.mark.full
def test_degradation_removes_the_object_first(values: dict[tuple[str, str], dict[str, list[float]]]) -> None:
    assert mean(values["degradation", "patternattribution:class-specific"]) > mean(values["degradation", "random"])


@pytest.mark.full
def test_table_has_every_method_and_measure_with_standard_errors(
    config: EvaluateConfig, values: dict[tuple[str, str], dict[str, list[float]]], capsys: pytest.CaptureFixture[str]
) -> None:
    run = evaluate(config, HERE)  # it is finished
    summary = pq.read_table(Path(str(run.folder)) / "evaluation-summary.parquet").to_pylist()
    assert {(row["measure"], row["method"]) for row in summary} == values.keys()
    for row in summary:
        means = [np.mean(each) for each in values[row["measure"], row["method"]].values()]
        assert row["samples"] == len(means) == 36
        assert row["mean"] == pytest.approx(np.mean(means))
        assert row["error"] == pytest.approx(np.std(means, ddof=1) / 6, abs=1e-12)
    header, rows = format_summary(run)
    assert len(header) == 2 + len(MEASURES)
    assert [row[0] for row in rows] == [*METHODS, "random", "sobel", "signal:identity"]
    assert (Path(str(run.folder)) / "evaluation.png").stat().st_size > 1000
    recorded = run.manifest()["evaluate"]["estimators"]
    assert recorded["patternattribution:class-specific"]["out"] == "identity"
    assert recorded["patternattribution:class-specific"]["detect"] == "two-component-own-mean"


@pytest.mark.full
def test_a_killed_job_resumes_to_the_same_bytes(
    config: EvaluateConfig, values: object, spec: str, shards: list[str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "ray_jobs", "evaluate", "--patterns", config.patterns, "--out", str(tmp_path)]
    for shard in shards:
        command += ["--shards", shard]
    command += ["--methods", ",".join(METHODS), "--patch-size", "4", "--steps", "8", "--batch-size", "5"]
    with subprocess.Popen([*command, "--workers", "0"], cwd=ROOT, stderr=subprocess.PIPE) as process:
        wait_until(lambda: list(tmp_path.glob("evaluation/*[0-9].parquet")) or process.poll() is not None)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "evaluation.parquet").exists()
    assert exit_status([*command[3:], "--workers", "0"]) == 0
    for name in ("evaluation.parquet", "evaluation-summary.parquet"):
        assert (tmp_path / name).read_bytes() == (Path(config.out) / name).read_bytes()


@pytest.mark.full
def test_contrast_changes_the_maps_and_a_measure_that_is_impossible_is_named(
    config: EvaluateConfig, tmp_path: Path, model_spec: str, values: dict[tuple[str, str], dict[str, list[float]]]
) -> None:
    contrasted = replace(config, out=str(tmp_path / "contrast"), target="contrast", measures=("class",))
    rows = pq.read_table(Path(str(evaluate(contrasted, HERE).folder)) / "evaluation.parquet").to_pylist()
    own = [row["value"] for row in rows if row["method"] == METHODS[2]]
    assert np.mean(own) < mean(values["class", METHODS[2]])
    odd = ModelConfig(spec=config.model.spec, **{**PREPROCESSING, "image_size": 15, "resize": 15})  # type: ignore[arg-type]
    with pytest.raises(UserError) as caught:
        evaluate(replace(config, model=odd, out=str(tmp_path / "odd"), measures=("pointing",)), HERE)
    assert caught.value.parameter == "measures"
    assert "even height" in caught.value.what


def test_config_names_the_measures_of_the_table() -> None:
    assert tuple(MEASURES) == configs.jobs.MEASURES
