"""Pictures of explanations, as the paper draws them."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image
from zennit.image import get_cmap

from patterns import METHODS
from patterns.storage import write_aside

COLOUR_MAP = "coldnhot"  # zennit's: blue against, black without, red to yellow for


def picture(method: str, explanation: np.ndarray) -> Image.Image:
    """A map (C, H, W): a signal in the input's colours, an attribution as a heat map of its channel sum."""
    explanation = explanation.astype(np.float32)
    if METHODS[method].attributes:
        colours = get_cmap(COLOUR_MAP)(centred(explanation.sum(0)))
        return Image.fromarray((colours * 255).round().astype(np.uint8))
    pixels = (centred(explanation) * 255).round().astype(np.uint8)
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
class Row:
    """A photograph as the model sees it, what is said of it, and its explanations by method."""

    photograph: Image.Image
    caption: str
    maps: dict[str, Image.Image]


def draw_grid(path: Path, rows: Sequence[Row], columns: int = 2, scale: float = 1.3) -> None:
    """Draw photographs and their explanations, one photograph a row, in blocks side by side."""
    from matplotlib.figure import Figure

    methods = list(rows[0].maps)
    width = 1 + len(methods)
    height = -(-len(rows) // columns)
    figure = Figure(figsize=(scale * columns * (width + 0.25), scale * height * 1.16), dpi=110)
    blocks = figure.subfigures(1, columns, squeeze=False)[0]
    for block, first in zip(blocks, range(0, len(rows), height)):
        axes = block.subplots(height, width, squeeze=False)
        block.subplots_adjust(left=0.02, right=0.98, top=0.97, bottom=0.02, wspace=0.05, hspace=0.16)
        for axis in axes.flat:
            axis.axis("off")
        for line, row in zip(axes, rows[first : first + height]):
            for axis, image in zip(line, [row.photograph, *row.maps.values()]):
                axis.imshow(image)
            line[0].set_title(row.caption, fontsize=5.5, loc="left", pad=2)
        for axis, method in zip(axes[0][1:], methods):
            axis.set_title(method, fontsize=6.5, pad=2)
    with matplotlib.rc_context({"savefig.facecolor": "white"}):
        write_aside(path, lambda aside: figure.savefig(aside, format=path.suffix[1:]))
