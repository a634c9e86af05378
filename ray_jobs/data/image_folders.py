"""Folders of images as shards: class folders, or a flat folder with a file of labels in it or next to it.

The shard FOLDER/images-00017-of-01282-1a2b3c4d holds every 1282nd of the folder's images in the order of their paths,
beginning with number 17. So each shard holds images of all classes, and any worker finds them again. The last eight
digits are a digest of all paths and labels, so that a changed folder has different shards.
"""

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath

import fsspec

from ray_jobs.data.byte_streams import open_stream
from ray_jobs.data.labels import number_classes, parse_labels
from ray_jobs.data.samples import (
    IMAGES,
    MAX_SAMPLE_BYTES,
    TENSOR,
    UNREAD_IMAGES,
    Sample,
    ShardError,
    explain_unread_format,
    extension_of,
    make_key,
    reject,
)
from ray_jobs.io.file_systems import is_url
from ray_jobs.units import make_printable

IMAGES_PER_SHARD = 1000
SHARD = re.compile(r"(?P<folder>.+)/images-(?P<first>\d{5,})-of-(?P<step>\d{5,})-(?P<digest>[0-9a-f]{8})")
EXTENSIONS = frozenset((*IMAGES, TENSOR, *UNREAD_IMAGES))
# The last is for Tiny ImageNet, whose images are in val/images.
LABEL_FILES = (
    *("{folder}/labels.txt", "{folder}/labels.csv", "{folder}/val_annotations.txt", "{folder}.txt", "{folder}.csv"),
    "{parent}/val_annotations.txt",
)
KEY_VERSION = "keys 2"  # part of every digest, because versions before 0.3 made different keys


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder.

    Attributes:
        path: The path or URL of the folder.
        images: Paths of the images in the folder, sorted. Images in formats that are not decoded are included, so that
            each is listed as a rejected sample.
        labels: Their labels, in the same order.
    """

    path: str
    images: tuple[str, ...]
    labels: tuple[int | None, ...]

    @cached_property
    def digest(self) -> str:
        """Eight hexadecimal digits of a digest of all paths and labels."""
        state = hashlib.sha256(KEY_VERSION.encode())
        for image, label in zip(self.images, self.labels):
            state.update(f"{image}\n{label}\n".encode("utf-8", "surrogateescape"))
        return state.hexdigest()[:8]

    @cached_property
    def keys(self) -> list[str]:
        """The key of each image."""
        return make_keys(self.images)

    def shards(self) -> list[str]:
        """Return the names of its shards, which hold at most IMAGES_PER_SHARD images each."""
        step = -(-len(self.images) // IMAGES_PER_SHARD)
        return [f"{self.path}/images-{first:05}-of-{step:05}-{self.digest}" for first in range(step)]


def scan_folder(path: str) -> ImageFolder:
    """List the images of a folder and their labels.

    Args:
        path: The path or URL of the folder.

    Raises:
        ShardError: If a file of labels does not match the images.
    """
    path = path.rstrip("/")
    images, classes = (list_remote_images if is_url(path) else list_local_images)(path)
    images.sort()
    numbers = number_classes(classes)
    labels = [numbers.get(image.partition("/")[0]) for image in images]
    return ImageFolder(path, tuple(images), tuple(read_labels(path, images) or labels))


scan_folder_cached = lru_cache(maxsize=1)(scan_folder)  # a worker reads many shards of one folder


def is_image(name: str) -> bool:
    """Return whether a file name is visible and has the extension of an image or a ready tensor."""
    return not name.startswith(".") and extension_of(name) in EXTENSIONS


def list_local_images(folder: str) -> tuple[list[str], list[str]]:
    """Return the paths of the images in a local folder, at any depth, and its class folders, also empty ones."""
    with os.scandir(folder) as entries:
        classes = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    images = list(walk_images(folder, ""))
    return images, classes


def walk_images(folder: str, prefix: str) -> Iterator[str]:
    """Yield the paths of images below a prefix in a folder."""
    with os.scandir(f"{folder}/{prefix}") as entries:
        for entry in entries:
            # A class folder may be a link. Deeper links are not followed, because they may form a cycle.
            if entry.is_dir(follow_symlinks=not prefix) and not entry.name.startswith("."):
                yield from walk_images(folder, f"{prefix}{entry.name}/")
            elif is_image(entry.name) and not entry.is_dir():
                yield prefix + entry.name


def list_remote_images(folder: str) -> tuple[list[str], list[str]]:
    """Return the paths of the images in a folder of a store, at any depth, and its class folders."""
    filesystem, root = fsspec.core.url_to_fs(folder)
    filesystem.invalidate_cache()
    paths = [path.removeprefix(root).lstrip("/") for path in filesystem.find(root)]
    images = [p for p in paths if is_image(PurePosixPath(p).name) and not p.startswith(".") and "/." not in p]
    return images, [image.partition("/")[0] for image in images if "/" in image]


def read_labels(folder: str, images: Sequence[str]) -> list[int | None] | None:
    """Return the labels of images from the folder's file of labels; None if there is no such file."""
    parent, _, name = folder.rpartition("/")
    for pattern in LABEL_FILES if images else ():
        path = pattern.format(folder=folder, parent=parent)
        filesystem, file = fsspec.core.url_to_fs(path)
        if filesystem.isfile(file):
            with open_stream(path) as stream:
                data = stream.read()
            try:
                return parse_labels(data, images, name)
            except ShardError as error:
                if not path.startswith(f"{folder}/") and all("/" in image for image in images):
                    continue  # the file may belong to something else, and these images have class folders
                raise ShardError(f"{make_printable(path)}: {error}") from error
    return None


