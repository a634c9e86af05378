"""Pictures of explanations, as the paper draws them."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
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
    save_figure(path, figure)


def draw_quality(path: Path, table: pa.Table) -> None:
    """Draw ρ by operator and estimator as the paper's Figure 3: the distribution over neurons, side by side.

    table: of quality.parquet. A box holds the middle half of an operator's neurons, a whisker 90 %.
    """
    from matplotlib.figure import Figure

    table = table.drop_null()
    operators, estimators = (table[column].unique().to_pylist() for column in ("operator", "estimator"))
    grouped = table.group_by(["operator", "estimator"]).aggregate([("rho", "list")]).to_pylist()
    rho = {(row["operator"], row["estimator"]): row["rho_list"] for row in grouped}
    figure = Figure(figsize=(min(20, max(6, 2 + 0.16 * len(operators) * (len(estimators) + 1))), 4), dpi=130)
    axis = figure.subplots()
    width = 1 / (len(estimators) + 1)
    for number, estimator in enumerate(estimators):
        colour = matplotlib.colormaps["tab10"](number % 10)
        places = [i for i, operator in enumerate(operators) if (operator, estimator) in rho]
        axis.boxplot(
            [rho[operators[i], estimator] for i in places],
            positions=[i + (number - (len(estimators) - 1) / 2) * width for i in places],
            widths=0.8 * width, whis=(5, 95), showfliers=False, patch_artist=True,
            boxprops={"facecolor": colour, "linewidth": 0.5}, medianprops={"color": "black", "linewidth": 0.8},
            whiskerprops={"linewidth": 0.5}, capprops={"linewidth": 0.5}, manage_ticks=False,
        )  # fmt: skip
        axis.bar(0, 0, color=colour, label=estimator)
    axis.set_xticks(range(len(operators)), operators, rotation=90, fontsize=6)
    axis.set_xlim(-0.6, len(operators) - 0.4)
    axis.set_ylim(bottom=min(0.0, *(min(values) for values in rho.values())))
    axis.set_ylabel("ρ = 1 − max corr(y, vᵀd)")
    axis.grid(axis="y", linewidth=0.3)
    figure.legend(loc="upper center", ncols=len(estimators), fontsize=7, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    save_figure(path, figure)


def save_figure(path: Path, figure: Any) -> None:
    """Write a figure of matplotlib's, its kind by the file's name."""
    with matplotlib.rc_context({"savefig.facecolor": "white"}):
        write_aside(path, lambda aside: figure.savefig(aside, format=path.suffix[1:]))
