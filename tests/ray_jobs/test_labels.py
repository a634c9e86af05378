"""Files of labels: common forms are read as another reader would, and ambiguous files are an error."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patterns import UserError
from ray_jobs.data.labels import number_classes, parse_labels
from ray_jobs.data.samples import ShardError
from ray_jobs.data.shard_reader import read_shard
from ray_jobs.data.shard_specs import list_shards
from tests.conftest import jpeg

IMAGES = [f"val_{n}.JPEG" for n in range(6)]
LABELS = [3, 0, 7, 3, 0, 7]
WNIDS = ["n03", "n01", "n07", "n03", "n01", "n07"]
PAIRS = list(zip(IMAGES, LABELS))


def lines(form: str, labels: list[object] = LABELS) -> str:  # type: ignore[assignment]
    return "".join(form.format(i=image, s=image[:-5], n=label) + "\n" for image, label in zip(IMAGES, labels))


FORMS = {
    "spaces": lines("{i} {n}"),
    "several spaces": lines("{i}    {n}"),
    "tabs": lines("{i}\t{n}"),
    "commas": lines("{i},{n}"),
    "semicolons": lines("{i};{n}"),
    "bars": lines("{i}|{n}"),
    "quotes": lines('"{i}","{n}"'),
    "CRLF": lines("{i} {n}").replace("\n", "\r\n"),
    "empty lines and comments": "# of the devkit\n\n" + lines("{i} {n}\n"),
    "no end of line": lines("{i} {n}").rstrip(),
    "without extensions": lines("{s} {n}"),
    "./": lines("./{i} {n}"),
    "the folder's name": lines("val/{i} {n}"),
    "an absolute path": lines("/data/val/{i} {n}"),
    "backslashes": lines("C:\\data\\val\\{i},{n}"),
    "other letter case": lines("{i} {n}").lower(),
    "another folder's images too": lines("train/{i} 5") + lines("val/{i} {n}"),
    "other images": lines("{i} {n}") + "other.JPEG 99\n",
    "a heading": "image,label\n" + lines("{i},{n}"),
    "an unknown heading": "fname,breed\n" + lines("{i},{n}"),
    "label first": "label,image\n" + lines("{n},{i}"),
    "label first without a heading": lines("{n} {i}"),
    "a column between": "image,split,label\n" + lines("{i},val,{n}"),
    "index, image, class": "id,file,class\n" + "".join(f"{i},{f},{n}\n" for i, (f, n) in enumerate(PAIRS)),
    "integral floats": lines("{i},{n}.0"),
    "one a line": lines("{n}"),
    "one a line with a heading": "label\n" + lines("{n}"),
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_every_common_form_is_read(text: str, encoding: str) -> None:
    assert parse_labels(text.encode(encoding), IMAGES, "val") == LABELS


NAMED = {
    "Tiny ImageNet's": lines("{i}\t{n}\t0\t32\t44\t62", WNIDS),
    "ImageNet's LOC_val_solution.csv": "ImageId,PredictionString\n" + lines("{s},{n} 85 1 499 272 {n} 1 1 2 2", WNIDS),
    "names": lines("{i} {n}", WNIDS),
    "names one a line": lines("{n}", WNIDS),
    "names of two words": lines("{i},tiger {n}", WNIDS),
}


@pytest.mark.parametrize("text", NAMED.values(), ids=NAMED)
def test_class_names_are_numbered_in_their_order(text: str) -> None:
    assert parse_labels(text.encode(), IMAGES, "val") == [1, 0, 2, 1, 0, 2]


def test_names_are_numbered_over_all_lines_even_if_images_are_missing() -> None:
    assert parse_labels(lines("{i} {n}", WNIDS).encode(), IMAGES[2:4], "val") == [2, 1]


def test_empty_label_and_minus_one_are_no_labels() -> None:
    assert parse_labels(lines("{i},{n}", ["", 0, -1, 3, 0, ""]).encode(), IMAGES, "val") == [None, 0, None, 3, 0, None]


AMBIGUOUS = {
    "another separator": (lines("{i}:{n}"), "is not recognized"),
    "names of images only": (lines("{i}"), "is not recognized"),
    "stems only": (lines("{s}"), "is not recognized"),
    "other images": ("".join(f"test_{n}.JPEG {n}\n" for n in range(6)), "no line names an image"),
    "as many lines, each different": ("".join(f"photo-{n}\n" for n in range(6)), "no line names an image"),
    "captions": (
        "image,caption\n" + "".join(f"{i},a photo of {n}\n" for n, i in enumerate(IMAGES)),
        "every image has a different label",
    ),
    "line numbers": ("".join(f"{n} {i}\n" for n, i in enumerate(IMAGES)), "every image has a different label"),
    "two columns that may be labels": (lines("{i},{n},{n}"), "2 columns may hold the labels"),
    "two labels for an image": (lines("{i} {n}") + lines("{i} 5"), "two labels for val_0.JPEG"),
    "too few lines": ("1\n2\n", "2 labels for 6 images"),
    "a line without a label": (lines("{i} {n}") + "val_0.JPEG\n", "a line has no label"),
    "negative": (lines("{i} -{n}"), "-3 is not a class number"),
    "too large": (lines("{i} {n}00000000000"), "300000000000 is not a class number"),
    "empty": ("\n", "is empty"),
}


@pytest.mark.parametrize(("text", "reason"), AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_ambiguous_file_is_an_error(text: str, reason: str) -> None:
    with pytest.raises(ShardError, match=reason):
        parse_labels(text.encode(), IMAGES, "val")


def test_name_of_two_images_is_an_error() -> None:
    with pytest.raises(ShardError, match="several images"):
        parse_labels(b"1.jpg 5\n", ["a/1.jpg", "b/1.jpg"], "val")
    assert parse_labels(b"a/1.jpg 5\nb/1.jpg 6\n", ["a/1.jpg", "b/1.jpg"], "val") == [5, 6]


def test_image_names_that_are_numbers_are_not_taken_for_labels() -> None:
    images = [f"{n}.jpg" for n in range(5)]
    assert parse_labels(b"4\n3\n3\n1\n0\n", images, "val") == [4, 3, 3, 1, 0]
    assert parse_labels(b"label,image\n" + b"".join(b"%d,%d.jpg\n" % (n % 2, n) for n in range(5)), images, "") == [
        *(0, 1, 0, 1, 0)
    ]


def test_heading_may_be_the_name_of_an_image() -> None:
    assert parse_labels(b"image,split,label\nIMAGE.jpg,val,7\n", ["IMAGE.jpg"], "val") == [7]


@pytest.mark.full
@given(
    st.lists(st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=8), min_size=1, unique=True),
    st.data(),
)
def test_table_of_pythons_csv_is_read_as_written(stems: list[str], data: st.DataObject) -> None:
    images = sorted(f"{stem.replace('/', '_')}.jpg" for stem in stems)
    if len({image.casefold() for image in images}) < len(images):
        return
    labels = data.draw(st.lists(st.integers(0, 1000), min_size=len(images), max_size=len(images)))
    text = io.StringIO()
    csv.writer(text, delimiter=data.draw(st.sampled_from(",;\t"))).writerows(
        [("image", "split", "label"), *((image, "val", label) for image, label in zip(images, labels))]
    )
    assert parse_labels(text.getvalue().encode(), images, "val") == labels


def test_class_numbers_are_kept_only_if_they_are_different() -> None:
    assert number_classes(["10", "2", "007"]) == {"2": 2, "007": 7, "10": 10}
    assert number_classes(["7", "007", "1"]) == {"007": 0, "1": 1, "7": 2}
    assert number_classes(["99999999999", "5"]) == {"5": 0, "99999999999": 1}
    assert number_classes(["²", "٣"]) == {"²": 0, "٣": 1}


def filled(folder: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(np.random.default_rng(number)))
    return folder


def read_labels(folder: Path) -> dict[str, int | None]:
    found = [s for shard in list_shards([str(folder)]) for s in read_shard(shard)]
    return {s.key: int(s.files["cls"]) if "cls" in s.files else None for s in found}


@pytest.mark.parametrize("given", ["val", "val/images"])
def test_tiny_imagenets_validation_folder_is_read(tmp_path: Path, given: str) -> None:
    filled(tmp_path / "val" / "images", IMAGES)
    (tmp_path / "val" / "val_annotations.txt").write_text(NAMED["Tiny ImageNet's"])
    assert list(read_labels(tmp_path / given).values()) == [1, 0, 2, 1, 0, 2]


def test_list_next_to_class_folders_does_not_replace_their_classes(tmp_path: Path) -> None:
    filled(tmp_path / "images", ["a/1.jpg", "b/2.jpg", "b/3.jpg"])
    (tmp_path / "images.txt").write_text("1 a/1.jpg\n2 b/2.jpg\n3 b/3.jpg\n")  # as in CUB-200-2011: numbers of images
    assert read_labels(tmp_path / "images") == {"a/1": 0, "b/2": 1, "b/3": 1}


def test_ambiguous_file_of_labels_is_named(tmp_path: Path) -> None:
    folder = filled(tmp_path / "val", IMAGES)
    (folder / "labels.txt").write_text("".join(f"{i}:1\n" for i in IMAGES))
    with pytest.raises(UserError, match=r"labels\.txt") as caught:
        list_shards([str(folder)])
    assert caught.value.where == f"{folder}/"
