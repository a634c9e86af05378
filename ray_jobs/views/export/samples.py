"""Contents of an export: its samples, and a description of what they have in common."""

import io
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from PIL import Image

from patterns.attribution import center_values, encode_png

EXACT = 64  # pixels: larger pictures are JPEGs
QUALITY = 95
FOLDER_SIZE = 1000  # files in one folder at most
UNSAFE = re.compile(r"[^A-Za-z0-9-]+")  # characters of a key that its file name does not have
MAX_STEM = 60  # characters of a key in its file name
NO_CLASS = -1  # number of no class, in formats that need one


@dataclass(frozen=True)
class Place:
    """The values that an atlas has for a sample.

    Attributes:
        class_number: The class that its map explains.
        cluster: Its cluster in this class.
        suspicion: The suspicion of the cluster; None for the only cluster of a class.
        p: The p-value of the cluster; None if it was not compared.
        distance: Distance of its map from the mean map of the class.
        x: First coordinate in the plot of the class.
        y: Second coordinate.
        loss: Cross entropy of the label; None if it is not known.
    """

    class_number: int
    cluster: int
    suspicion: float | None
    p: float | None
    distance: float
    x: float
    y: float
    loss: float | None


@dataclass(frozen=True)
class Row:
    """A sample with its map, without its photograph.

    Attributes:
        key: The key.
        map: The map, float32 (C, H, W).
        label: The class number of its label; None without one.
        prediction: The predicted class; None if the model predicts none.
        probability: The probability of the prediction.
        score: The value that the map explains.
        explained: The class that the map explains; None if it explains something else.
        place: What the atlas says about it; None without an atlas.
    """

    key: str
    map: np.ndarray
    label: int | None
    prediction: int | None
    probability: float | None
    score: float | None
    explained: int | None
    place: Place | None = None


@dataclass(frozen=True)
class ExportedSample:
    """A sample as formats write it.

    Attributes:
        number: Its number in the export.
        shard: The printable name of its shard.
        row: Its map and what is known about it.
        picture: Its photograph as the model sees it, RGB.
        picture_file: The bytes of the photograph as a PNG or JPEG file.
        relevance: The relevance of each cell of the map, float32 (H, W), see `patterns.evaluation.compute_relevance`.
    """

    number: int
    shard: str
    row: Row
    picture: Image.Image
    picture_file: bytes
    relevance: np.ndarray

    @cached_property
    def stem(self) -> str:
        """A file name without extension, in a folder: unique, in ASCII, and without special characters."""
        return make_stem(self.number, self.row.key)

    @property
    def picture_name(self) -> str:
        """The stem with the extension of the photograph."""
        return f"{self.stem}.{'png' if is_exact(self.picture) else 'jpg'}"

    @cached_property
    def centered(self) -> np.ndarray:
        """The relevance from -1 to 1, float32 (H, W); a few outliers are clipped, so that they do not set the scale."""
        return (center_values(self.relevance) * 2 - 1).astype(np.float32)


@dataclass(frozen=True)
class Description:
    """The values that all samples of an export share.

    Attributes:
        name: A name for the dataset.
        model: The spec of the model.
        method: The method of the maps.
        target: What the maps explain.
        names: The name of each class by number; all names are different.
        has_atlas: Whether samples have a place in an atlas.
        threshold: The share of the largest relevance from which cells belong to the box of a sample.
    """

    name: str
    model: str
    method: str
    target: str
    names: Mapping[int, str]
    has_atlas: bool
    threshold: float

    def name_class(self, number: int | None) -> str | None:
        """Return the name of a class, or its number as text; None for None."""
        return None if number is None else self.names.get(number, str(number))


class Writer(Protocol):
    """Writer of the samples of an export, in order."""

    def write(self, sample: ExportedSample) -> None:
        """Write a sample."""


def make_stem(number: int, key: str) -> str:
    """Return a file name without extension, in a folder of at most FOLDER_SIZE files.

    The number makes it unique, also where file names ignore case. The key is only for people who read it.

    Example:
        >>> make_stem(12345, "cats/tabby 1.é")
        '00012/00012345-cats_tabby_1'
    """
    words = UNSAFE.sub("_", key)[:MAX_STEM].strip("_-")
    return f"{number // FOLDER_SIZE:05d}/{number:08d}{f'-{words}' if words else ''}"


def distinguish_names(names: Mapping[int, str]) -> dict[int, str]:
    """Return class names that are all different: a name of several classes gets the number of each class.

    Example:
        >>> distinguish_names({134: "crane", 517: "crane", 0: "tench"})
        {134: 'crane (134)', 517: 'crane (517)', 0: 'tench'}
    """
    counts = Counter(names.values())
    return {number: name if counts[name] == 1 else f"{name} ({number})" for number, name in names.items()}


def is_exact(picture: Image.Image) -> bool:
    """Return whether a picture is so small that it is kept without loss."""
    return max(picture.size) <= EXACT


def encode_picture(picture: Image.Image) -> bytes:
    """Return a picture as a file: PNG if it is small, else JPEG."""
    if is_exact(picture):
        return encode_png(picture)
    buffer = io.BytesIO()
    picture.save(buffer, "jpeg", quality=QUALITY, subsampling=0)
    return buffer.getvalue()
