"""Maps as images: what a notebook shows and files hold."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from patterns.attribution.methods import method_of

COLOUR_MAP = "coldnhot"  # zennit's: blue against, black without, red to yellow for


def picture(method: str, explanation: np.ndarray) -> Image.Image:
    """A map (C, H, W): a signal in the input's colours, an attribution as a heat map of its channel sum."""
    from zennit.image import get_cmap

    explanation = explanation.astype(np.float32)
    if method_of(method).attributes or len(explanation) not in (1, 3):
        colours = get_cmap(COLOUR_MAP)(centred(explanation.sum(0)))
        return Image.fromarray((colours * 255).round().astype(np.uint8))
    return coloured(centred(explanation))


def photograph(values: np.ndarray) -> Image.Image:
    """A model's input (C, H, W) with its darkest value black and its brightest white; one channel is grey."""
    values = values.astype(np.float32)
    low, high = values.min(), values.max()
    values = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return coloured(values if len(values) == 3 else values.mean(0, keepdims=True))


def coloured(values: np.ndarray) -> Image.Image:
    """Values in [0, 1], shape (1 or 3, H, W)."""
    pixels = (values * 255).round().astype(np.uint8)
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).convert("RGB")


def centred(values: np.ndarray) -> np.ndarray:
    """x / (2 max|x|) + ½: in [0, 1], with nothing at ½."""
    largest = np.abs(values).max()
    return values / (2 * largest) + 0.5 if largest > 0 else np.full_like(values, 0.5)


def png(image: Image.Image) -> bytes:
    """An image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


@dataclass(frozen=True)
class Shown:
    """A photograph as the model sees it, what is said of it, and its explanations by method.

    A notebook shows it as a row of pictures.
    """

    photograph: Image.Image
    caption: str
    maps: Mapping[str, Image.Image]

    def _repr_html_(self) -> str:
        return table([self])


def table(rows: Sequence[Shown], size: int = 160) -> str:
    """A table of HTML that needs no other file: one photograph a row, `size` pixels wide."""
    lines = ([(row.caption, row.photograph), *row.maps.items()] for row in rows)
    cells = ("".join(cell(image, title, size) for title, image in line) for line in lines)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in cells)}</table>"


def cell(image: Image.Image, title: str, size: int) -> str:
    data, title = base64.b64encode(png(image)).decode(), html.escape(title)
    shown = f'<img src="data:image/png;base64,{data}" alt="{title}" width="{size}">'
    return f'<td style="text-align: left; vertical-align: top; max-width: {size}px">{title}<br>{shown}</td>'
