"""The figure of docs/xai-tris.md."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

TITLES = {
    "gradient-x-input": "gradient\n⊙ input", "integrated-gradients": "integrated\ngradients",
    "guided-backprop": "guided\nbackprop", "patternattribution": "pattern-\nattribution",
    "patternnet": "pattern-\nnet",
}  # fmt: skip


def title(method: str) -> str:
    """Return the title of a method's column."""
    name, _, preset = method.partition(":")
    return f"{TITLES.get(name, name)}\n{preset}".strip()


def draw_maps(path: Path, rows: Mapping[str, tuple[Tensor, Tensor, Mapping[str, Tensor]]]) -> None:
    """Draw an image of each scenario with its ground truth and its maps, all of shape (SIDE, SIDE).

    Args:
        path: The file.
        rows: The image, the mask, and the relevance without sign by method, by the row's label.
    """
    methods = list(next(iter(rows.values()))[2])
    figure = Figure(figsize=(0.95 * (len(methods) + 1) + 1.05, 0.97 * len(rows) + 0.6), dpi=110)
    grid = figure.subplots(len(rows), len(methods) + 1, squeeze=False)
    figure.subplots_adjust(left=0.085, right=0.998, top=0.94, bottom=0.005, wspace=0.06, hspace=0.06)
    for line, (label, (image, mask, heats)) in zip(grid, rows.items()):
        for axes in line:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        largest = float(image.abs().max())
        line[0].imshow(image.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest)
        line[0].set_ylabel(label.replace("-", "-\n"), fontsize=7, rotation=0, ha="right", va="center")
        for axes, heat in zip(line[1:], heats.values()):
            axes.imshow(heat.numpy(), cmap="inferno", vmin=0)
        for axes in line:
            axes.contour(mask.numpy().repeat(16, 0).repeat(16, 1), [0.5], colors="#21d07a", linewidths=0.9,
                         extent=(-0.5, 7.5, -0.5, 7.5))  # fmt: skip
    for axes, name in zip(grid[0], ["image", *map(title, methods)]):
        axes.set_title(name, fontsize=6.5, pad=3)
    figure.savefig(path, facecolor="white")
