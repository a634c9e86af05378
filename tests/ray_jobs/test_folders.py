"""Folders of images: stable shards, and classes as torchvision numbers them."""

import os
from pathlib import Path
from urllib.parse import unquote

import fsspec
import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from patterns import UserError
from ray_jobs.config import Preprocessing
from ray_jobs.data import image_folders, samples
from ray_jobs.data.shard_reader import ReaderConfig, ShardReader, read_shard
from ray_jobs.data.shard_specs import list_shards
from tests.conftest import jpeg

SMALL = Preprocessing(image_size=16, resize=16, interpolation="bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@pytest.fixture(autouse=True)
def few_images_per_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_folders, "IMAGES_PER_SHARD", 4)


def filled(folder: Path, names: list[str]) -> Path:
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(rng))
    return folder


def class_folders(folder: Path) -> Path:
    return filled(folder, [f"{c}/{c}_{n}.JPEG" for c in ("n02", "n01", "n10") for n in range(5)])


def flat_folder(folder: Path) -> Path:
    return filled(folder, [f"val_{n:04}.JPEG" for n in range(10)])


def read_labels(folder: Path) -> dict[str, int | None]:
    """Return the label of each image by its key."""
    found = [s for shard in list_shards([str(folder)]) for s in read_shard(shard)]
    assert len(found) == len({s.key for s in found})
    return {s.key: int(s.files["cls"]) if "cls" in s.files else None for s in found}


def test_class_folders_have_the_samples_of_torchvision(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "train")
    (folder / "n01" / "notes.txt").write_text("no image")
    (folder / "n01" / ".hidden.jpg").write_bytes(b"no image")
    expected = {}
    for path, label in ImageFolder(str(folder)).samples:
        if "hidden" not in path:
            expected[f"{Path(path).parent.name}/{Path(path).stem}"] = (Path(path).read_bytes(), str(label).encode())
    found = [s for shard in list_shards([str(folder)]) for s in read_shard(shard)]
    assert {s.key: (s.files["jpeg"], s.files["cls"]) for s in found} == expected


def test_class_folders_that_are_numbers_are_these_classes(tmp_path: Path) -> None:
    folder = filled(tmp_path, ["3/a.jpg", "10/b.jpg", "007/c.jpg"])
    assert read_labels(folder) == {"3/a": 3, "10/b": 10, "007/c": 7}


def test_empty_class_folder_keeps_its_number(tmp_path: Path) -> None:
    folder = filled(tmp_path, ["a/a.jpg", "c/c.jpg"])
    (folder / "b").mkdir()
    assert read_labels(folder) == {"a/a": 0, "c/c": 2}


def test_shards_are_bounded_and_stable_and_mix_classes(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "train")
    shards = list_shards([f"{folder}/"])
    assert shards == list_shards([str(folder)]) == list_shards([f"file://{folder}"]) == list_shards([f"{tmp_path}/tr*"])
    assert len(shards) == 4
    for shard in shards:
        classes = [s.files["cls"] for s in read_shard(shard)]
        assert len(classes) <= 4
        assert set(classes) == {b"0", b"1", b"2"}


def test_changed_folder_has_different_shards_and_its_old_shards_are_an_error(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "train")
    before = list_shards([str(folder)])
    added = filled(folder, ["n01/new.jpg"]) / "n01" / "new.jpg"
    assert not set(before) & set(list_shards([str(folder)]))
    with pytest.raises(UserError, match="have changed") as caught:
        list(read_shard(before[0]))
    assert caught.value.where == before[0]
    added.unlink()
    assert len(list(read_shard(before[0]))) == 4


LABEL_FILES = {
    "one per line": ("labels.txt", "\n".join(str(n * 3) for n in range(10))),
    "Caffe's": ("../val.txt", "\n".join(f"val_{n:04}.JPEG {n * 3}" for n in reversed(range(10)))),
    "without extensions": ("labels.csv", "\n".join(f"val_{n:04},{n * 3}" for n in range(10))),
    "with a heading": ("../val.csv", "image,label\n" + "\n".join(f"val_{n:04}.JPEG,{n * 3}" for n in range(10))),
    "with more images": ("labels.txt", "\n".join(f"val_{n:04}.JPEG\t{n * 3}" for n in range(50))),
}


@pytest.mark.parametrize(("name", "text"), LABEL_FILES.values(), ids=LABEL_FILES)
def test_flat_folder_has_the_labels_of_its_file(tmp_path: Path, name: str, text: str) -> None:
    folder = flat_folder(tmp_path / "val")
    (folder / name).write_text(text)
    assert read_labels(folder) == {f"val_{n:04}": n * 3 for n in range(10)}


def test_class_names_in_a_label_file_are_numbered_in_their_order(tmp_path: Path) -> None:
    folder = flat_folder(tmp_path / "val")
    boxes = "".join(
        f"val_{n:04},{'n09' if n % 2 else 'n03'} 85 1 499 272 {'n09' if n % 2 else 'n03'} 1 1 2 2\n" for n in range(10)
    )
    (folder / "labels.csv").write_text(f"ImageId,PredictionString\n{boxes}")
    assert read_labels(folder) == {f"val_{n:04}": n % 2 for n in range(10)}


