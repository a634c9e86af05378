"""`pack`: every image of a folder is packed, or an error names the image that cannot be packed."""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from patterns import UserError
from ray_jobs.cli.app import exit_status
from ray_jobs.data.packing import pack
from ray_jobs.data.shard_reader import read_shard
from tests.conftest import jpeg


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for number, name in enumerate(("cat/1.jpg", "cat/2.JPEG", "dog/1.jpg", "dog/sub/1.jpg")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(np.random.default_rng(number)))
    return folder


def packed(images: Path, out: Path, *options: str) -> list[str]:
    assert exit_status(["pack", str(images), str(out), *options]) == 0
    return [name for path in sorted(out.glob("*.tar")) for name in tarfile.open(path).getnames()]


@pytest.mark.parametrize("options", [(), ("--crops", "1", "--size", "8")])
def test_hidden_files_and_folders_are_left_out(images: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    (images / "cat" / "._1.jpg").write_bytes(b"\0\5\x16\7")
    (images / "cat" / ".hidden.jpg").write_bytes(b"x")
    (images / ".cache").mkdir()
    shutil.copy(images / "cat" / "1.jpg", images / ".cache" / "1.jpg")
    names = packed(images, tmp_path / "out", *options)
    assert len([name for name in names if not name.endswith(".cls")]) == 4


def test_images_that_are_left_out_change_no_key(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (9, 9)).save(images / "dog" / "1.png")
    keys = tmp_path / "keys.txt"
    keys.write_text("anywhere\tdog/1%2Epng\n")
    assert "dog/1%2Ejpg.jpg" in packed(images, tmp_path / "all")
    names = packed(images, tmp_path / "some", "--without-keys", str(keys))
    assert sorted(name for name in names if name.startswith("dog/1")) == ["dog/1%2Ejpg.cls", "dog/1%2Ejpg.jpg"]
    assert "1 png" not in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("option", ["keys", "without_keys"])
def test_list_that_names_or_leaves_no_image_is_an_error_of_its_option(
    images: Path, tmp_path: Path, option: str
) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("".join(f"packed/000000.tar\t{key}-0\n" for key in ("cat/1", "cat/2", "dog/1")))
    found = [(str(keys), option)]
    if option == "without_keys":
        every = tmp_path / "every.txt"
        every.write_text("".join(f"packed\t{key}\n" for key in ("cat/1", "cat/2", "dog/1", "dog/sub/1")))
        found.append((str(every), option))
    for file, name in found:
        with pytest.raises(UserError) as caught:
            pack(images, tmp_path / "out", **{name: file})  # type: ignore[arg-type]
        assert (caught.value.where, caught.value.parameter) == (file, option)
        assert not (tmp_path / "out").exists()


def test_folder_named_like_an_image_is_a_folder(images: Path, tmp_path: Path) -> None:
    (images / "cat" / "album.jpg").mkdir()
    shutil.copy(images / "cat" / "1.jpg", images / "cat" / "album.jpg" / "1.jpg")
    assert "cat/album%2Ejpg/1.jpg" in packed(images, tmp_path / "out")


def test_every_format_of_torchvision_is_packed_and_counted(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("1.bmp", "2.tif", "3.ppm", "1.png"):
        Image.new("RGB", (9, 9)).save(images / "dog" / name)
    Image.new("RGB", (9, 9)).save(images / "dog" / "4.gif")
    names = packed(images, tmp_path / "out")
    assert len(names) == 2 * (len(ImageFolder(str(images)).samples) + 1)
    assert "1 gif" in capsys.readouterr().out
    samples = list(read_shard(str(tmp_path / "out" / "000000.tar")))
    assert len(samples) == len({s.key for s in samples}) == len(names) // 2


def add_broken_link(images: Path) -> None:
    (images / "cat" / "3.jpg").symlink_to("nowhere.jpg")


def add_empty_image(images: Path) -> None:
    (images / "cat" / "3.jpg").write_bytes(b"")


def add_gif(images: Path) -> None:
    Image.new("RGB", (9, 9)).save(images / "cat" / "3.gif")


@pytest.mark.parametrize(
    ("spoil", "options"),
    [
        (add_broken_link, ()),
        (add_broken_link, ("--crops", "1")),
        (add_empty_image, ("--crops", "1")),
        (add_gif, ("--crops", "1")),
    ],
)
def test_image_that_cannot_be_packed_is_named(
    images: Path,
    tmp_path: Path,
    complaint: Callable[..., str],
    spoil: Callable[[Path], None],
    options: tuple[str, ...],
) -> None:
    spoil(images)
    assert "cat/3." in complaint("pack", images, tmp_path / "out", *options)
    assert not list((tmp_path / "out").glob("*")), "an incomplete file was left"


@pytest.mark.parametrize("where", ["images/shards", "images", "images/cat", "file", "file/below"])
def test_output_folder_outside_the_images_is_required_and_nothing_is_written(
    images: Path, tmp_path: Path, complaint: Callable[..., str], where: str
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    before = sorted(tmp_path.rglob("*"))
    complaint("pack", images, tmp_path / where)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("folders", "classes"),
    [
        (["007", "12"], {"7": "007", "12": "12"}),
        (["007", "7", "1"], {"0": "007", "1": "1", "2": "7"}),
        (["99999999999", "3"], {"0": "3", "1": "99999999999"}),
        (["²", "٣"], {"0": "²", "1": "٣"}),
    ],
)
def test_folders_with_unusual_numbers_are_different_classes(
    tmp_path: Path, folders: list[str], classes: dict[str, str]
) -> None:
    for number, name in enumerate(folders):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "x.jpg").write_bytes(jpeg(np.random.default_rng(number)))
    packed(tmp_path / "images", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == classes
    found = {s.key.partition("/")[0]: s.files["cls"] for s in read_shard(str(tmp_path / "out" / "000000.tar"))}
    assert found == {name: number.encode() for number, name in classes.items()}
