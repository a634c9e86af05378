"""`patternnet grid` and `show`: the right photographs with the right maps from every format."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from patterns import UserError
from ray_jobs.cli.app import exit_status
from ray_jobs.config import ExplainConfig, ModelConfig, Preprocessing, Resources
from ray_jobs.data.image_decoding import decode_upright, resize_and_crop
from ray_jobs.data.shard_reader import read_shard
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.runs.run_folder import Run
from ray_jobs.views.gallery import Gallery, open_gallery
from tests.conftest import jpeg, write_tar

HERE = Resources(workers=0)
METHODS = ("gradient", "patternattribution")
NAMES = {0: "ant", 1: "bee"}


def explained(fitted: str, model: ModelConfig, shards: list[str], out: Path, **options: Any) -> Run:
    return explain(
        ExplainConfig(model=model, patterns=fitted, shards=tuple(shards), out=str(out), methods=METHODS, **options),
        HERE,
    )


@pytest.fixture(scope="module")
def run(fitted: str, model: ModelConfig, shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return explained(fitted, model, shards[:3], tmp_path_factory.mktemp("explained") / "run")


def same(one: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(one.convert("RGB")), np.asarray(other.convert("RGB")))


@pytest.mark.full
@pytest.mark.parametrize("outputs", [("npy",), ("parquet",)])
def test_pictures_from_every_format_equal_those_of_the_job(
    run: Run, fitted: str, model: ModelConfig, shards: list[str], tmp_path: Path, outputs: tuple[str, ...]
) -> None:
    other = explained(fitted, model, shards[:3], tmp_path, outputs=outputs)
    rows = Gallery(run, {}).rows()[::5]
    for one, two in zip(Gallery(run, {}).pictures(rows), Gallery(other, {}).pictures(rows)):
        assert one.caption == two.caption
        assert same(one.photograph, two.photograph)
        for method in METHODS:
            assert same(one.maps[method], two.maps[method])


@pytest.mark.full
def test_photographs_are_the_models_inputs(run: Run, shards: list[str]) -> None:
    preprocessing = Preprocessing(image_size=16, resize=16, interpolation="bilinear", mean=(0.5,) * 3, std=(0.25,) * 3)
    found = Gallery(run, {})
    rows = found.rows()
    assert len(rows) == 18
    images = {s.key: s.files["jpg"] for shard in shards[:3] for s in read_shard(shard)}
    for row, shown in zip(rows[::-1], found.pictures(rows[::-1])):  # in the requested order
        assert same(
            shown.photograph, to_pil_image(resize_and_crop(decode_upright(images[row["key"]], "RGB"), preprocessing))
        )


def test_worst_samples_are_wrong_with_the_highest_probability(run: Run) -> None:
    found = Gallery(run, {})
    worst = found.worst(5)
    assert 0 < len(worst) <= 5
    assert all(row["label"] != row["prediction"] for row in worst)
    probabilities = [row["probability"] for row in worst]
    assert probabilities == sorted(probabilities, reverse=True)
    others = [r for r in found.rows() if r["label"] != r["prediction"] and r not in worst]
    assert max((r["probability"] for r in others), default=0) <= probabilities[-1]


def test_random_samples_depend_on_the_seed_only(run: Run) -> None:
    found = Gallery(run, {})
    assert found.draw(4, 1) == found.draw(4, 1) != found.draw(4, 2)
    assert len(found.draw(1000, 1)) == 18


def test_captions_use_known_class_names(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "classes.json"
    file.write_text('["ant", "bee"]')
    for row in (found := open_gallery(str(run.folder), str(file))).rows():
        label, prediction = (NAMES.get(row[c], str(row[c])) for c in ("label", "prediction"))
        assert found.caption(row) == f"{label} → {prediction} {row['probability']:.0%}"


@pytest.mark.full
def test_commands_draw_and_print_the_path(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, *_, last = pq.read_table(run.folder / "explanations.parquet")["key"].to_pylist()
    folder = str(run.folder)
    assert exit_status(["grid", folder, "--keys", f"{last},{first}"]) == 0
    assert f"grid: 2 samples in {folder}/grid.png" in capsys.readouterr().out
    assert Image.open(run.folder / "grid.png").width > 300
    for choice in (["--worst", "3"], ["--random", "3"]):
        assert exit_status(["grid", folder, *choice, "--out", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").stat().st_size > 1000
    assert exit_status(["show", folder, first, "--out", str(tmp_path / "one.pdf")]) == 0
    said = capsys.readouterr().out
    assert "patternattribution_entropy" in said
    assert (tmp_path / "one.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.full
def test_missing_explanations_are_an_error(
    run: Run, fitted: str, model: ModelConfig, shards: list[str], tmp_path: Path, complaint: Any
) -> None:
    folder = str(run.folder)
    for options in ((), ("--keys", "a", "--worst", 1)):
        line = complaint("grid", folder, *options)
        assert all(option in line for option in ("--keys", "--worst", "--random"))
    line = complaint("show", folder, "nobody")
    assert line.startswith("patternnet: nobody: ")
    assert "explained" in line
    assert "holds no finished explain" in complaint("grid", fitted, "--worst", 1)
    only_zarr = explained(fitted, model, shards[:1], tmp_path / "zarr", outputs=("zarr",))
    assert "holds explanations as zarr only" in complaint("grid", str(only_zarr.folder), "--random", 1)
    rng = np.random.default_rng(0)
    shard = write_tar(tmp_path / "x.tar", [{"__key__": "a", "jpg": jpeg(rng)}])
    unlabelled = explained(fitted, model, [str(shard)], tmp_path / "unlabelled")
    assert "--worst: no sample has a label" in complaint("grid", str(unlabelled.folder), "--worst", 1)
    write_tar(shard, [{"__key__": "b", "jpg": jpeg(rng)}])
    with pytest.raises(UserError, match="'a'") as caught:
        Gallery(unlabelled, {}).pictures(Gallery(unlabelled, {}).rows())
    assert caught.value.where == str(shard)
