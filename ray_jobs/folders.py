"""A folder of images as shards: class folders, or a flat folder with a file of labels beside it or in it.

A shard is FOLDER/images-00017-of-01282-1a2b3c4d: every 1282nd image, from number 17 on, of the folder's
images in the order of their paths. So each shard holds images of all classes, and any worker finds them
again. The last eight digits are of a digest over all paths and labels: another folder has other shards.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import PurePosixPath

import fsspec

from ray_jobs.samples import IMAGES, MAX_SAMPLE_BYTES, TENSOR, Sample, ShardError, printable, refused, unsafe
from ray_jobs.stores import is_url
from ray_jobs.streams import opened

IMAGES_PER_SHARD = 1000
SHARD = re.compile(r"(?P<folder>.+)/images-(?P<first>\d{5,})-of-(?P<step>\d{5,})-(?P<digest>[0-9a-f]{8})")
LABEL_FILES = ("{folder}/labels.txt", "{folder}/labels.csv", "{folder}.txt", "{folder}.csv")


@dataclass(frozen=True)
class Folder:
    """The images of a folder, by their paths in it, sorted; `labels` in the same order."""

    path: str
    images: tuple[str, ...]
    labels: tuple[int | None, ...]

    @cached_property
    def digest(self) -> str:
        """Eight hexadecimal digits of what is in the folder."""
        state = hashlib.sha256()
        for image, label in zip(self.images, self.labels):
            state.update(f"{image}\n{label}\n".encode("utf-8", "surrogateescape"))
        return state.hexdigest()[:8]

    def shards(self) -> list[str]:
        """The names of its shards, of at most IMAGES_PER_SHARD images each."""
        step = -(-len(self.images) // IMAGES_PER_SHARD)
        return [f"{self.path}/images-{first:05}-of-{step:05}-{self.digest}" for first in range(step)]


def folder_at(path: str) -> Folder:
    """What is in a folder, by its path or URL. ShardError where its labels do not fit it."""
    path = path.rstrip("/")
    images, classes = (remote_images if is_url(path) else local_images)(path)
    images.sort()
    lines = label_lines(path)
    if lines is not None:
        labels = listed_labels(images, lines)
    else:
        numbers = numbered(classes)
        labels = [numbers.get(image.partition("/")[0]) for image in images]
    return Folder(path, tuple(images), tuple(labels))


cached_folder = lru_cache(maxsize=1)(folder_at)  # a worker takes many shards of one folder


def numbered(names: Iterable[str]) -> dict[str, int]:
    """The class number of each name: the number that it is where all are numbers, else its place in their order."""
    names = sorted(set(names))
    if all(name.isdecimal() for name in names):
        return {name: int(name) for name in sorted(names, key=int)}
    return {name: number for number, name in enumerate(names)}


def is_image(name: str) -> bool:
    return not name.startswith(".") and name.rpartition(".")[2].lower() in (*IMAGES, TENSOR)


def local_images(folder: str) -> tuple[list[str], list[str]]:
    """The paths of a folder's images in it, at any depth, and its class folders, with images or without."""
    with os.scandir(folder) as entries:
        classes = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    images = list(walked(folder, ""))
    return images, classes


def walked(folder: str, prefix: str) -> Iterator[str]:
    with os.scandir(f"{folder}/{prefix}") as entries:
        for entry in entries:
            # A class folder may be a link; deeper ones are not followed, since they may lead in circles.
            if entry.is_dir(follow_symlinks=not prefix) and not entry.name.startswith("."):
                yield from walked(folder, f"{prefix}{entry.name}/")
            elif is_image(entry.name) and entry.is_file():
                yield prefix + entry.name


def remote_images(folder: str) -> tuple[list[str], list[str]]:
    filesystem, root = fsspec.core.url_to_fs(folder)
    filesystem.invalidate_cache()
    paths = [path.removeprefix(root).lstrip("/") for path in filesystem.find(root)]
    images = [p for p in paths if is_image(PurePosixPath(p).name) and not p.startswith(".") and "/." not in p]
    return images, [image.partition("/")[0] for image in images if "/" in image]


def label_lines(folder: str) -> list[str] | None:
    """The lines of a folder's label file; None where it has none."""
    for pattern in LABEL_FILES:
        path = pattern.format(folder=folder)
        filesystem, name = fsspec.core.url_to_fs(path)
        if filesystem.isfile(name):
            with opened(path) as stream:
                return stream.read().decode("utf-8-sig").splitlines()
    return None


def listed_labels(images: list[str], lines: list[str]) -> list[int | None]:
    """The label of each image: one per line in the order of the images, or lines of an image's name and its label.

    Names may be paths in the folder or bare file names, with or without extension, and stand before
    white space or a comma. A first line that names no image is a heading. None for an image without a line.
    """
    rows = [fields(line) for line in lines if line.strip()]
    if all(len(row) == 1 for row in rows):
        if len(rows) != len(images):
            raise ShardError(f"{len(rows)} labels for {len(images)} images")
        numbers = numbered(row[0] for row in rows)
        return [numbers[row[0]] for row in rows]
    names = [names_of(image) for image in images]
    if rows and not any(rows[0][0] in each for each in names):
        rows = rows[1:]
    if odd := next((row for row in rows if len(row) != 2), None):
        raise ShardError(f"a line without a label: {odd[0][:40]!r}")
    numbers = numbered(label for _, label in rows)
    label_of = {name: numbers[label] for name, label in rows}
    return [next((label_of[name] for name in each if name in label_of), None) for each in names]


def fields(line: str) -> list[str]:
    """A name and the first word of what follows it; or one word alone."""
    name, comma, rest = line.partition(",")
    if comma:
        return [name.strip(' "'), *rest.replace('"', " ").split()[:1]]
    return line.rsplit(None, 1) if len(line.split()) > 1 else [line.strip()]


def names_of(image: str) -> tuple[str, str, str]:
    name = PurePosixPath(image).name
    return image, name, PurePosixPath(name).stem


def samples(shard: re.Match[str]) -> Iterator[Sample]:
    """The samples of a shard of a folder, named after their paths. ShardError where the folder has changed."""
    folder = cached_folder(shard["folder"])
    if folder.digest != shard["digest"]:
        cached_folder.cache_clear()
        folder = cached_folder(shard["folder"])
    if folder.digest != shard["digest"]:
        raise ShardError("the folder's images or labels are other than when they were listed")
    mine = slice(int(shard["first"]), None, int(shard["step"]))
    for image, label in zip(folder.images[mine], folder.labels[mine]):
        yield sample_at(folder.path, image, label)


def sample_at(folder: str, image: str, label: int | None) -> Sample:
    key = key_of(image)
    if trouble := unsafe(image):
        return refused(key, trouble)
    with opened(f"{folder}/{image}") as stream:
        data = stream.read(MAX_SAMPLE_BYTES + 1)
    if len(data) > MAX_SAMPLE_BYTES:
        return refused(key, f"it has more than {MAX_SAMPLE_BYTES} bytes")
    sample: Sample = {"__key__": key, image.rpartition(".")[2].lower(): data}
    return sample if label is None else sample | {"cls": str(label).encode()}


def key_of(image: str) -> str:
    """The key of an image by its path in a folder; it has no dot and no slash, which end keys elsewhere."""
    stem = printable(image).rpartition(".")[0]
    return stem.replace(".", "_").replace("/", "-")