def test_image_that_the_label_file_omits_has_no_label(tmp_path: Path) -> None:
    folder = flat_folder(tmp_path / "val")
    (folder / "labels.txt").write_text("val_0003.JPEG 5\n")
    assert read_labels(folder) == {f"val_{n:04}": 5 if n == 3 else None for n in range(10)}


def test_flat_folder_without_label_file_has_no_labels(tmp_path: Path) -> None:
    assert set(read_labels(flat_folder(tmp_path / "val")).values()) == {None}


@pytest.mark.parametrize(("text", "reason"), [("1\n2\n", "2 labels for 10 images"), ("val_0001.JPEG 5\nx\n", "'x'")])
def test_labels_that_do_not_match_are_an_error_before_the_run(tmp_path: Path, text: str, reason: str) -> None:
    folder = flat_folder(tmp_path / "val")
    (folder / "labels.txt").write_text(text)
    with pytest.raises(UserError, match=reason):
        list_shards([str(folder)])


def test_changed_labels_give_different_shards(tmp_path: Path) -> None:
    folder = flat_folder(tmp_path / "val")
    before = list_shards([str(folder)])
    (folder / "labels.txt").write_text("\n".join("0123456789"))
    assert not set(before) & set(list_shards([str(folder)]))


def test_folder_of_an_object_store_equals_the_folder_on_disk(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "train")
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/bucket/train", recursive=True)
    read = [
        [s for shard in list_shards([spec]) for s in read_shard(shard)]
        for spec in (str(folder), "memory://bucket/train/")
    ]
    assert read[0] == read[1]


def test_bad_files_of_a_folder_are_rejected_and_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_folders, "MAX_SAMPLE_BYTES", 5000)
    folder = filled(tmp_path, ["a/good.jpg", "a/huge.jpg", "a/l\nine.jpg", "a/moving.gif"])
    (folder / "a" / "huge.jpg").write_bytes(bytes(6000))
    (folder / "a" / "nowhere.jpg").symlink_to(tmp_path / "none.jpg")
    os.mkfifo(folder / "a" / "pipe.jpg")
    found = {s.key: s.rejection or "" for shard in list_shards([str(folder)]) for s in read_shard(shard)}
    assert found["a/good"] == found["a/l%0Aine"] == ""
    assert "more than 5000 bytes" in found["a/huge"]
    assert "GIF" in found["a/moving"]
    assert "without a target" in found["a/nowhere"]
    assert "regular file" in found["a/pipe"]
    assert samples.MAX_SAMPLE_BYTES > 1 << 26


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "train")
    shards = list_shards([str(folder)])
    list(read_shard(shards[0]))
    (folder / "n01" / "n01_0.JPEG").unlink()
    with pytest.raises(UserError, match=r"n01_0\.JPEG") as caught:
        list(read_shard(shards[0]))
    assert caught.value.where == shards[0]


def test_class_folders_may_be_links_and_cycles_are_not_followed(tmp_path: Path) -> None:
    elsewhere = filled(tmp_path / "elsewhere", ["x.jpg"])
    folder = filled(tmp_path / "train", ["a/a.jpg"])
    (folder / "b").symlink_to(elsewhere)
    (folder / "a" / "around").symlink_to(folder)
    assert read_labels(folder) == {"a/a": 0, "b/x": 1}


SIMILAR_NAMES = [
    "cat/1.jpg",
    "cat/1.png",
    "cat/1.jpg.jpg",
    "cat/a.b.jpg",
    "cat/a_b.jpg",
    "cat/sub/x.jpg",
    "cat/sub-x.jpg",
]


def test_images_with_similar_names_have_different_keys(tmp_path: Path) -> None:
    folder = filled(tmp_path, [*SIMILAR_NAMES, "cat/2.jpg"])
    keys = list(read_labels(folder))
    assert len(keys) == len(ImageFolder(str(folder)).samples) == 8
    names = {unquote(key) for key in keys}
    assert names == {"cat/1.jpg", "cat/1.png", "cat/1.jpg.jpg", "cat/2", *(n[:-4] for n in SIMILAR_NAMES[3:])}


def test_every_image_of_torchvisions_formats_is_used_and_others_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "dog").mkdir()
    for name in ("1.bmp", "2.tif", "3.ppm", "4.pgm", "5.png", "6.webp", "7.tiff"):
        Image.new("RGB" if name != "4.pgm" else "L", (20, 20), 99).save(tmp_path / "dog" / name)
    Image.new("RGB", (20, 20)).save(tmp_path / "dog" / "8.gif")
    readers = [ShardReader(shard, ReaderConfig(SMALL, 10)) for shard in list_shards([str(tmp_path)])]
    used = [key for reader in readers for batch in reader for key in batch.keys]
    assert len(used) == len(ImageFolder(str(tmp_path)).samples) == 7
    assert [r.key for reader in readers for r in reader.rejected] == ["dog/8"]


def test_folder_without_images_is_an_error_that_names_the_shards_pattern(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no images") as caught:
        list_shards([str(tmp_path)])
    assert "FOLDER/*.tar" in caught.value.remedy
