"""Exports of a run: each is opened by the package that it is for, if it is installed, and compared with the run."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy import ndimage

from patterns import UserError
from patterns.io import TEMPORARY_PREFIX
from ray_jobs.cli.app import exit_status
from ray_jobs.config import AtlasConfig, ExplainConfig, FitConfig, ModelConfig
from ray_jobs.config.commands import EXPORT_FORMATS
from ray_jobs.data.shard_reader import read_shard
from ray_jobs.jobs.atlas.atlas import atlas
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.views.export import FORMATS, export, write_export
from ray_jobs.views.export.samples import make_stem
from ray_jobs.views.export.sources import open_source
from tests.conftest import jpeg, write_tar
from tests.ray_jobs.runs import PREPROCESSING
from tests.views.exported import NAMES, Folders, name_of, read_photographs, read_relevance, read_rows
from tests.views.reported import HERE, HOSTILE

pytestmark = pytest.mark.full

METHODS = ("gradient", "patternattribution")
VIRELAY = "virelay==0.6.1"


@pytest.fixture(scope="module")
def folders(model_spec: str, shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Explanations and an atlas of two shards with malicious keys, of which some are in both."""
    folder, rng = tmp_path_factory.mktemp("export"), np.random.default_rng(5)
    keys = [f"{k % 20:02d} {HOSTILE[k % 4].replace('/', '')}" for k in range(38)]
    samples: list[dict[str, object]] = [
        {"__key__": key, "jpg": jpeg(rng), "cls": b"%d" % (k % 5)} for k, key in enumerate(keys)
    ]
    samples.insert(3, {"__key__": "broken", "jpg": b"<img src=x>", "cls": b"1"})
    samples.append({"__key__": "unlabelled", "jpg": jpeg(rng)})
    parts = samples[:21], samples[21:]
    mine = [str(write_tar(folder / f"{name}.tar", part)) for name, part in zip("ab", parts)]
    model = ModelConfig(spec=model_spec, **PREPROCESSING)  # type: ignore[arg-type]
    patterns = str(folder / "fit")
    fit(FitConfig(model=model, shards=tuple(shards), out=patterns), HERE)
    common: dict[str, Any] = {"model": model, "patterns": patterns, "shards": tuple(mine), "batch_size": 7}
    explain(ExplainConfig(**common, methods=METHODS, outputs=("npy",), out=str(folder / "explained")), HERE)
    atlas(AtlasConfig(**common, methods=("patternattribution",), pooled=7, out=str(folder / "atlas")), HERE)
    return folder / "explained", folder / "atlas", mine


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("classes") / "classes.json"
    path.write_text(json.dumps(NAMES))
    return str(path)


