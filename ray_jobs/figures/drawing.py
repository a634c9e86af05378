"""Figures of explanations, pattern quality and image degradation, in the style of the paper."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pyarrow as pa

from patterns.attribution import BASELINES, RenderedExplanation
from patterns.io import write_atomically


def draw_grid(path: Path, rows: Sequence[RenderedExplanation], columns: int = 2, scale: float = 1.3) -> None:
    """Draw photographs and their maps, one photograph per row.

    Args:
        path: The file to write, PNG or SVG by its suffix.
        rows: The photographs with their maps; all have the same methods.
        columns: Number of blocks of rows side by side.
        scale: Width and height of one picture in inches.
    """
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


def draw_sample(path: Path, sample: RenderedExplanation, columns: int = 3) -> None:
    """Draw one photograph and its maps, as large as fits a screen.

    Args:
        path: The file to write, PNG or SVG by its suffix.
        sample: The photograph with its maps.
        columns: Maximum number of pictures per row.
    """
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


def draw_estimators(
    path: Path, sample: RenderedExplanation, signals: Sequence[str], attributions: Sequence[str]
) -> None:
    """Draw the maps of one photograph for every estimator, like Figure 5 of the paper.

    Args:
        path: The file to write, PNG or SVG by its suffix.
        sample: The photograph with its maps.
        signals: Methods of the upper row.
        attributions: Methods of the lower row.
    """
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
    """Draw ρ by operator and estimator as box plots over neurons, like Figure 3 of the paper.

    A box spans the 25th to 75th percentile of an operator's neurons, and the whiskers the 5th to 95th.

    Args:
        path: The file to write, PNG or SVG by its suffix.
        table: Rows of quality.parquet.
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
        color = matplotlib.colormaps["tab10"](number % 10)
        measured = [i for i, operator in enumerate(operators) if (operator, estimator) in rho]
        axis.boxplot(
            [rho[operators[i], estimator] for i in measured],
            positions=[i + (number - (len(estimators) - 1) / 2) * width for i in measured],
            widths=0.8 * width, whis=(5, 95), showfliers=False, patch_artist=True,
            boxprops={"facecolor": color, "linewidth": 0.5}, medianprops={"color": "black", "linewidth": 0.8},
            whiskerprops={"linewidth": 0.5}, capprops={"linewidth": 0.5}, manage_ticks=False,
        )  # fmt: skip
        axis.bar(0, 0, color=color, label=estimator)
    axis.set_xticks(range(len(operators)), operators, rotation=90, fontsize=6)
    axis.set_xlim(-0.6, len(operators) - 0.4)
    axis.set_ylim(bottom=min(0.0, *(min(values) for values in rho.values())))
    axis.set_ylabel("ρ = 1 − max corr(y, vᵀd)")
    axis.grid(axis="y", linewidth=0.3)
    figure.legend(loc="upper center", ncols=len(estimators), fontsize=7, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    save_figure(path, figure)


def draw_degradation(path: Path, curves: pa.Table) -> None:
    """Draw each method's mean degradation curve with its confidence band, like Figure 4 of the paper.

    Args:
        path: The file to write, PNG or SVG by its suffix.
        curves: Rows of degradation-curves.parquet.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.5), dpi=130, layout="constrained")
    axis = figure.subplots()
    for number, method in enumerate(curves["method"].unique().to_pylist()):
        own = curves.filter(pa.compute.equal(curves["method"], method)).to_pydict()
        baseline = method in BASELINES
        color = "0.45" if baseline else matplotlib.colormaps["tab10"](number % 10)
        style = ("--", ":", "-.")[BASELINES.index(method)] if baseline else "-"
        axis.plot(own["step"], own["mean"], style, color=color, label=method, linewidth=1.4)
        axis.fill_between(own["step"], own["low"], own["high"], color=color, alpha=0.1, linewidth=0)
    axis.set_xlabel("patches replaced")
    axis.set_ylabel("probability of the first prediction")
    axis.set_xlim(0, max(curves["step"].to_pylist()))
    axis.set_ylim(bottom=0)
    axis.grid(linewidth=0.3)
    axis.legend(fontsize=7, frameon=False)
    save_figure(path, figure)


def draw_evaluation(path: Path, summary: pa.Table, titles: Mapping[str, tuple[str, bool]]) -> None:
    """Draw each measure as a panel with a bar for each method, the best on top, and standard errors.

    Args:
        path: The file to write, PNG or SVG by its suffix.
        summary: Rows of evaluation-summary.parquet.
        titles: The title of each measure, and whether a higher value is better.
    """
    from matplotlib.figure import Figure

    measures = summary["measure"].unique().to_pylist()
    methods = summary["method"].unique().to_pylist()
    columns = min(3, max(1, len(measures)))
    rows = -(-len(measures) // columns)
    size = (4.6 * columns, (0.9 + 0.22 * len(methods)) * rows)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, measure in zip(axes, measures):
        title, higher_is_better = titles[measure]
        own = summary.filter(pa.compute.equal(summary["measure"], measure)).to_pylist()
        own.sort(key=lambda row: row["mean"], reverse=not higher_is_better)
        colors = ["0.65" if row["method"] in BASELINES else method_color(row["method"]) for row in own]
        errors = [row["error"] or 0.0 for row in own]
        axis.barh([row["method"] for row in own], [row["mean"] for row in own], xerr=errors, color=colors, height=0.7)
        axis.set_title(f"{title} ({'higher' if higher_is_better else 'lower'} is better)", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(axis="x", linewidth=0.3)
        axis.set_axisbelow(True)
    for axis in axes[len(measures) :]:
        axis.set_axis_off()
    save_figure(path, figure)


def method_color(method: str) -> str:
    """Return the color of a method: one for PatternNet, one for PatternAttribution, one for all others."""
    return {"patternnet": "tab:green", "patternattribution": "tab:orange"}.get(method.partition(":")[0], "tab:blue")


def save_figure(path: Path, figure: Any) -> None:
    """Write a matplotlib figure in the format of the file's suffix."""
    with matplotlib.rc_context({"savefig.facecolor": "white"}):
        write_atomically(path, lambda aside: figure.savefig(aside, format=path.suffix[1:]))
