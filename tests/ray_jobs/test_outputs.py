"""The files of the explain job: the same maps in every format, in the order of the shards."""

import io
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
import zarr
from PIL import Image

from patterns import UserError
from patterns.io.pattern_files import load
from ray_jobs.cli.app import main
from ray_jobs.config import ExplainConfig, FitConfig, ModelConfig, Resources
from ray_jobs.data.samples import zip_explanations
from ray_jobs.data.shard_reader import ReaderConfig, ShardReader, read_shard
from ray_jobs.io.object_store import locate
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.models import loading
from ray_jobs.runs.map_files import ExplainedBatch, ShardFiles, estimate_bytes_per_sample, open_writers
from tests.conftest import jpeg, write_tar
from tests.ray_jobs.runs import PREPROCESSING

HERE = Resources(workers=0)
KINDS = ("npy", "png", "parquet", "zarr")
METHODS = ("gradient", "patternattribution", "random")


@pytest.fixture(scope="module")
def model(model_spec: str) -> ModelConfig:
    return ModelConfig(spec=model_spec, **PREPROCESSING)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def fitted(model: ModelConfig, shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = str(tmp_path_factory.mktemp("fitted") / "run")
    return Path(str(fit(FitConfig(model=model, shards=tuple(shards), out=out), HERE).folder))


def config(fitted: Path, model: ModelConfig, shards: list[str], out: Path, **options: Any) -> ExplainConfig:
    return ExplainConfig(
        model=model, patterns=str(fitted), shards=tuple(shards), out=str(out), methods=METHODS, batch_size=4, **options
    )


def in_tar(folder: Path, name: str) -> dict[str, dict[str, np.ndarray]]:
    return {
        s.key: {m: np.load(io.BytesIO(s.files[f"{m}.npy"])) for m in METHODS}
        for s in read_shard(str(folder / "explanations" / f"{name}.tar"))
    }


def in_table(folder: Path, name: str) -> dict[str, dict[str, np.ndarray]]:
    table = pq.read_table(folder / "explanations" / f"{name}.maps.parquet")
    shapes = {m: json.loads(table.schema.metadata[f"{m}_shape".encode()]) for m in METHODS}
    assert all(pa.types.is_fixed_size_list(table.schema.field(m).type) for m in METHODS)
    return {
        row["key"]: {m: np.array(row[m], np.float16).reshape(shapes[m]) for m in METHODS} for row in table.to_pylist()
    }


def in_zarr(folder: Path, name: str) -> dict[str, dict[str, np.ndarray]]:
    group = zarr.open_group(zarr.storage.ZipStore(folder / "explanations" / f"{name}.zarr.zip", mode="r"), mode="r")
    arrays = {m: group[m][:] for m in METHODS}
    return {key: {m: arrays[m][i] for m in METHODS} for i, key in enumerate(group.attrs["keys"])}


@pytest.mark.full
def test_every_format_holds_the_same_maps(fitted: Path, model: ModelConfig, shards: list[str], tmp_path: Path) -> None:
    explain(config(fitted, model, shards[:3], tmp_path, outputs=KINDS), HERE)
    for shard in shards[:3]:
        name = Path(shard).stem
        keys = [s.key for s in read_shard(shard)]
        expected = in_tar(tmp_path, name)
        for found in (in_table(tmp_path, name), in_zarr(tmp_path, name)):
            assert list(found) == list(expected) == keys
            for key in keys:
                for method in METHODS:
                    assert found[key][method].dtype == np.float16
                    assert np.array_equal(found[key][method], expected[key][method])


@pytest.mark.parametrize("kinds", [("png",), ("npy",), ("parquet",), ("zarr",)])
def test_only_the_chosen_formats_are_written(
    fitted: Path, model: ModelConfig, shards: list[str], tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    explain(config(fitted, model, shards[:1], tmp_path, outputs=kinds), HERE)
    name = Path(shards[0]).stem
    kept = {f"{name}.parquet", f"{name}.refused.parquet"}
    extension = {"parquet": "maps.parquet", "zarr": "zarr.zip"}.get(kinds[0], "tar")
    assert {p.name for p in (tmp_path / "explanations").iterdir()} == {*kept, f"{name}.{extension}"}
    if extension == "tar":
        for sample in read_shard(str(tmp_path / "explanations" / f"{name}.tar")):
            assert set(sample.files) == {"json", *(f"{method}.{kinds[0]}" for method in METHODS)}


@pytest.mark.full
def test_maps_of_another_size_with_fewer_channels(
    fitted: Path, model: ModelConfig, shards: list[str], tmp_path: Path
) -> None:
    whole = explain(config(fitted, model, shards[:1], tmp_path / "whole"), HERE)
    small = explain(config(fitted, model, shards[:1], tmp_path / "small", reduction="sum", size=4), HERE)
    name = Path(shards[0]).stem
    exponents = {
        s.key: json.loads(s.files["json"])["exponents"]
        for s in read_shard(str(small.folder / "explanations" / f"{name}.tar"))
    }
    scaled = {
        s.key: json.loads(s.files["json"])["exponents"]
        for s in read_shard(str(whole.folder / "explanations" / f"{name}.tar"))
    }
    for key, maps in in_tar(tmp_path / "whole", name).items():
        for method in METHODS:
            found = in_tar(tmp_path / "small", name)[key][method].astype(np.float64) * 2.0 ** exponents[key][method]
            assert found.shape == (1, 4, 4)
            true = maps[method].astype(np.float64).sum(0) * 2.0 ** scaled[key][method]
            # Pillow's triangle filter is torch's bilinear one with anti-aliasing.
            expected = np.asarray(Image.fromarray(true.astype(np.float32)).resize((4, 4), Image.Resampling.BILINEAR))
            assert np.abs(found[0] - expected).max() <= 3e-3 * np.abs(true).max()
    # The statistics are those of the original map.
    tables = [pq.read_table(run.folder / "explanations.parquet") for run in (whole, small)]
    assert tables[0].equals(tables[1])


@pytest.mark.full
def test_several_maps_of_a_sample_are_one_array(
    fitted: Path, model: ModelConfig, shards: list[str], tmp_path: Path
) -> None:
    run = explain(config(fitted, model, shards[:1], tmp_path / "top", target="top-2", outputs=KINDS), HERE)
    first = explain(config(fitted, model, shards[:1], tmp_path / "first", target="predicted"), HERE)
    second = explain(config(fitted, model, shards[:1], tmp_path / "second", target="second"), HERE)
    name = Path(shards[0]).stem
    tops, alone = in_tar(tmp_path / "top", name), [in_tar(tmp_path / which, name) for which in ("first", "second")]
    for key, maps in tops.items():
        for method in METHODS:
            assert maps[method].shape == (2, 3, 16, 16)
            for number in range(2):  # float16, each scaled by its own power of two
                assert np.array_equal(maps[method][number], alone[number][key][method])
            assert np.array_equal(in_table(tmp_path / "top", name)[key][method], maps[method])
            assert np.array_equal(in_zarr(tmp_path / "top", name)[key][method], maps[method])
    for row, one, other in zip(
        *(pq.read_table(r.folder / "explanations.parquet").to_pylist() for r in (run, first, second))
    ):
        assert row["target"] == [one["target"], other["target"]]
        assert row["score"] == pytest.approx([one["score"], other["score"]])
        assert row["gradient_entropy"] == one["gradient_entropy"]
    sample = next(read_shard(str(tmp_path / "top" / "explanations" / f"{name}.tar")))
    assert Image.open(io.BytesIO(sample.files["gradient.png"])).size == (32, 16)


@pytest.mark.full
def test_an_inner_neuron_is_explained_with_the_models_own_predictions(
    fitted: Path, model: ModelConfig, shards: list[str], tmp_path: Path
) -> None:
    run = explain(config(fitted, model, shards[:1], tmp_path / "inside", target="2.conv1:3"), HERE)
    other = explain(config(fitted, model, shards[:1], tmp_path / "class", target="predicted"), HERE)
    rows, others = (pq.read_table(r.folder / "explanations.parquet").to_pylist() for r in (run, other))
    loaded = loading.load(model)
    end = loaded.network.until("2.conv1")
    (batch,) = ShardReader(shards[0], ReaderConfig(loaded.preprocessing, 100))
    for row, one, values in zip(rows, others, end.module(batch.images)):
        assert row["target"] == 3
        assert row["score"] == pytest.approx(float(values[3].sum()), rel=1e-4)
        assert (row["prediction"], row["label"]) == (one["prediction"], one["label"])
        assert row["probability"] == pytest.approx(one["probability"], rel=1e-5)


def test_settings_of_methods_are_recorded_and_must_not_change(
    fitted: Path, model: ModelConfig, shards: list[str], tmp_path: Path
) -> None:
    asked = replace(
        config(fitted, model, shards[:1], tmp_path),
        methods=("smoothgrad", "lrp-z"), settings=(("smoothgrad.samples", 2),),
    )  # fmt: skip
    run = explain(asked, HERE)
    section = run.manifest()["explain"]
    assert section["settings"] == {"smoothgrad.samples": 2, "smoothgrad.noise": 0.1, "lrp-z.epsilon": 1e-6}
    with pytest.raises(UserError, match=r"begun with settings"):
        explain(replace(asked, settings=(("smoothgrad.samples", 3),)), HERE)


@pytest.mark.full
@pytest.mark.parametrize("samples_of_shard", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_training_job_reads_each_sample_with_its_maps(
    fitted: Path, model: ModelConfig, tmp_path: Path, samples_of_shard: int
) -> None:
    each = samples_of_shard
    rng = np.random.default_rng(8)
    samples = [
        {"__key__": f"{i:05d}", "jpg": jpeg(rng) if i % 100 else b"broken", "cls": b"1"} for i in range(10 * each)
    ]
    paths = [str(write_tar(tmp_path / f"in-{n}.tar", samples[each * n : each * n + each])) for n in range(10)]
    run = explain(replace(config(fitted, model, paths, tmp_path / "out"), outputs=("npy",), reduction="sum"), HERE)
    met = []
    for path in paths:
        inputs = webdataset.WebDataset(path, shardshuffle=False)
        maps = webdataset.WebDataset(str(run.folder / "explanations" / Path(path).name), shardshuffle=False)
        for sample, explained in zip_explanations(inputs, maps):
            assert sample["__key__"] == explained["__key__"]
            assert np.load(io.BytesIO(explained["gradient.npy"])).shape == (1, 16, 16)
            met.append(sample["__key__"])
    assert met == [s["__key__"] for s in samples if s["jpg"] != b"broken"]
    rejected = pq.read_table(run.folder / "quarantine.parquet")["key"].to_pylist()
    assert rejected == [s["__key__"] for s in samples if s["jpg"] == b"broken"]


def test_threads_that_encode_write_the_bytes_of_one_thread(tmp_path: Path) -> None:
    maps = np.random.default_rng(0).normal(size=(7, 3, 16, 16)).astype(np.float16)
    rows = [{"label": number} for number in range(7)]
    batch = ExplainedBatch(list("abcdefg"), rows, rows, {"gradient": maps}, {"gradient": np.arange(7)})
    files = ShardFiles(locate(tmp_path), "x")
    found = []
    for threads in (1, 3):
        with open_writers(tmp_path, files, ["npy", "png"], threads) as (writer,):
            writer.write(batch)
        found.append((tmp_path / files.tar).read_bytes())
    assert found[0] == found[1]
    assert [sample.key for sample in read_shard(str(tmp_path / files.tar))] == list("abcdefg")


def test_zipping_skips_samples_without_maps() -> None:
    inputs = [{"__key__": key} for key in "abcdef"]
    maps = [{"__key__": key, "x": key} for key in "bce"]
    assert [(a["__key__"], b["x"]) for a, b in zip_explanations(inputs, maps)] == [("b", "b"), ("c", "c"), ("e", "e")]
    assert list(zip_explanations(inputs, [])) == []
    with pytest.raises(UserError, match="no input") as error:
        list(zip_explanations(inputs, [{"__key__": "x"}]))
    assert error.value.where == "x"


def test_the_logged_cost_bounds_the_size_of_the_files(
    fitted: Path, model: ModelConfig, shards: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    explain(config(fitted, model, shards[:1], tmp_path, outputs=KINDS), HERE)
    log = capsys.readouterr().err
    assert "a sample takes at most 21.75 KiB (npy 7.50 KiB, png 5.25 KiB, parquet 4.50 KiB" in log
    assert "are free at" in log
    bounds = estimate_bytes_per_sample(dict.fromkeys(METHODS, (3, 16, 16)), KINDS)
    name, samples = Path(shards[0]).stem, 6
    folder = tmp_path / "explanations"
    for kind, file in {"parquet": f"{name}.maps.parquet", "zarr": f"{name}.zarr.zip"}.items():
        assert (folder / file).stat().st_size <= 2 * samples * bounds[kind] + 16384
    assert (folder / f"{name}.tar").stat().st_size <= samples * (bounds["npy"] + bounds["png"] + 2048) + 10240


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--output", "gif"], "--output: no output 'gif'. Choose from npy, png, parquet, zarr."),
        (["--log", "yaml"], "--log: no log 'yaml'. Choose from plain, json."),
        (["--output", ","], "--output: no output ''"),
        (["--reduce-channels", "mean"], "--reduce-channels: no reduction 'mean'. Choose from none, sum"),
        (["--set", "gradient"], "Invalid value for '--set': 'gradient' is not a setting"),
        (["--set", "lrp-z.epsilon=0"], "--set: no setting 'lrp-z.epsilon' of these methods."),
        (["--methods", "lrp-x"], "--methods: no method 'lrp-x'"),
        (["--methods", "patternnet:lineal"], "--estimators: no estimator 'lineal'"),
        (["--target", "99"], "--target 99: no class 99."),
        (["--classes", "none.txt", "--target", "cat"], "--classes none.txt: cannot be read"),
    ],
)
def test_wrong_options_print_one_line_and_write_nothing(
    fitted: Path, shards: list[str], tmp_path: Path, options: list[str], line: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = ["explain", "--patterns", str(fitted), "--shards", shards[0], "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["patternnet", *arguments, "--workers", "0", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"patternnet: {line}"), printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_boxes_of_samples_give_the_pointing_game(fitted: Path, model: ModelConfig, tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    boxes = {"all": [[0, 0, 16, 16]], "none": [], "outside": [[-9, -9, -1, -1]]}
    samples = [{"__key__": k, "jpg": jpeg(rng), "json": json.dumps({"boxes": b}).encode()} for k, b in boxes.items()]
    samples.append({"__key__": "unboxed", "jpg": jpeg(rng)})
    shard = str(write_tar(tmp_path / "boxed.tar", samples))
    run = explain(config(fitted, model, [shard], tmp_path / "out"), HERE)
    rows = {row["key"]: row for row in pq.read_table(run.folder / "explanations.parquet").to_pylist()}
    hits = {key: row["patternattribution_hit"] for key, row in rows.items()}
    assert hits == {"all": True, "none": False, "outside": False, "unboxed": None}
    assert rows["all"]["gradient_inside"] == pytest.approx(1)
    assert rows["outside"]["gradient_inside"] == 0


def test_patterns_of_the_named_estimator_are_used(
    fitted: Path, model: ModelConfig, shards: list[str], tmp_path: Path
) -> None:
    methods = ("patternnet:linear", "patternnet:multivariate", "patternnet")
    run = explain(replace(config(fitted, model, shards[:1], tmp_path), methods=methods, estimator=("linear",)), HERE)
    for sample in read_shard(str(run.folder / "explanations" / Path(shards[0]).with_suffix(".tar").name)):
        one, other, default = (sample.files[f"{method}.npy"] for method in methods)
        assert one == default
        assert one != other
    assert {"linear", "multivariate"} <= load(fitted, None)["0"].keys()
    assert torch.isfinite(load(fitted, None)["0"]["multivariate"]).all()


@pytest.mark.full
def test_half_precision_gives_similar_maps(fitted: Path, model: ModelConfig, shards: list[str], tmp_path: Path) -> None:
    methods = ("gradient", "patternattribution", "lrp-epsilon-plus-flat")
    asked = replace(config(fitted, model, shards[:1], tmp_path / "float32"), methods=methods, target="1")
    wide = explain(asked, HERE)
    half = replace(model, precision="bfloat16")
    narrow = explain(replace(asked, model=half, out=str(tmp_path / "bfloat16")), HERE)
    name = Path(shards[0]).with_suffix(".tar").name
    one, other = (read_shard(str(run.folder / "explanations" / name)) for run in (wide, narrow))
    for a, b in zip(one, other):
        for method in methods:
            x, y = (np.load(io.BytesIO(s.files[f"{method}.npy"])).astype(np.float64).ravel() for s in (a, b))
            assert x @ y / np.sqrt((x @ x) * (y @ y)) > 0.97
            assert not np.array_equal(x, y)


PEAKS = """
import json, resource, sys
from ray_jobs.jobs.explain import explain as job
from ray_jobs.config import ExplainConfig, ModelConfig, Resources
from ray_jobs.engine.shard_job import ShardJob

peaks, counts = [], ShardJob.on_committed

def note(self, items, result):
    counts(self, items, result)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

ShardJob.on_committed = note
model, shard, out, fitted, times = json.loads(sys.argv[1])
model = ModelConfig(**model)
shards = tuple(f"{shard}-{n:03d}.tar" for n in range(times))
methods = ("patternattribution", "guided-backprop", "lrp-epsilon-plus-flat", "integrated-gradients", "random")
steps = (("integrated-gradients.steps", 2),)
config = ExplainConfig(
    model=model, patterns=fitted, shards=shards, out=out, batch_size=50, methods=methods, settings=steps,
    outputs=("npy",),
)
job.explain(config, Resources(workers=0, log="json"))
print(json.dumps(peaks))
"""


@pytest.mark.full
@pytest.mark.parametrize("shards_of_500", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_number_of_images(
    fitted: Path, model: ModelConfig, tmp_path: Path, shards_of_500: int
) -> None:
    rng = np.random.default_rng(5)
    first = write_tar(tmp_path / "in-000.tar", [{"__key__": f"{i:04d}", "jpg": jpeg(rng)} for i in range(500)])
    for number in range(1, shards_of_500):
        (tmp_path / f"in-{number:03d}.tar").hardlink_to(first)
    arguments = json.dumps([asdict(model), str(tmp_path / "in"), str(tmp_path / "out"), str(fitted), shards_of_500])
    done = subprocess.run([sys.executable, "-c", PEAKS, arguments], capture_output=True, text=True, check=True)
    peaks = json.loads(done.stdout.splitlines()[-1])
    assert len(peaks) >= shards_of_500
    # KiB, of a process of about 700 MiB. The long test shows leaks of 1 KiB per image, the short test of 80 KiB.
    assert peaks[-1] - peaks[len(peaks) // 5] < 40_000
