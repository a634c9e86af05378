"""The figures of docs/critics.md."""

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from benchmarks.critics.photographs import BACKWARD, CARRIED, METHODS, NORMALS, REFITTED, Stage

COLORS = {
    "gradient": "#5a5a5a", "gradient-x-input": "#a0a0a0", "deconvnet": "#c9a227", "guided-backprop": "#d1570a",
    "patternnet": "#1b8a4b", "patternattribution": "#0b3c6f", NORMALS: "#c06bb0",
}  # fmt: skip
TITLES = {
    CARRIED: "randomized weights,\npatterns carried over",
    BACKWARD: "only the w of w⊙a randomized,\nthe network as trained",
    REFITTED: "randomized weights,\npatterns refitted",
}
SHOWN_ROWS = (
    (CARRIED, "gradient"), (CARRIED, "guided-backprop"), (CARRIED, "patternnet:two-component"),
    (CARRIED, "patternattribution:two-component"), (CARRIED, "patternattribution:linear"),
    (BACKWARD, "patternattribution:linear"), (REFITTED, "patternattribution:linear"),
)  # fmt: skip


def save(path: Path, figure: Figure) -> None:
    """Save as a PNG with at most 256 colors, which is several times smaller."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    Image.open(buffer).convert("RGB").quantize(256, kmeans=3, dither=Image.Dither.NONE).save(path, optimize=True)


def line_style(method: str) -> dict[str, Any]:
    """Return the style of a method's line: its color stands for the method, dashes for the estimator."""
    name, _, estimator = method.partition(":")
    return {"color": COLORS[name], "ls": "--" if estimator == "linear" else "-", "lw": 1.6, "label": method}


def draw_cascade(
    path: Path, stages: Sequence[Stage], baselines: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]
) -> None:
    """Draw SSIM and rank correlation with the trained network's map along the cascade, for each variant."""
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    rows = figure.subplots(2, 3, sharex=True, sharey="row")
    references = baselines["patternattribution:linear"]
    for number, (axes_row, measure) in enumerate(zip(rows, ("SSIM", "rank correlation"))):
        for axes, (variant, title) in zip(axes_row, TITLES.items()):
            for method in METHODS:
                if (variant, method) in stages[0].similarity:
                    values = [float(s.similarity[variant, method][number].mean()) for s in stages]
                    axes.plot(range(1, len(stages) + 1), values, **line_style(method))
                    axes.plot([0, 1], [1, values[0]], **{**line_style(method), "label": None})
            levels = {name: float(pair[number].mean()) for name, pair in references.items()}
            for (name, value), position in zip(levels.items(), spread_labels(list(levels.values()), 0.06)):
                axes.axhline(value, color="#999999", lw=0.8, ls=":")
                if variant == REFITTED:
                    axes.text(len(stages) + 0.6, position, name, fontsize=7, color="#777777", va="center")
            axes.grid(alpha=0.2)
            axes.set_xlim(-0.5, len(stages) + 0.5)
            axes.spines[["top", "right"]].set_visible(False)
            if number == 0:
                axes.set_title(title, fontsize=10)
        axes_row[0].set_ylabel(measure)
    for axes in rows[1]:
        axes.set_xticks(range(len(stages) + 1), ["trained", *(s.part for s in stages)], rotation=60, fontsize=8)
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save(path, figure)


def spread_labels(values: list[float], least: float) -> list[float]:
    """Return positions near some values at which labels do not overlap."""
    order = sorted(range(len(values)), key=values.__getitem__)
    positions = list(values)
    for below, above in pairwise(order):
        positions[above] = max(positions[above], positions[below] + least)
    return positions


def draw_maps(path: Path, photograph: Tensor, before: Mapping[str, Tensor], stages: Sequence[Stage]) -> None:
    """Draw the heat of a photograph (3, H, W) by some methods along the cascade; `before` is the heat at its start."""
    titles = ["photograph", "trained", *(s.part for s in stages)]
    figure = Figure(figsize=(1.05 * len(titles) + 1.55, 1.04 * len(SHOWN_ROWS) + 0.25), dpi=90)
    grid = figure.subplots(len(SHOWN_ROWS), len(titles), squeeze=False)
    figure.subplots_adjust(left=0.108, right=0.998, top=0.965, bottom=0.005, wspace=0.03, hspace=0.03)
    low, high = float(photograph.min()), float(photograph.max())
    for line, (variant, method) in zip(grid, SHOWN_ROWS):
        for axes in line:
            axes.axis("off")
        line[0].imshow(((photograph - low) / (high - low)).permute(1, 2, 0).numpy())
        name, _, estimator = method.partition(":")
        label = f"{name}\n{estimator}\n{variant}" if estimator else name
        line[0].text(-0.08, 0.5, label, transform=line[0].transAxes, fontsize=6.5, ha="right", va="center")
        for axes, values in zip(line[1:], [before[method], *(s.heats[variant, method][0] for s in stages)]):
            show_heat(axes, values)
    for axes, title in zip(grid[0], titles):
        axes.set_title(title, fontsize=7, pad=3)
    save(path, figure)


def show_heat(axes: Axes, values: Tensor) -> None:
    """Draw a heat; its brightest percent is saturated."""
    array = values.numpy()
    axes.imshow(array, cmap="inferno", vmin=0, vmax=max(float(np.quantile(array, 0.99)), 1e-12))


def draw_convergence(path: Path, curves: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Draw the cosine of two random output gradients at each operator's input, from the scores to the image."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot([float(values.mean()) for values in curve.values()], **line_style(name))
    operators = list(next(iter(curves.values())))
    ticks = [k for k, name in enumerate(operators) if k in (0, len(operators) - 1) or name.endswith("conv_pwl")]
    axes.set_xticks(ticks, [operators[k] for k in ticks], rotation=60, fontsize=7, ha="right")
    axes.set(ylabel="|cosine| of two random output gradients", ylim=(0, 1.03))
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    save(path, figure)


def draw_shapes(path: Path, rows: Mapping[str, tuple[Tensor, Mapping[str, Tensor]]], mask: Tensor) -> None:
    """Draw one image of each scenario and model, the mask of its class, and the heat (H, W) of each method."""
    methods = list(next(iter(rows.values()))[1])
    titles = [
        "image",
        "mask",
        *(m.replace(":", "\n").replace("gradient-x-", "gradient\n⊙ ").replace("two-", "two-\n") for m in methods),
    ]
    figure = Figure(figsize=(0.95 * len(titles) + 0.9, 1.0 * len(rows) + 0.45), dpi=110)
    grid = figure.subplots(len(rows), len(titles), squeeze=False)
    figure.subplots_adjust(left=0.05, right=0.998, top=0.915, bottom=0.005, wspace=0.06, hspace=0.06)
    for line, (label, (image, heats)) in zip(grid, rows.items()):
        for axes in line:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        largest = float(image.abs().max())
        line[0].imshow(image.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest)
        line[0].set_ylabel(label.replace(", ", "\n"), fontsize=7.5)
        line[1].imshow(mask.numpy(), cmap="gray")
        for axes, heat in zip(line[2:], heats.values()):
            axes.imshow(heat.numpy(), cmap="inferno", vmin=0, vmax=1)
    for axes, title in zip(grid[0], titles):
        axes.set_title(title.replace("patternattribution", "pattern-\nattribution"), fontsize=6.5, pad=3)
    save(path, figure)
