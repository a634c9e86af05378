"""The atlas job: tables against numpy over all rows, the same bytes for any workers, and rows from stored maps."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F

from benchmarks.atlas import SHAPE, simulate
from patterns import Explainer, UserError, choose
from patterns.io.pattern_files import load
from ray_jobs.cli.app import exit_status
from ray_jobs.config import AtlasConfig, ExplainConfig, ModelConfig, Resources
from ray_jobs.data.shard_reader import ReaderConfig, ShardReader
from ray_jobs.engine.ray_tasks import LocalTasks, RayTasks
from ray_jobs.io.object_store import locate
from ray_jobs.jobs.atlas import reduction
from ray_jobs.jobs.atlas.atlas import atlas
from ray_jobs.jobs.atlas.rows import list_values
from ray_jobs.jobs.atlas.statistics import (
    RunningMoments,
    decode_numbers,
    decode_values,
    encode_ranks,
    merge_top,
)
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.models import loading
from ray_jobs.runs.atlas_files import TABLES
from ray_jobs.views.export.sources import open_source
from tests.conftest import MODEL, MODEL_FILE, jpeg, write_tar
from tests.ray_jobs.runs import kill_first_worker, wait_until

HERE = Resources(workers=0)
ROOT = Path(__file__).parents[2]
METHOD = "patternattribution"


def read_rows(run: Path) -> pa.Table:
    """Return the rows of all shards."""
    files = sorted(path for path in (run / "atlas").rglob("*.parquet") if not path.name.endswith(".refused.parquet"))
    return pa.concat_tables([pq.read_table(file) for file in files])


def values(rows: pa.Table, column: str) -> np.ndarray:
    return list_values(rows, column).astype(np.float64)


@pytest.fixture(scope="module")
def config(model: ModelConfig, fitted: str, shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> AtlasConfig:
    out = str(tmp_path_factory.mktemp("atlas"))
    return AtlasConfig(
        model=model, patterns=fitted, shards=tuple(shards), out=out, batch_size=4, pooled=7, top=3, compile=None
    )


@pytest.fixture(scope="module")
def run(config: AtlasConfig) -> Path:
    """The folder of a finished atlas."""
    return Path(str(atlas(config, HERE).folder))


@pytest.mark.full
def test_rows_are_what_the_library_computes(run: Path, config: AtlasConfig, model: ModelConfig, fitted: str) -> None:
    loaded = loading.load(model)
    network = loaded.network
    names = pq.read_schema(next((run / "atlas").rglob("*[0-9].parquet"))).names
    operators = [name.removeprefix("relevance/") for name in names if name.startswith("relevance/")]
    patterns = choose(network, load(Path(fitted), loaded.digest))
    explainer = Explainer(network, patterns, [METHOD], channels=operators)
    rows = {(row["shard"], row["key"]): row for row in read_rows(run).to_pylist()}
    for shard in config.shards[:2]:
        for batch in ShardReader(shard, ReaderConfig(loaded.preprocessing, 4)):
            found = explainer(batch.images)
            pooled = F.adaptive_avg_pool2d(found.maps[METHOD].sum(1, keepdim=True), 7)[:, 0].flatten(1)
            for k, key in enumerate(batch.keys):
                row = rows.pop((shard, key))
                mass = pooled[k].abs().sum()
                np.testing.assert_allclose(row["map"], pooled[k] / mass, atol=2e-4)
                assert row["map_mass"] == pytest.approx(float(mass), rel=1e-4)
                assert row["class"] == row["prediction"] == int(found.scores[k].argmax())
                assert row["score"] == pytest.approx(float(found.scores[k].max()), rel=1e-5)
                loss = F.cross_entropy(found.scores[k][None], torch.tensor([batch.labels[k]]))
                assert row["loss"] == pytest.approx(float(loss), rel=1e-4)
                assert found.channels is not None
                np.testing.assert_allclose(row["embedding"], found.channels.embedding[k], rtol=2e-3, atol=1e-3)
                for name in operators:
                    relevance = np.array(row[f"relevance/{name}"]) * row[f"mass/{name}"]
                    scale = float(found.channels.relevance[METHOD][name][k].abs().sum())
                    np.testing.assert_allclose(relevance, found.channels.relevance[METHOD][name][k], atol=1e-3 * scale)
                    expected = found.channels.activation[name][k]
                    np.testing.assert_allclose(row[f"activation/{name}"], expected, rtol=2e-3, atol=1e-3)
    assert len(rows) == 72 - 12  # of the other shards


def test_summaries_equal_numpy_over_all_rows(run: Path) -> None:
    rows = read_rows(run)
    classes = rows["class"].to_numpy()
    for row in pq.read_table(run / "classes.parquet").to_pylist():
        inside = classes == row["class"]
        assert row["samples"] == inside.sum()
        for name in ("map", *(c for c in rows.column_names if c.startswith("relevance/"))):
            of_class = values(rows, name)[inside]
            np.testing.assert_allclose(row[f"mean_{name}"], of_class.mean(0), rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(row[f"variance_{name}"], of_class.var(0), rtol=1e-5, atol=1e-9)
        maps = values(rows, "map")[inside]
        distances = np.linalg.norm(maps - maps.mean(0), axis=1).astype(np.float32)
        assert [s["value"] for s in row["typical"]] == pytest.approx(np.sort(distances)[:3], rel=1e-5)
        assert [s["value"] for s in row["untypical"]] == pytest.approx(np.sort(distances)[::-1][:3], rel=1e-5)
    pairs = list(zip(*(rows[name].to_pylist() for name in ("class", "label", "prediction"))))
    confusions = pq.read_table(run / "confusions.parquet").to_pylist()
    assert sum(row["samples"] for row in confusions) == len(rows)
    for row in confusions:
        inside = np.array([pair == (row["class"], row["label"], row["prediction"]) for pair in pairs])
        assert row["samples"] == inside.sum()
        if row["samples"] > 1:
            np.testing.assert_allclose(row["mean_map"], values(rows, "map")[inside].mean(0), rtol=1e-6, atol=1e-9)
        else:
            assert row["mean_map"] is None


def test_top_samples_of_channels_equal_a_full_sort(run: Path, config: AtlasConfig) -> None:
    rows = read_rows(run).to_pylist()
    order = {shard: number for number, shard in enumerate(config.shards)}
    rows.sort(key=lambda row: (order[row["shard"]], row["position"]))
    channels = pq.read_table(run / "channels.parquet").to_pylist()
    assert channels
    for row in channels:
        name, k = row["operator"], row["channel"]
        relevance = [np.float32(r[f"relevance/{name}"][k]) * np.float32(r[f"mass/{name}"]) for r in rows]
        activation = [np.float32(r[f"activation/{name}"][k]) for r in rows]
        for column, found in (("by_relevance", relevance), ("by_activation", activation)):
            best = sorted(range(len(rows)), key=lambda n: (-found[n], n))[:3]
            assert [s["key"] for s in row[column]] == [rows[n]["key"] for n in best]
            assert [s["value"] for s in row[column]] == pytest.approx([float(found[n]) for n in best])
        assert row["mean_relevance"] == pytest.approx(np.mean([r[f"relevance/{name}"][k] for r in rows]), abs=1e-6)


def test_samples_have_a_row_each_and_clusters_add_up(run: Path) -> None:
    samples = pq.read_table(run / "samples.parquet").to_pylist()
    rows = read_rows(run).to_pylist()
    assert {(s["shard"], s["key"]) for s in samples} == {(r["shard"], r["key"]) for r in rows}
    assert sorted(s["number"] for s in samples) == list(range(len(rows)))
    for cluster in pq.read_table(run / "clusters.parquet").to_pylist():
        inside = [s for s in samples if (s["class"], s["cluster"]) == (cluster["class"], cluster["cluster"])]
        assert len(inside) == cluster["samples"]
        assert cluster["mean_score"] == pytest.approx(np.mean([s["score"] for s in inside]))
        labels = [s["label"] for s in inside]
        assert cluster["label_purity"] == pytest.approx(labels.count(cluster["label"]) / len(labels))


@pytest.mark.full
def test_any_number_of_workers_and_kills_give_the_same_bytes(
    local_ray: None, run: Path, config: AtlasConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for workers in (1, 2, 4):
        out = tmp_path / str(workers)
        with monkeypatch.context() as patch:
            worked = kill_first_worker(patch, after=2) if workers == 2 else list(config.shards)
            atlas(replace(config, out=str(out)), Resources(workers=workers, gpus_per_worker=0, cpus_per_worker=0.5))
        assert sorted({*worked}) == sorted(config.shards)
        for name in TABLES:
            assert (out / name).read_bytes() == (run / name).read_bytes(), name


def die_once(function: Callable[..., Any], marks: Path) -> Callable[..., Any]:
    """Return a function whose process is killed at the end of the first call with some arguments."""

    def call(*arguments: object) -> Any:
        result, mark = function(*arguments), marks / f"{function.__name__}-{crc32(repr(arguments).encode())}"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call


@pytest.mark.full
def test_killed_tasks_of_the_reduction_change_no_byte(
    local_ray: None, config: AtlasConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("rows", "marks"):
        (tmp_path / name).mkdir()
    files = simulate(tmp_path / "rows", samples=2000, classes=8)
    monkeypatch.setattr(reduction, "COUNTED_FILES", 1)
    monkeypatch.setattr(reduction, "MIN_GROUP", 1000)
    expected = reduction.reduce_rows(files, SHAPE, config, locate(tmp_path / "undisturbed"), LocalTasks())
    for name in ("count_files", "summarize_group"):
        monkeypatch.setattr(reduction, name, die_once(getattr(reduction, name), tmp_path / "marks"))
    assert reduction.reduce_rows(files, SHAPE, config, locate(tmp_path / "killed"), RayTasks()) == expected
    killed = [mark.name.partition("-")[0] for mark in (tmp_path / "marks").iterdir()]
    assert killed.count("count_files") == len(files)
    assert killed.count("summarize_group") > 1
    for name in TABLES:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name


@pytest.mark.full
def test_a_killed_job_resumes_to_the_same_bytes(run: Path, config: AtlasConfig, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ray_jobs", "atlas", "--patterns", config.patterns, "--out", str(tmp_path)]
    command += list(itertools.chain.from_iterable(("--shards", shard) for shard in config.shards))
    command += ["--batch-size", "4", "--pooled", "7", "--top", "3", "--workers", "0"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
        wait_until(lambda: list(tmp_path.glob("atlas/*[0-9].parquet")) or process.poll() is not None)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "classes.parquet").exists()
    assert exit_status(command[3:]) == 0
    for name in TABLES:
        assert (tmp_path / name).read_bytes() == (run / name).read_bytes(), name


@pytest.mark.full
@pytest.mark.parametrize("output", ["npy", "parquet"])
def test_stored_maps_give_the_same_maps_without_what_needs_a_pass(
    run: Path, config: AtlasConfig, tmp_path: Path, output: str
) -> None:
    explaining = ExplainConfig(
        model=config.model, patterns=config.patterns, shards=config.shards, out=str(tmp_path / "explained"),
        batch_size=4, methods=("gradient", METHOD), outputs=(output,),
    )  # fmt: skip
    explained = str(explain(explaining, HERE).folder)
    stored = Path(str(atlas(replace(config, out=str(tmp_path / "atlas"), explanations=explained), HERE).folder))
    one, other = (
        {(row["shard"], row["key"]): row for row in read_rows(folder).to_pylist()} for folder in (run, stored)
    )
    assert one.keys() == other.keys()
    for key, row in other.items():
        np.testing.assert_allclose(row["map"], one[key]["map"], atol=2e-3)
        assert row["map_mass"] == pytest.approx(one[key]["map_mass"], rel=2e-3)
        assert row["loss"] is None
        assert [row[name] for name in ("label", "class", "score")] == [one[key][n] for n in ("label", "class", "score")]
    assert "embedding" not in other[key]
    assert not (stored / "channels.parquet").exists()
    shard, key = sorted(other)[0]
    (tmp_path / "keys.txt").write_text(f"{shard}\t{key}\n{shard}\tnone\n")
    chosen = replace(config, shards=config.shards[:1], explanations=explained, keys=str(tmp_path / "keys.txt"))
    run = Path(str(atlas(replace(chosen, out=str(tmp_path / "chosen")), replace(HERE, max_bad_fraction=1.0)).folder))
    assert [(row["shard"], row["key"]) for row in read_rows(run).to_pylist()] == [(shard, key)]


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("gradient-x-input", {"spec": "other"}),
        ("gradient-x-input", {"resize": 20}),
        (METHOD, {"preset": "linear"}),
        (METHOD, {"estimator": ("2.conv1=linear",)}),
        (METHOD, {"patterns": "other"}),
    ],
)
def test_stored_maps_of_another_model_or_of_other_patterns_are_rejected(
    run: Path, config: AtlasConfig, tmp_path: Path, method: str, changes: dict[str, Any]
) -> None:
    common: dict[str, Any] = {"patterns": config.patterns, "shards": config.shards[:1], "methods": (method,)}
    changed, model = common | changes, config.model
    if "patterns" in changes:
        changed["patterns"] = str(shutil.copytree(config.patterns, tmp_path / "other"))
    if "resize" in changes:
        model = replace(model, resize=changed.pop("resize"))
    if changed.pop("spec", None):
        (tmp_path / MODEL_FILE).write_text(MODEL.replace("manual_seed(7)", "manual_seed(8)"))
        model = replace(model, spec=f"{tmp_path / MODEL_FILE}:small")
    explaining = ExplainConfig(model=model, **changed, out=str(tmp_path / "explained"), outputs=("npy",))
    explained = str(explain(explaining, HERE).folder)
    config = AtlasConfig(model=config.model, **common, out=str(tmp_path / "atlas"), explanations=explained)
    with pytest.raises(UserError) as caught:
        atlas(config, HERE)
    assert (caught.value.parameter, caught.value.where) == ("explanations", explained)
    with pytest.raises(UserError) as caught:
        open_source(explained, str(run), method)
    assert (caught.value.parameter, caught.value.where) == ("atlas", str(run))
    same = AtlasConfig(model=model, **changed, out=str(tmp_path / "same"), explanations=explained)
    assert atlas(same, HERE).manifest()["atlas"]["samples"] == 6
    open_source(explained, str(tmp_path / "same"), method)


@pytest.mark.parametrize(
    ("changes", "parameter"),
    [
        ({"methods": ("gradient", METHOD)}, "methods"),
        ({"methods": ("patternnet",)}, "methods"),
        ({"methods": ("gradient",)}, "methods"),
        ({"methods": ("smoothgrad",)}, "methods"),
        ({"cluster_operator": "0"}, "cluster_operator"),
        ({"cluster_operator": "0", "explanations": "explained"}, "cluster_operator"),
        ({"target": "top-2"}, "target"),
        ({"operators": ("nothing",)}, "operators"),
        ({"cluster_by": "channels", "cluster_operator": "nothing"}, "cluster_operator"),
    ],
)
def test_options_that_do_not_fit_are_errors(
    config: AtlasConfig, tmp_path: Path, changes: dict[str, Sequence[str]], parameter: str
) -> None:
    with pytest.raises(UserError) as caught:
        atlas(replace(config, out=str(tmp_path), **changes), HERE)  # type: ignore[arg-type]
    assert caught.value.parameter == parameter


@pytest.mark.full
def test_model_with_one_operator_has_no_channels_to_cluster_by(config: AtlasConfig, tmp_path: Path) -> None:
    code = "from torch import nn\ndef one():\n    return nn.Sequential(nn.Flatten(), nn.Linear(768, 5))\n"
    (tmp_path / "one.py").write_text(code)
    model = replace(config.model, spec=f"{tmp_path / 'one.py'}:one")
    one = replace(config, model=model, methods=("gradient-x-input",), out=str(tmp_path / "out"), cluster_by="channels")
    with pytest.raises(UserError) as caught:
        atlas(one, HERE)
    assert caught.value.parameter == "cluster_by"


@pytest.mark.full
def test_samples_without_labels_are_described(config: AtlasConfig, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shard = write_tar(tmp_path / "unlabelled.tar", [{"__key__": f"{k}", "jpg": jpeg(rng)} for k in range(6)])
    out = replace(config, shards=(str(shard),), out=str(tmp_path / "out"), cluster_by="channels")
    run = Path(str(atlas(out, HERE).folder))
    for row in pq.read_table(run / "classes.parquet").to_pylist():
        assert row["labelled"] == row["right"] == 0
        assert row["mean_loss"] is None
    assert all(row["label"] is None for row in pq.read_table(run / "clusters.parquet").to_pylist())


def test_merged_moments_and_top_lists_do_not_depend_on_the_order() -> None:
    rng = np.random.default_rng(0)
    data = rng.normal(5, 1, (1000, 3))
    merged = RunningMoments.zero(3)
    for part in np.array_split(data, 17):
        merged.update(part)
    np.testing.assert_allclose(merged.mean, data.mean(0), rtol=1e-12)
    np.testing.assert_allclose(merged.variance, data.var(0), rtol=1e-12)
    ties, numbers = rng.integers(-4, 5, (1000, 3)).astype(np.float32), rng.permutation(2**20)[:1000]
    ranks, top = encode_ranks(ties, numbers), np.zeros((0, 3), np.int64)
    for part in rng.permutation(1000).reshape(20, -1):
        top = merge_top(top, ranks[part], 25)
    for k in range(3):
        best = np.lexsort((numbers, -ties[:, k]))[:25]
        assert (decode_numbers(top[:, k]) == numbers[best]).all()
        assert (decode_values(top[:, k]) == ties[best, k]).all()
