"""The figures of VGG-16 in docs/results.md."""

import io
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from benchmarks.paper.convergence import NORMALS
from benchmarks.paper.quality import Judged
from ray_jobs.figures.drawing import draw_quality
from ray_jobs.studies.vgg16 import CONVOLUTIONS

COLORS = {
    "gradient": "#5a5a5a", "deconvnet": "#c9a227", "guided-backprop": "#d1570a", "patternnet": "#1b8a4b",
    "patternattribution": "#0b3c6f", NORMALS: "#c06bb0",
}  # fmt: skip


def layer(operator: str) -> str:
    """Return the usual name of a convolution of VGG-16, such as conv5_3."""
    return CONVOLUTIONS[int(operator)]


def draw_judged(path: Path, judged: Mapping[str, Judged]) -> None:
    """Draw ρ by layer and estimator, like Figure 3 of the paper."""
    rows = [
        {"operator": layer(name), "neuron": neuron, "estimator": estimator, "rho": value}
        for name, it in judged.items()
        for estimator, values in it.rho.items()
        for neuron, value in enumerate(values.tolist())
        if value == value  # not NaN
    ]
    draw_quality(path, pa.Table.from_pylist(rows))
    shrink(path)


def draw_convergence(path: Path, curves: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Draw the |cosine| of two random output gradients at each convolution's input, from conv5_3 to the image."""
    figure = Figure(figsize=(8, 3.8), layout="constrained", dpi=110)
    axes = figure.subplots()
    for name, curve in curves.items():
        method, _, estimator = name.partition(":")
        style = "--" if estimator == "linear" else "-"
        axes.plot([float(v.mean()) for v in curve.values()], style, color=COLORS[method], lw=1.6, label=name)
    operators = list(next(iter(curves.values())))
    axes.set_xticks(range(len(operators)), [layer(name) for name in operators], rotation=50, fontsize=8, ha="right")
    axes.set(ylabel="|cosine| of two random output gradients", ylim=(0, 1.03))
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, facecolor="white")
    shrink(path)


def shrink(path: Path, dither: Image.Dither = Image.Dither.NONE) -> None:
    """Save a PNG again with at most 256 colors, which is several times smaller; dither photographs."""
    image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    colors = image.quantize(256, kmeans=3)
    image.quantize(palette=colors, dither=dither).save(path, optimize=True)
