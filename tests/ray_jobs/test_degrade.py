"""The degrade job: known outcomes, curves of a slow loop, and the same results for any number of workers."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from webdataset import TarWriter

from patterns import UserError
from patterns.attribution.explainer import Explainer
from patterns.attribution.methods import BASELINES
from ray_jobs.config import DegradeConfig, ModelConfig, Resources
from ray_jobs.data.image_decoding import decode
from ray_jobs.data.samples import derive_seed
from ray_jobs.data.shard_reader import read_shard
from ray_jobs.jobs.degrade import MeanCurve, degrade, format_areas
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.models import loading
from tests.ray_jobs.runs import PREPROCESSING, make_fit_config

HERE = Resources(workers=0)
METHODS = ("gradient-x-input", "patternattribution")
# A model of 16×16 images whose output depends only on the 4×4 patch in row 1, column 2.
LOOKING = """
import torch
from torch import nn


class Looking(nn.Module):
    def __init__(self):
        super().__init__()
        self.look = nn.Linear(3 * 16 * 16, 2, bias=False)
        with torch.no_grad():
            mask = torch.zeros(3, 16, 16)
            mask[:, 4:8, 8:12] = 0.02
            self.look.weight[0] = mask.flatten()
            self.look.weight[1] = 0

    def forward(self, x):
        return self.look(x.flatten(1))


def looking():
    return Looking()
"""
PATCHES = 16  # of an image


@pytest.fixture(scope="module")
def looking(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("model") / "looking.py"
    file.write_text(LOOKING)
    return f"{file}:looking"


@pytest.fixture(scope="module")
def bright(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Shards of noise that is much brighter than black."""
    folder, rng = tmp_path_factory.mktemp("bright"), np.random.default_rng(0)
    paths = []
    for shard in range(3):
        paths.append(f"{folder}/{shard}.tar")
        tar = TarWriter(paths[-1], encoder=False)
        for key in range(20):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(100, 256, (16, 16, 3), np.uint8)).save(buffer, "png")
            tar.write({"__key__": f"{shard}-{key}", "png": buffer.getvalue(), "cls": b"0"})
        tar.close()
    return paths


def degrading(spec: str, shards: list[str], out: Path, **options: object) -> DegradeConfig:
    model = ModelConfig(spec=spec, **PREPROCESSING)  # type: ignore[arg-type]
    defaults: dict[str, object] = {"batch_size": 7, "methods": METHODS, "patch": 4, "steps": PATCHES}
    return DegradeConfig(model=model, patterns=str(out), shards=tuple(shards), out=str(out), **defaults | options)  # type: ignore[arg-type]


@pytest.mark.full
def test_the_patch_that_a_model_uses_is_replaced_first_and_a_random_order_falls_as_expected(
    looking: str, bright: list[str], tmp_path: Path
) -> None:
    fit(make_fit_config(looking, bright, tmp_path / "run", estimators=("linear",)), HERE)
    config = degrading(looking, bright, tmp_path / "run", replacement="zero", methods=METHODS[:1])
    run = degrade(config, HERE)
    table = pq.read_table(tmp_path / "run" / "degradation.parquet").to_pylist()
    oracle = [row["curve"] for row in table if row["method"] == "gradient-x-input"]
    blind = [row["curve"] for row in table if row["method"] == "random"]
    assert len(oracle) == len(blind) == 60
    for curve in oracle:  # the first step replaces the only patch that matters
        assert curve[1] < curve[0] - 0.05
        assert curve[1:] == pytest.approx([curve[1]] * PATCHES, abs=1e-6)
    for curve in blind:  # the curve falls at a single step; all steps are equally likely
        falls = [n for n in range(PATCHES) if abs(curve[n + 1] - curve[n]) > 1e-6]
        assert len(falls) == 1
    curves = pq.read_table(tmp_path / "run" / "degradation-curves.parquet").to_pylist()
    start, end = oracle[0][0], oracle[0][1]
    mean = {row["step"]: row["mean"] for row in curves if row["method"] == "random"}
    start, end = (float(np.mean([curve[n] for curve in oracle])) for n in (0, -1))
    for step in (4, 8, 12):
        expected = start + (end - start) * step / PATCHES
        share = step / PATCHES
        assert abs(mean[step] - expected) < 4 * (start - end) * (share * (1 - share) / 60) ** 0.5
    areas = run.manifest()["degrade"]["areas"]
    assert areas["gradient-x-input"]["area"] == pytest.approx((start - end) * PATCHES / (PATCHES + 1), rel=1e-4)
    assert areas["random"]["high"] < areas["gradient-x-input"]["low"]
    order = [line.split()[0] for line in format_areas(run)]
    assert order[0] == "gradient-x-input"
    assert sorted(order[1:]) == sorted(BASELINES)
    assert (tmp_path / "run" / "degradation.png").read_bytes().startswith(b"\x89PNG")


def slow_curve(model: nn.Module, x: Tensor, values: Tensor, least_first: bool) -> list[float]:
    """Return the curve of one image, patch by patch, by mean replacement."""
    with torch.no_grad():
        found = [model(x[None]).softmax(1)[0]]
    predicted = int(found[0].argmax())
    boxes = [(slice(y, y + 5), slice(c, c + 5)) for y in range(0, 16, 5) for c in range(0, 16, 5)]
    for rows, columns in sorted(boxes, key=lambda box: float(values[box].sum()) * (1 if least_first else -1)):
        x = x.clone()
        x[:, rows, columns] = x[:, rows, columns].mean((1, 2), keepdim=True)
        with torch.no_grad():
            found.append(model(x[None]).softmax(1)[0])
    return [float(p[predicted]) for p in found]


