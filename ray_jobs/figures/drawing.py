"""Pictures of explanations, as the paper draws them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pyarrow as pa

from patterns.attribution import BASELINES, Shown
from patterns.io import write_atomically


def draw_grid(path: Path, rows: Sequence[Shown], columns: int = 2, scale: float = 1.3) -> None:
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


def draw_sample(path: Path, sample: Shown, columns: int = 3) -> None:
    """Draw one photograph and its explanations, as large as fits a screen."""
    from matplotlib.figure import Figure

    images = {sample.caption: sample.photograph, **sample.maps}
    columns = min(columns, len(images))
    lines = -(-len(images) // columns)
    figure = Figure(figsize=(4 * columns, 4.3 * lines), dpi=110, layout="tight")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis in axes:
        axis.axis("off")
    for axis, (title, image) in zip(figure.axes, images.items()):
        axis.imshow(image)
        axis.set_title(title, fontsize=11)
    save_figure(path, figure)


def draw_estimators(path: Path, sample: Shown, signals: Sequence[str], attributions: Sequence[str]) -> None:
    """Draw one photograph by every estimator as the paper's Figure 5: signals above attributions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.9 * (1 + len(signals)), 4.2), dpi=130, layout="constrained")
    axes = figure.subplots(2, 1 + len(signals), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    axes[0][0].imshow(sample.photograph)
    axes[0][0].set_title(sample.caption, fontsize=8)
    for line, methods in zip(axes, (signals, attributions)):
        for axis, method in zip(line[1:], methods):
            axis.imshow(sample.maps[method])
            axis.set_title(method.replace(":", "\n"), fontsize=8)
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


def draw_degradation(path: Path, curves: pa.Table) -> None:
    """Draw the paper's Figure 4: each method's mean curve and its confidence band.

    curves: of degradation-curves.parquet.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.5), dpi=130, layout="constrained")
    axis = figure.subplots()
    for number, method in enumerate(curves["method"].unique().to_pylist()):
        own = curves.filter(pa.compute.equal(curves["method"], method)).to_pydict()
        baseline = method in BASELINES
        colour = "0.45" if baseline else matplotlib.colormaps["tab10"](number % 10)
        style = ("--", ":", "-.")[BASELINES.index(method)] if baseline else "-"
        axis.plot(own["step"], own["mean"], style, color=colour, label=method, linewidth=1.4)
        axis.fill_between(own["step"], own["low"], own["high"], color=colour, alpha=0.1, linewidth=0)
    axis.set_xlabel("patches replaced")
    axis.set_ylabel("probability of the first prediction")
    axis.set_xlim(0, max(curves["step"].to_pylist()))
    axis.set_ylim(bottom=0)
    axis.grid(linewidth=0.3)
    axis.legend(fontsize=7, frameon=False)
    save_figure(path, figure)


def save_figure(path: Path, figure: Any) -> None:
    """Write a figure of matplotlib's, its kind by the file's name."""
    with matplotlib.rc_context({"savefig.facecolor": "white"}):
        write_atomically(path, lambda aside: figure.savefig(aside, format=path.suffix[1:]))
