"""Photographs and maps of a run's samples, small enough to be embedded in a page."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from PIL import Image

from patterns.attribution import encode_png
from ray_jobs.views.gallery import Gallery, Row

LARGEST = 256  # pixels: the size of an enlarged picture on most screens
SMALLEST = 96
EXACT = 64  # pixels: pictures up to this size are kept as they are
BUDGET = 9 << 20  # bytes of all pictures of a page; base64 makes 12 MiB of these
# Bytes per pixel of a JPEG, measured on maps of random networks, which are noisier than photographs and other maps.
PER_PIXEL = 0.36
QUALITY = 78


@dataclass(frozen=True)
class Tile:
    """A picture of a sample: the photograph (method 0), or the map of a method, numbered from 1."""

    method: int
    name: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Card:
    """A sample; `right` is true if the prediction equals the label, and None if one of them is missing."""

    key: str
    shard: str
    label: str | None
    prediction: str
    probability: float | None
    right: bool | None
    tiles: list[Tile]

    @property
    def answer(self) -> str:
        """`yes`, `no` or `unknown`: whether the prediction is right."""
        return {True: "yes", False: "no", None: "unknown"}[self.right]


@dataclass(frozen=True)
class Samples:
    """The samples of a run on a page.

    Attributes:
        methods: The methods of the maps.
        cards: The shown samples: all, or a random choice.
        total: Number of explained samples.
        exact: The pictures are small and their pixels are shown without smoothing.
    """

    methods: Sequence[str]
    cards: list[Card]
    total: int
    exact: bool


def read_samples(gallery: Gallery, count: int, seed: int, pages: int) -> Samples:
    """Read samples of a run for a page.

    Args:
        gallery: The explanations of the run.
        count: Maximum number of samples.
        seed: Seed of the random choice.
        pages: Number of runs on the page, which share the budget of bytes.

    Raises:
        UserError: If the files of the samples no longer exist.
    """
    rows = sorted(gallery.draw(count, seed), key=shard_and_key)
    side = side_for(pages * len(rows) * (1 + len(gallery.methods)))
    cards = []
    for _, shard in groupby(rows, key=lambda row: row["shard"]):  # holds the pictures of one shard at a time
        some = list(shard)
        for row, shown in zip(some, gallery.pictures(some)):
            pictures = {"photograph": shown.photograph, **shown.maps}
            tiles = [tile(number, name, image, side) for number, (name, image) in enumerate(pictures.items())]
            cards.append(card(gallery, row, tiles))
    exact = bool(cards) and max(t.height for t in cards[0].tiles) <= EXACT
    return Samples(gallery.methods, cards, len(gallery.rows()), exact)


def shard_and_key(row: Row) -> tuple[str, str]:
    """Return the sort key of a row."""
    return row["shard"], row["key"]


def card(gallery: Gallery, row: Row, tiles: list[Tile]) -> Card:
    """Return the card of a sample, with the names of its classes."""
    label, prediction = row["label"], row["prediction"]
    named = None if label is None else gallery.class_name(label)
    right = None if label is None or prediction is None else label == prediction
    predicted = "no class" if prediction is None else gallery.class_name(prediction)
    return Card(row["key"], row["shard"], named, predicted, row["probability"], right, tiles)


def side_for(pictures: int) -> int:
    """Return the height in pixels at which this number of pictures fits the budget."""
    return int(min(LARGEST, max(SMALLEST, math.sqrt(BUDGET / (max(1, pictures) * PER_PIXEL)))))


def tile(method: int, name: str, image: Image.Image, side: int) -> Tile:
    """Return a picture shrunk to a height. Maps of several targets stand side by side and are wider."""
    if image.height > max(side, EXACT):
        image = image.resize((max(1, round(image.width * side / image.height)), side), Image.Resampling.LANCZOS)
    return Tile(method, name, data_uri(image), *image.size)


def data_uri(image: Image.Image) -> str:
    """Return an image as a data URI: PNG if it is small, else JPEG."""
    if image.height <= EXACT:
        return embed("png", encode_png(image))
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "jpeg", quality=QUALITY, subsampling=0)  # the colors of maps carry the values
    return embed("jpeg", buffer.getvalue())


def embed(kind: str, content: bytes) -> str:
    """Return the data URI of an encoded image."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