@pytest.mark.full
@pytest.mark.parametrize("least_first", [False, True])
def test_curves_equal_those_of_a_slow_loop(
    model_spec: str, shards: list[str], tmp_path: Path, least_first: bool
) -> None:
    fit(make_fit_config(model_spec, shards[:3], tmp_path), HERE)
    config = degrading(model_spec, shards[3:5], tmp_path, patch=5, least_first=least_first)
    degrade(config, HERE)
    loaded = loading.load(config.model)
    model = loaded.model
    explainer = Explainer.load(tmp_path, model, METHODS)
    rows = pq.read_table(tmp_path / "degradation.parquet").to_pylist()
    found = {(row["shard"], row["key"], row["method"]): row["curve"] for row in rows}
    seen = 0
    for shard in shards[3:5]:
        for sample in read_shard(shard):
            key = (shard, sample.key, METHODS[1])
            if key not in found:
                continue  # rejected
            seen += 1
            x = decode(sample.files, loaded.preprocessing)
            maps = explainer(x[None]).maps
            for method in METHODS:
                expected = slow_curve(model, x, maps[method][0].sum(0), least_first)
                assert found[shard, sample.key, method] == pytest.approx(expected, abs=2e-5)
    assert seen > 5
    assert len(rows) == (len(METHODS) + len(BASELINES)) * seen


@pytest.mark.full
def test_a_random_order_depends_on_the_key_and_the_seed_alone(
    model_spec: str, shards: list[str], tmp_path: Path
) -> None:
    fit(make_fit_config(model_spec, shards[:3], tmp_path / "fit"), HERE)
    curves = []
    for size, seed in ((3, 0), (8, 0), (8, 1)):
        out = tmp_path / f"{size}-{seed}"
        config = degrading(model_spec, shards[3:4], tmp_path / "fit", batch_size=size, seed=seed, methods=("random",))
        degrade(replace(config, out=str(out)), HERE)
        rows = pq.read_table(out / "degradation.parquet", filters=[("method", "==", "random")])
        curves.append(np.stack(rows["curve"].to_numpy()))
    np.testing.assert_allclose(curves[0], curves[1], atol=2e-6)
    assert np.abs(curves[1] - curves[2]).max() > 1e-4
    assert derive_seed("0/a") != derive_seed("1/a")


@pytest.mark.slow
def test_workers_on_a_cluster_compute_what_one_process_computes(
    model_spec: str, shards: list[str], tmp_path: Path, local_ray: None
) -> None:
    fit(make_fit_config(model_spec, shards[:3], tmp_path / "fit"), HERE)
    config = degrading(model_spec, shards, tmp_path / "fit", max_samples=40)
    degrade(replace(config, out=str(tmp_path / "here")), HERE)
    degrade(replace(config, out=str(tmp_path / "there")), Resources(workers=2))
    one, other = (pq.read_table(tmp_path / name / "degradation.parquet") for name in ("here", "there"))
    assert one.drop_columns(["curve", "area"]).equals(other.drop_columns(["curve", "area"]))
    np.testing.assert_allclose(np.stack(one["curve"].to_numpy()), np.stack(other["curve"].to_numpy()), atol=2e-6)


@pytest.mark.full
def test_a_finished_shard_is_not_processed_again(model_spec: str, shards: list[str], tmp_path: Path) -> None:
    fit(make_fit_config(model_spec, shards[:3], tmp_path), HERE)
    config = degrading(model_spec, shards[:3], tmp_path)
    run = degrade(config, HERE)
    first = (tmp_path / "degradation.parquet").read_bytes()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "degradation").glob("*.parquet")}
    gone = sorted(written)[0]
    gone = gone if "refused" not in gone.name else gone.with_name(gone.name.replace(".refused", ""))
    gone.unlink()
    manifest = run.manifest()
    run.record("degrade", manifest["degrade"] | {"status": "begun"}, loading.load(config.model))
    degrade(config, HERE)
    assert (tmp_path / "degradation.parquet").read_bytes() == first
    again = {path for path, at in written.items() if path.stat().st_mtime_ns != at}
    assert {path.name.split(".")[0] for path in again} == {gone.name.split(".")[0]}


@pytest.mark.parametrize(
    ("options", "parameter", "what"),
    [
        ({"replacement": "gray"}, "replacement", "no replacement 'gray'"),
        ({"steps": 17}, "steps", "have 16 patches of 4×4"),
        ({"methods": ("magic",)}, "methods", "no method 'magic'"),
    ],
)
def test_wrong_options_are_rejected_before_anything_is_written(
    model_spec: str, shards: list[str], tmp_path: Path, options: dict[str, object], parameter: str, what: str
) -> None:
    fit(make_fit_config(model_spec, shards[:3], tmp_path), HERE)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError) as error:
        degrade(degrading(model_spec, shards, tmp_path, **options), HERE)
    assert error.value.parameter == parameter
    assert what in error.value.what
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_bands_are_the_confidence_bands_of_a_mean_of_independent_samples() -> None:
    rng = np.random.default_rng(0)
    curves, mean = rng.normal(size=(40, 5)), MeanCurve(5)
    for part in np.split(curves, [7, 25]):
        mean.add(part, part.mean(1))
    table = mean.table("it").to_pydict()
    error = curves.std(0, ddof=1) / 40**0.5
    np.testing.assert_allclose(table["mean"], curves.mean(0))
    np.testing.assert_allclose(table["low"], curves.mean(0) - 1.959964 * error)
    np.testing.assert_allclose(table["high"], curves.mean(0) + 1.959964 * error)
    single = MeanCurve(5)
    single.add(curves[:1], curves[:1].mean(1))
    assert single.area() == {"area": pytest.approx(curves[0].mean()), "low": None, "high": None}
