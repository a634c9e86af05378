"""The explanations of a run to look through: photographs and maps, small enough to be part of a page."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from PIL import Image

from patterns.attribution import png
from ray_jobs.views.gallery import Gallery, Row

LARGEST = 256  # pixels: what a picture is shown at, enlarged, on most screens
SMALLEST = 96
EXACT = 64  # pixels: pictures up to this size are kept as they are
BUDGET = 9 << 20  # bytes of all pictures of a page; base64 makes 12 MiB of them
PER_PIXEL = (
    0.36  # bytes: what JPEG takes for the maps of random networks, noisier than those of trained ones and photographs
)
QUALITY = 78


@dataclass(frozen=True)
class Tile:
    """A picture: of the photograph (method 0), or of a method by its number from 1 on."""

    method: int
    name: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Card:
    """A sample. right: whether its prediction is its label; None where it has none."""

    key: str
    shard: str
    label: str | None
    prediction: str
    probability: float | None
    right: bool | None
    tiles: list[Tile]

    @property
    def said(self) -> str:
        """yes, no or unknown."""
        return {True: "yes", False: "no", None: "unknown"}[self.right]


@dataclass(frozen=True)
class Samples:
    """total: explained, of which the cards are drawn at random if they are not all."""

    methods: Sequence[str]
    cards: list[Card]
    total: int
    exact: bool  # pictures are small, and their pixels are to be seen


def samples(gallery: Gallery, count: int, seed: int, pages: int) -> Samples:
    """So many samples of a run, on a page that shows as many runs. UserError where their files are there no more."""
    rows = sorted(gallery.drawn(count, seed), key=place)
    side = side_for(pages * len(rows) * (1 + len(gallery.methods)))
    cards = []
    for _, shard in groupby(rows, key=lambda row: row["shard"]):  # so that one shard's pictures are held at a time
        some = list(shard)
        for row, shown in zip(some, gallery.shown(some)):
            pictures = {"photograph": shown.photograph, **shown.maps}
            tiles = [tile(number, name, image, side) for number, (name, image) in enumerate(pictures.items())]
            cards.append(card(gallery, row, tiles))
    exact = bool(cards) and max(t.height for t in cards[0].tiles) <= EXACT
    return Samples(gallery.methods, cards, len(gallery.rows()), exact)


def place(row: Row) -> tuple[str, str]:
    return row["shard"], row["key"]


def card(gallery: Gallery, row: Row, tiles: list[Tile]) -> Card:
    """A sample with its classes' names."""
    label, prediction = row["label"], row["prediction"]
    named = None if label is None else gallery.class_name(label)
    right = None if label is None or prediction is None else label == prediction
    predicted = "no class" if prediction is None else gallery.class_name(prediction)
    return Card(row["key"], row["shard"], named, predicted, row["probability"], right, tiles)


def side_for(pictures: int) -> int:
    """How large so many pictures may be, in pixels, for all of them to keep to the budget."""
    return int(min(LARGEST, max(SMALLEST, math.sqrt(BUDGET / (max(1, pictures) * PER_PIXEL)))))


def tile(method: int, name: str, image: Image.Image, side: int) -> Tile:
    """A picture, shrunk to a height; maps of several targets lie side by side, and are wider."""
    if image.height > max(side, EXACT):
        image = image.resize((max(1, round(image.width * side / image.height)), side), Image.Resampling.LANCZOS)
    return Tile(method, name, data_uri(image), *image.size)


def data_uri(image: Image.Image) -> str:
    """An image as an address that holds it: as it is where it is tiny, else as JPEG."""
    if image.height <= EXACT:
        return encoded("png", png(image))
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "jpeg", quality=QUALITY, subsampling=0)  # colours are what maps say
    return encoded("jpeg", buffer.getvalue())


def encoded(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
