"""Maps as images, for notebooks and for files."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from patterns.attribution.methods import parse_method

SATURATION = 0.998  # the share of values that a picture shows unclipped, so that a few pixels do not set the scale
COLOR_MAP = "coldnhot"  # from zennit: black at 0, blue for negative values, red to yellow for positive ones


def render_map(method: str, explanation: np.ndarray) -> Image.Image:
    """Draw a map: a signal in the colors of the input, an attribution as a heat map of the sum over its channels.

    Args:
        method: The name of the method.
        explanation: The map, shape (C, H, W).

    Example:
        >>> render_map("patternattribution", np.ones((3, 4, 5))).size
        (5, 4)
    """
    from zennit.image import get_cmap

    explanation = explanation.astype(np.float32)
    if parse_method(method).is_attribution or len(explanation) not in (1, 3):
        colors = get_cmap(COLOR_MAP)(center_values(explanation.sum(0)))
        return Image.fromarray((colors * 255).round().astype(np.uint8))
    return values_to_image(center_values(explanation))


def render_input(values: np.ndarray) -> Image.Image:
    """Draw a model's input from black at its smallest value to white at its largest; gray unless it has 3 channels.

    Args:
        values: The input, shape (C, H, W).

    Example:
        >>> render_input(np.array([[[-1.0, 3.0]]])).getpixel((1, 0))
        (255, 255, 255)
    """
    values = values.astype(np.float32)
    low, high = values.min(), values.max()
    values = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return values_to_image(values if len(values) == 3 else values.mean(0, keepdims=True))


def values_to_image(values: np.ndarray) -> Image.Image:
    """Convert values in [0, 1] to an RGB image.

    Args:
        values: The values, shape (1, H, W) or (3, H, W).

    Example:
        >>> values_to_image(np.array([[[0.0, 0.2]]])).getpixel((1, 0))
        (51, 51, 51)
    """
    pixels = (values * 255).round().astype(np.uint8)
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).convert("RGB")


def center_values(values: np.ndarray) -> np.ndarray:
    """Return x / 2s + ½ clipped to [0, 1], which is ½ at x = 0.

    Args:
        values: The values x. s is the quantile `SATURATION` of |x|.

    Example:
        >>> center_values(np.array([-2.0, 0.0, 2.0])).tolist()
        [0.0, 0.5, 1.0]
    """
    sizes = np.abs(values)
    scale = np.quantile(sizes, SATURATION) or sizes.max()
    return np.clip(values / (2 * scale) + 0.5, 0, 1) if scale > 0 else np.full_like(values, 0.5)


def encode_png(image: Image.Image) -> bytes:
    """Return an image as the bytes of a PNG file.

    Args:
        image: The image.

    Example:
        >>> encode_png(Image.new("RGB", (2, 2)))[1:4]
        b'PNG'
    """
    buffer = io.BytesIO()
    image.save(buffer, "png", compress_level=4)  # 6, the default, takes twice as long for heat maps of the same size
    return buffer.getvalue()


@dataclass(frozen=True)
class RenderedExplanation:
    """One sample as pictures. A notebook displays it as a row.

    Attributes:
        photograph: The input as the model sees it.
        caption: The target and its probability.
        maps: The map of each method.

    Example:
        >>> picture = Image.new("RGB", (2, 2))
        >>> row = RenderedExplanation(picture, "cat 0.98", {"patternnet": picture})
        >>> row._repr_html_().count("<img")
        2
    """

    photograph: Image.Image
    caption: str
    maps: Mapping[str, Image.Image]

    def _repr_html_(self) -> str:
        return html_table([self])


def html_table(rows: Sequence[RenderedExplanation], size: int = 160) -> str:
    """Return an HTML table that embeds its images: one sample per row, each image `size` pixels wide."""
    lines = ([(row.caption, row.photograph), *row.maps.items()] for row in rows)
    cells = ("".join(html_cell(image, title, size) for title, image in line) for line in lines)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in cells)}</table>"


def html_cell(image: Image.Image, title: str, size: int) -> str:
    """Return one cell of `html_table`."""
    data, title = base64.b64encode(encode_png(image)).decode(), html.escape(title)
    element = f'<img src="data:image/png;base64,{data}" alt="{title}" width="{size}">'
    return f'<td style="text-align: left; vertical-align: top; max-width: {size}px">{title}<br>{element}</td>'