def make_keys(images: Sequence[str]) -> list[str]:
    """Return the key of each image: its path without the extension, or with it if two keys would be equal.

    Example:
        >>> make_keys(["cat/1.jpg", "cat/1.png", "cat/2.jpg"])
        ['cat/1%2Ejpg', 'cat/1%2Epng', 'cat/2']
    """
    stems = [image.rpartition(".")[0] for image in images]
    # If 1.jpg keeps its extension, 1.jpg.png must keep it too.
    taken = Counter([*stems, *images])
    return [make_key(stem if taken[stem] == 1 else image) for image, stem in zip(images, stems)]


def read_samples(shard: re.Match[str]) -> Iterator[Sample]:
    """Yield the samples of a shard of a folder.

    Args:
        shard: The match of `SHARD` with the shard's name.

    Raises:
        ShardError: If the folder has changed since its shards were listed.
    """
    folder = scan_folder_cached(shard["folder"])
    if folder.digest != shard["digest"]:
        scan_folder_cached.cache_clear()
        folder = scan_folder_cached(shard["folder"])
    if folder.digest != shard["digest"]:
        raise ShardError(
            "the folder's images or labels have changed since they were listed, or version 0.2 listed them"
        )
    chosen = slice(int(shard["first"]), None, int(shard["step"]))
    for image, label, key in zip(folder.images[chosen], folder.labels[chosen], folder.keys[chosen]):
        yield read_sample(folder.path, image, label, key)


def read_sample(folder: str, image: str, label: int | None, key: str) -> Sample:
    """Return an image of a folder as a sample. It is rejected if it is not a file of an allowed size and format."""
    extension = extension_of(image)
    if extension in UNREAD_IMAGES:
        return reject(key, explain_unread_format(extension))
    path = f"{folder}/{image}"
    if not is_url(folder) and (problem := find_file_problem(path)):
        return reject(key, problem)
    with open_stream(path) as stream:
        data = stream.read(MAX_SAMPLE_BYTES + 1)
    if len(data) > MAX_SAMPLE_BYTES:
        return reject(key, f"it has more than {MAX_SAMPLE_BYTES} bytes")
    return Sample(key, {extension: data} if label is None else {extension: data, "cls": str(label).encode()})


def find_file_problem(path: str) -> str | None:
    """Return why a listed path can never be read.

    Args:
        path: A path of this machine.

    Returns:
        The reason; None for a regular file, and for a file that has been deleted since.
    """
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError:
        return "a link without a target" if Path(path).is_symlink() else None
    return None if stat.S_ISREG(mode) else "not a regular file"
