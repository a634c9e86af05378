"""The figures of docs/linear.md."""

import io
from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks.linear.studies import Panel, Plane, Turning

SIGNAL, PATTERN, WEIGHT, DISTRACTOR = "#7fb8de", "#0b3c6f", "#d1570a", "#5a5a5a"
OUTPUT = LinearSegmentedColormap.from_list("output", ["#7b3294", "#cfcad0", "#1b8a4b"])

mpl.use("agg")
mpl.rcParams.update(
    {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "mathtext.fontset": "cm",
        "legend.frameon": False,
        "figure.dpi": 100,
        "savefig.dpi": 160,
    }
)


def save(figure: Figure, path: Path) -> None:
    """Save as a PNG with at most 256 colors, which is a third of the size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, bbox_inches="tight", pad_inches=0.06, facecolor="white")
    plt.close(figure)
    Image.open(buffer).convert("RGB").quantize(256, kmeans=3, dither=Image.Dither.NONE).save(path, optimize=True)


def arrow(axes: Axes, vector: Tensor, color: str, width: float, head: float, order: int) -> None:
    """Draw an arrow from the origin to the vector."""
    style = {"arrowstyle": f"-|>,head_width={head / 2},head_length={head}", "mutation_scale": 10}
    line = {"color": color, "lw": width, "shrinkA": 0, "shrinkB": 0, "joinstyle": "miter"}
    x1, x2 = vector.flatten()
    axes.annotate("", xy=(float(x1), float(x2)), xytext=(0, 0), arrowprops={**style, **line}, zorder=order)


def draw_planes(planes: dict[str, Plane], path: Path) -> None:
    """Draw Figure 2 of the paper for several distractors: data, distractor, weight and pattern."""
    figure, row = plt.subplots(1, len(planes), figsize=(11, 3.3), sharex=True, sharey=True, layout="constrained")
    for axes, (title, plane) in zip(row, planes.items()):
        x, y = plane.x[:600], plane.y[:600, 0]
        dots = axes.scatter(*x.T, c=y, cmap=OUTPUT, vmin=-1, vmax=1, s=8, alpha=0.5, linewidths=0)
        arrow(axes, plane.model.distractor, DISTRACTOR, 2.0, 0.5, 3)
        arrow(axes, plane.weight, WEIGHT, 2.0, 0.5, 4)
        arrow(axes, plane.model.signal, SIGNAL, 6.0, 0.9, 5)
        arrow(axes, plane.patterns["linear"], PATTERN, 1.6, 0.5, 6)
        axes.set(title=title, xlim=(-2.8, 2.8), ylim=(-2.8, 2.8), aspect="equal", xlabel="$x_1$")
        axes.set_xticks([-2, 0, 2])
        axes.set_yticks([-2, 0, 2])
    row[0].set_ylabel("$x_2$")
    bar = figure.colorbar(dots, ax=row, shrink=0.8, aspect=25, pad=0.01)
    bar.set_label("$y$", rotation=0)
    if bar.solids is not None:
        bar.solids.set_alpha(1)
    bar.set_ticks([-1, 0, 1])
    bar.outline.set_visible(False)
    names = {"signal $a_s$": SIGNAL, "pattern $a$, from the data": PATTERN}
    names |= {"weight $w$, trained": WEIGHT, "distractor $a_d$": DISTRACTOR}
    handles = [Line2D([], [], color=c, lw=6 if c == SIGNAL else 2, label=name) for name, c in names.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    save(figure, path)


def draw_turning(turning: Turning, path: Path) -> None:
    """Draw the directions of weight and pattern against that of the distractor, and the pattern enlarged."""
    figure, (whole, near) = plt.subplots(1, 2, figsize=(8.6, 3.1), layout="constrained", width_ratios=(1, 1))
    whole.axhline(0, color=SIGNAL, lw=6, solid_capstyle="butt")
    whole.plot(turning.angles, turning.weight, "o", color=WEIGHT, ms=3.5)
    whole.plot(turning.angles, turning.pattern, "o", color=PATTERN, ms=3.5)
    whole.plot([0, 180], [-90, 90], color=WEIGHT, lw=0.8, zorder=1)
    whole.text(52, -64, "weight $w$", color=WEIGHT)
    whole.text(12, 14, "pattern $a$", color=PATTERN)
    whole.text(120, -22, "signal $a_s$", color="#3f86b5")
    whole.set(ylim=(-95, 95), yticks=[-90, -45, 0, 45, 90], ylabel="angle to the signal")

    near.axhline(0, color=SIGNAL, lw=6, solid_capstyle="butt")
    near.plot(turning.angles, turning.pattern, "o", color=PATTERN, ms=3.5)
    angles = range(181)
    band = [2 * turning.standard_error(angle) for angle in angles]
    near.fill_between(angles, [-b for b in band], band, color=DISTRACTOR, alpha=0.18, lw=0, zorder=0)
    near.text(90, 1.0, "± 2 standard errors", color=DISTRACTOR, ha="center")
    near.set(ylim=(-1.3, 1.3), yticks=[-1, 0, 1])
    near.set_title("the pattern, enlarged", loc="left")
    whole.set_title("weight and pattern", loc="left")
    for axes in (whole, near):
        axes.set(xlim=(0, 180), xticks=[0, 45, 90, 135, 180], xlabel="angle of the distractor to the signal")
        axes.xaxis.set_major_formatter("{x:.0f}°")
        axes.yaxis.set_major_formatter("{x:.0f}°")
    save(figure, path)


def draw_side_by_side(panel: Panel, path: Path) -> None:
    """Draw a row for each image: its parts and the map of each method, with the cosine to the true signal."""
    parts = {"image $x$": panel.x, "signal $a_s y$": panel.signal, "distractor $A_d\\epsilon$": panel.distractor}
    columns = parts | {name: panel.maps[name] for name in sort_methods(panel.maps)}
    gaps = [1.0] * len(parts) + [0.22] + [1.0] * len(panel.maps)
    rows = len(panel.y)
    figure, grid = plt.subplots(
        rows, len(gaps), figsize=(1.14 * sum(gaps), 1.42 * rows), gridspec_kw={"wspace": 0.07, "hspace": 0.24},
        width_ratios=gaps,
    )  # fmt: skip
    for row in range(rows):
        grid[row, len(parts)].set_visible(False)
        panels = [axes for column, axes in enumerate(grid[row]) if column != len(parts)]
        for axes, (name, images) in zip(panels, columns.items()):
            image = images[row]
            limit = float((panel.x[row] if name in parts else image).abs().max())
            axes.imshow(image.reshape(16, 16), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=True, color="#bbbbbb", linewidth=0.6)
            cosine = float(F.cosine_similarity(image, panel.signal[row], dim=0))
            axes.set_xlabel(f"{cosine:.2f}".replace("-", "−"), fontsize=8.5, labelpad=2.5)
            if row == 0:
                axes.set_title(TITLES.get(name, name), fontsize=8.5, pad=5)
        grid[row, 0].set_ylabel(f"$y = {float(panel.y[row]):+.1f}$", fontsize=9.5)
    save(figure, path)


TITLES = {
    "gradient": "gradient",
    "deconvnet": "DeconvNet",
    "guided-backprop": "Guided\nBackProp",
    "gradient-x-input": "gradient ⊙ x\n(LRP-z)",
    "patternnet": "PatternNet",
    "patternattribution": "Pattern-\nAttribution",
}


def sort_methods(methods: Iterable[str]) -> list[str]:
    """Return the methods in the order of `TITLES`, other methods after them."""
    methods = list(methods)
    return sorted(methods, key=[*TITLES, *methods].index)


def draw_convergence(sizes: list[int], errors: Tensor, path: Path) -> None:
    """Draw the error of the pattern against the number of samples, with the theoretical error."""
    figure, axes = plt.subplots(figsize=(4.6, 3.1), layout="constrained")
    n = [float(size) for size in sizes]
    axes.plot(n, errors[:, :100], "o", color=SIGNAL, ms=3, alpha=0.12, mew=0)
    axes.plot([], [], "o", color=SIGNAL, ms=3, alpha=0.7, mew=0, label="single draws")
    axes.plot(n, [(6 / size) ** 0.5 for size in n], color=WEIGHT, lw=1, label=r"$\sqrt{6/n}$")
    axes.plot(n, errors.square().mean(1).sqrt(), "o", color=PATTERN, ms=4, label="root mean square, measured")
    axes.set(
        xscale="log", yscale="log", ylim=(3e-4, 3), xlabel="samples $n$", ylabel="error of the pattern $|a - a_s|$"
    )
    axes.legend(fontsize=8.5, loc="lower left")
    save(figure, path)