@pytest.fixture
def write(folders: Folders, classes: str, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that exports the explanations with the clusters of the atlas."""

    def run(to: str, **options: Any) -> Path:
        out = tmp_path / f"my {to}"
        done = write_export(out, str(folders[0]), to, str(folders[1]), classes=classes, **options)
        assert done.samples == 39
        assert [path.name for path in tmp_path.iterdir()] == [out.name]
        return out

    return run


def test_formats_are_the_choices_of_the_option() -> None:
    assert tuple(FORMATS) == EXPORT_FORMATS


def test_page_shows_how_the_command_opens_the_boxes() -> None:
    page = Path(__file__).parents[2] / "docs" / "export.md"
    assert f"Open it: {FORMATS['coco'].hint.format(out='boxes')}\n" in page.read_text()


def test_rows_are_those_of_the_run_and_of_its_atlas(folders: Folders) -> None:
    source, places = open_source(str(folders[0]), str(folders[1]), None)
    assert places is not None
    made = [sample for _, sample in export.read_samples(source, places)]
    expected, relevance, photographs = read_rows(folders), read_relevance(folders), read_photographs(folders)
    assert len(made) == len(expected) == len({sample.stem.lower() for sample in made})
    for number, (sample, row) in enumerate(zip(made, expected)):
        assert (sample.number, sample.shard, sample.row.key) == (number, row["shard"], row["key"])
        for name in ("label", "prediction", "probability", "score"):
            assert getattr(sample.row, name) == row[name]
        assert sample.row.place is not None
        for name in ("cluster", "suspicion", "p", "distance", "loss", "x", "y"):
            assert getattr(sample.row.place, name) == row[name]
        np.testing.assert_allclose(sample.relevance, relevance[number], rtol=1e-3, atol=1e-6)
        np.testing.assert_array_equal(np.asarray(sample.picture), photographs[number])


def test_pooled_maps_of_an_atlas_are_used_without_explanations(folders: Folders) -> None:
    source, places = open_source(str(folders[1]), None, None)
    made = [sample for _, sample in export.read_samples(source, places)]
    for sample, relevance, row in zip(made, read_relevance(folders), read_rows(folders), strict=True):
        assert sample.row.key == row["key"]
        assert sample.relevance.shape == (7, 7)
        # Cells of 16/7 pixels overlap, so that only the inner sums are compared.
        pooled = np.array([[relevance[16 * y // 7 : -(-16 * (y + 1) // 7), 16 * x // 7 : -(-16 * (x + 1) // 7)].mean()
                            for x in range(7)] for y in range(7)])  # fmt: skip
        np.testing.assert_allclose(sample.relevance, pooled, atol=2e-3 * np.abs(pooled).max())


def test_parquet_maps_give_the_same_samples(folders: Folders, model_spec: str, tmp_path: Path) -> None:
    model = ModelConfig(spec=model_spec, **PREPROCESSING)  # type: ignore[arg-type]
    config = ExplainConfig(
        model=model, patterns=str(folders[1].parent / "fit"), shards=tuple(folders[2]), methods=METHODS,
        outputs=("parquet",), target="top-2", out=str(tmp_path / "run"),
    )  # fmt: skip
    explain(config, HERE)
    source, places = open_source(str(tmp_path / "run"), None, "patternattribution")
    assert places is None
    made = [sample for _, sample in export.read_samples(source, places)]
    for sample, relevance, row in zip(made, read_relevance(folders), read_rows(folders), strict=True):
        assert sample.row.explained == row["prediction"]
        np.testing.assert_allclose(sample.relevance, relevance, rtol=1e-2, atol=1e-3 * np.abs(relevance).max())


def test_huggingface_dataset_is_opened_by_its_package(
    write: Callable[..., Path], folders: Folders, tmp_path_factory: pytest.TempPathFactory
) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install datasets")
    out = write("huggingface")
    table = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path_factory.mktemp("cache")))
    expected, photographs = read_rows(folders), read_photographs(folders)
    assert len(table) == len(expected)
    for found, row, photograph in zip(table, expected, photographs):
        np.testing.assert_array_equal(np.asarray(found["image"]), photograph)
        assert found["map"].size == (16, 16)
        assert (found["label"], found["label_number"]) == (name_of(row["label"]), row["label"])
        for name in ("key", "shard", "cluster", "suspicion", "distance", "probability", "score"):
            assert found[name] == row[name]


def test_huggingface_card_has_a_valid_header(write: Callable[..., Path]) -> None:
    yaml = pytest.importorskip("yaml", reason="needs pyyaml: pip install pyyaml")
    out = write("huggingface")
    _, header, text = (out / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(header)
    assert (card["pretty_name"], card["size_categories"]) == (out.name, ["n<1K"])
    assert set(pq.read_schema(out / "train/metadata.parquet").names) == set(re.findall(r"^\| `(\w+)`", text, re.M))


def test_coco_is_opened_by_its_package(write: Callable[..., Path], folders: Folders) -> None:
    package = pytest.importorskip("pycocotools.coco", reason="needs pycocotools: pip install pycocotools")
    coco = package.COCO(str(write("coco") / "annotations.json"))
    rows = read_rows(folders)
    assert sorted(coco.getImgIds()) == list(range(1, 40))
    assert [coco.cats[number]["name"] for number in range(5)] == [name_of(number) for number in range(5)]
    for number, row in enumerate(rows, 1):
        (annotation,) = coco.loadAnns(coco.getAnnIds([number]))
        assert annotation["category_id"] == row["prediction"]
        x, y, width, height = annotation["bbox"]
        mask = coco.annToMask(annotation)
        assert mask.shape == (16, 16)
        assert mask.sum() == width * height == annotation["area"] == mask[int(y) : int(y + height), int(x) :].sum()
    assert len(coco.loadRes([{k: a[k] for k in ("image_id", "category_id", "bbox", "score")}
                             for a in coco.anns.values()]).anns) == 39  # fmt: skip


def test_coco_file_is_complete_without_its_package(write: Callable[..., Path], folders: Folders) -> None:
    out = write("coco", threshold=0.25)
    read = json.loads((out / "annotations.json").read_text())
    assert read["info"]["threshold"] == 0.25
    for image, row, relevance in zip(read["images"], read_rows(folders), read_relevance(folders), strict=True):
        assert Image.open(out / "images" / image["file_name"]).size == (image["width"], image["height"]) == (16, 16)
        assert (image["key"], image["cluster"]) == (row["key"], row["cluster"])
        (annotation,) = [each for each in read["annotations"] if each["image_id"] == image["id"]]
        box, score = expected_box(relevance, 0.25)
        assert annotation["bbox"] == box
        assert annotation["score"] == pytest.approx(score, rel=1e-3)


def expected_box(relevance: np.ndarray, threshold: float) -> tuple[list[float], float]:
    """Return the box of a map that is not pooled, by scipy."""
    positive = np.maximum(relevance, 0)
    labels, count = ndimage.label(positive >= threshold * positive.max())
    sums = ndimage.sum(positive, labels, range(1, count + 1))
    rows, columns = ndimage.find_objects((labels == 1 + np.argmax(sums)).astype(int))[0]
    box = [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start]
    return [float(value) for value in box], sums.max() / positive.sum()


@pytest.fixture(scope="session")
def virelay_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with ViRelAy, which needs an older Pillow than torchvision's newest."""
    environment = tmp_path_factory.mktemp("virelay") / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", VIRELAY], check=True)
    return python


@pytest.mark.slow
def test_virelay_project_is_opened_by_its_package(
    write: Callable[..., Path], folders: Folders, tmp_path_factory: pytest.TempPathFactory, virelay_python: Path
) -> None:
    read = tmp_path_factory.mktemp("read") / "read.npz"
    reader = Path(__file__).with_name("virelay_reader.py")
    subprocess.run([virelay_python, "-I", reader, write("virelay") / "project.yaml", read], check=True)
    found, rows = np.load(read), read_rows(folders)
    text = json.loads(str(found["text"]))
    photographs, relevance = read_photographs(folders), read_relevance(folders)
    assert len(text["samples"]) == len(rows)
    for number, row in enumerate(rows):
        np.testing.assert_array_equal(found[f"data-{number}"], photographs[number])
        assert text["samples"][number] == [name_of(row["label"]) or "none"] * 2
        expected = relevance[number] / np.abs(relevance[number]).max()
        np.testing.assert_allclose(found[f"attribution-{number}"].sum(-1), expected, atol=2e-3)
        assert np.argmax(found[f"prediction-{number}"]) == row["prediction"]
        assert found[f"prediction-{number}"].max() == pytest.approx(row["probability"])
        for color_map in ("black-fire-red", "blue-white-red"):
            assert found[f"heat-{color_map}-{number}"].shape[:2] == (16, 16)
            assert found[f"over-{color_map}-{number}"].shape == (16, 16, 3)
    assert set(text["categories"]) == {name_of(row["class"]) for row in rows}
    seen = 0
    for number, category in enumerate(text["categories"]):
        columns = (found[f"{name}-{number}"] for name in ("attribution_indices", "clustering", "embedding"))
        for index, cluster, point in zip(*columns, strict=True):
            row = rows[index]
            assert name_of(row["class"]) == category
            assert (cluster, *point) == (row["cluster"], np.float32(row["x"]), np.float32(row["y"]))
            seen += 1
    assert seen == len(rows)


def test_virelay_without_an_atlas_has_no_analysis(folders: Folders, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="needs h5py: pip install h5py")
    write_export(tmp_path / "out", str(folders[0]), "virelay", method="gradient")
    assert "analyses" not in (tmp_path / "out/project.yaml").read_text()
    assert not (tmp_path / "out/analysis.h5").exists()
    with h5py.File(tmp_path / "out/attributions.h5") as file:
        for found, scale, expected in zip(file["attribution"], file["scale"], read_relevance(folders, "gradient")):
            np.testing.assert_allclose(found[..., 0] * scale, expected, atol=2e-3 * scale)


def test_fiftyone_files_agree_with_the_run(write: Callable[..., Path], folders: Folders) -> None:
    out = write("fiftyone")
    samples = json.loads((out / "samples.json").read_text())["samples"]
    fields = {field["name"]: field for field in json.loads((out / "metadata.json").read_text())["sample_fields"]}
    assert len({sample["_id"]["$oid"] for sample in samples}) == 39
    rows = zip(samples, read_rows(folders), read_photographs(folders), read_relevance(folders), strict=True)
    for sample, row, photograph, relevance in rows:
        np.testing.assert_array_equal(np.asarray(Image.open(out / sample["filepath"])), photograph)
        assert {name for name in sample if name != "_id"} <= set(fields)
        assert sample["metadata"]["size_bytes"] == (out / sample["filepath"]).stat().st_size
        assert sample["prediction"]["label"] == name_of(row["prediction"])
        assert [sample[name] for name in ("key", "score", "cluster", "suspicion", "distance")] == [
            row[name] for name in ("key", "score", "cluster", "suspicion", "distance")
        ]
        scale = np.quantile(np.abs(relevance), 0.998)
        for field, sign in (("relevance", 1), ("relevance_against", -1)):
            expected = np.clip(sign * relevance / scale, 0, 1) * 255
            found = sample[field] and np.asarray(Image.open(out / sample[field]["map_path"]))
            np.testing.assert_allclose(0 if found is None else found, expected, atol=1)


@pytest.fixture
def fiftyone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """FiftyOne with a database of its own, if both are installed."""
    monkeypatch.setenv("FIFTYONE_DATABASE_DIR", str(tmp_path_factory.mktemp("mongo")))
    monkeypatch.setenv("FIFTYONE_DO_NOT_TRACK", "true")
    package = pytest.importorskip("fiftyone", reason="needs fiftyone: pip install fiftyone", exc_type=ImportError)
    before = set(package.list_datasets())
    yield package
    for name in set(package.list_datasets()) - before:
        package.delete_dataset(name)


@pytest.mark.slow
def test_fiftyone_dataset_is_opened_by_its_package(write: Callable[..., Path], folders: Folders, fiftyone: Any) -> None:
    dataset = fiftyone.Dataset.from_dir(str(write("fiftyone")), fiftyone.types.FiftyOneDataset)
    rows, photographs = read_rows(folders), read_photographs(folders)
    assert len(dataset) == len(rows)
    for sample, row, photograph in zip(dataset, rows, photographs):
        np.testing.assert_array_equal(np.asarray(Image.open(sample.filepath)), photograph)
        assert (sample.label and sample.label.label) == name_of(row["label"])
        assert (sample.prediction.label, sample.key) == (name_of(row["prediction"]), row["key"])
        assert sample.prediction.confidence == row["probability"]
        assert [sample[name] for name in ("score", "cluster", "suspicion", "distance")] == [
            row[name] for name in ("score", "cluster", "suspicion", "distance")
        ]
        assert sample.relevance.get_map().shape == (16, 16)
        assert Path(sample.relevance.map_path).is_absolute()
    expected = sum(row["cluster"] == 0 for row in rows)
    assert len(dataset.match(fiftyone.ViewField("cluster") == 0)) == expected
    labels = {name_of(row["prediction"]) for row in rows}
    assert set(dataset.distinct("prediction.label")) == labels


@pytest.mark.parametrize("to", ["fiftyone", "huggingface", "coco"])
def test_names_of_files_are_safe_and_a_second_export_is_the_same(
    write: Callable[..., Path], to: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = write(to)
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert all(re.fullmatch(r"[A-Za-z0-9._/-]+", name) for name in files)
    out.rename(tmp_path_factory.mktemp("moved") / out.name)
    again = write(to)
    assert {
        path.relative_to(again).as_posix(): path.read_bytes() for path in again.rglob("*") if path.is_file()
    } == files


def test_stems_are_unique_whatever_the_keys() -> None:
    keys = ["a/b", "a_b", "A_B", "../../etc/passwd", "", "é", "x" * 500, "con", ".hidden", "a\nb"]
    stems = [make_stem(number, key) for number, key in enumerate(keys)]
    assert len({stem.lower() for stem in stems}) == len(keys)
    assert all(re.fullmatch(r"\d{5}/\d{8}(-[A-Za-z0-9_-]{1,60})?", stem) for stem in stems)


def test_folder_that_is_not_empty_is_refused(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert write_export(tmp_path / "out", str(folders[0]), "coco").samples == 39
    before = (tmp_path / "out/annotations.json").stat()
    with pytest.raises(UserError) as caught:
        write_export(tmp_path / "out", str(folders[0]), "coco")
    assert caught.value.parameter == "out"
    assert (tmp_path / "out/annotations.json").stat() == before


def test_interrupted_export_leaves_nothing(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_export(tmp_path / "out", str(folders[0]), "coco", report=stop)
    assert list(tmp_path.iterdir()) == []


def test_shard_without_a_sample_is_one_line(folders: Folders, tmp_path: Path, complaint: Callable[..., str]) -> None:
    shard = Path(folders[2][1])
    content = shard.read_bytes()
    try:
        write_tar(shard, [{"__key__": "other", "jpg": jpeg(np.random.default_rng(0))}])
        line = complaint("export", folders[0], "--to", "coco", "--out", tmp_path / "out")
        assert str(shard) in line
        assert not any(path.name.startswith(TEMPORARY_PREFIX) for path in tmp_path.iterdir())
        write_tar(shard, [{"__key__": s.key, "jpg": b"broken"} for s in read_shard(folders[2][1])])
    finally:
        shard.write_bytes(content)


def test_wrong_input_is_one_line(folders: Folders, tmp_path: Path, complaint: Callable[..., str]) -> None:
    explained, described, _ = folders
    (tmp_path / "file").touch()
    empty, out = tmp_path / "none", tmp_path / "out"
    for arguments, word in (
        ([explained, "--to", "excel"], "--to"),
        ([empty, "--to", "coco"], "none"),
        ([explained, "--to", "coco", "--method", "sobel"], "--method"),
        ([explained, "--to", "coco", "--atlas", empty], "none"),
        ([explained, "--to", "coco", "--threshold", "2"], "--threshold"),
        ([described, "--to", "coco", "--method", "gradient"], "--method"),
        ([explained, "--to", "coco", "--classes", tmp_path / "absent"], "absent"),
    ):
        assert word in complaint("export", *arguments, "--out", out)
        assert not out.exists()
    assert "file" in complaint("export", explained, "--to", "coco", "--out", tmp_path / "file")


def test_command_says_how_to_open_the_dataset(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert exit_status(["export", str(folders[1]), "--to", "huggingface", "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert f"export: 39 samples in {out}." in shown.out
    assert "export: 2/2 shards, 39 samples" in shown.err
    assert f"datasets.load_dataset('{out}')" in shown.out
