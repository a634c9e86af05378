"""How sure the patterns were from look to look: its table, and its picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from patterns.estimation import ConvergenceCheck, Solution
from patterns.io import write_table
from ray_jobs.figures.drawing import save_figure

# A row for each look, operator (in the model's order) and row of ESTIMATORS that looks at data.
# samples: images by then.  median, p90: relative standard errors that half, and nine in ten, of the operator's
# neurons stay below; null while there are too few parts.  change: the median neuron's since the look before.
SCHEMA = pa.schema(
    [
        ("samples", pa.int64()),
        ("operator", pa.string()),
        ("estimator", pa.string()),
        ("median", pa.float64()),
        ("p90", pa.float64()),
        ("change", pa.float64()),
    ]
)


FARTHEST = 100  # times the images so far that the picture looks ahead


def rows_of(samples: int, operator: str, look: ConvergenceCheck, before: Solution | None) -> pa.Table:
    """The rows of one operator's look after so many images; before: the solution of the look before."""
    changes = look.changes(before) if before else {}
    rows = [
        {
            "samples": samples,
            "operator": operator,
            "estimator": row,
            "median": error and error.median,
            "p90": error and error.p90,
            "change": changes.get(row),
        }
        for row, error in look.errors.items()
    ]
    return pa.Table.from_pylist(rows, SCHEMA)


def append(path: Path, rows: Sequence[pa.Table]) -> pa.Table:
    """Add a look's rows to the table in a file, in place of the same operators' after as many images; gives all."""
    look = pa.concat_tables(rows) if rows else SCHEMA.empty_table()
    if path.exists():
        earlier = pq.read_table(path, schema=SCHEMA)
        again = pc.and_(*(pc.is_in(earlier[name], look[name]) for name in ("samples", "operator")))
        look = pa.concat_tables([earlier.filter(pc.invert(again)), look])
    write_table(path, SCHEMA, [look])
    return look


def latest(table: pa.Table) -> pa.Table:
    """The rows of the last look."""
    return table.filter(pc.equal(table["samples"], pc.max(table["samples"])))


def draw_convergence(path: Path, table: pa.Table, tolerance: float | None = None) -> None:
    """Draw the p90 of every operator against images, estimators side by side, and the tolerance if there is one.

    Lines run from the first operator (dark) to the last (bright). The thick one is the worst at each look; it goes
    on as 1/√n, dotted, until it meets the tolerance. Looks that know nothing yet are left out.
    """
    from matplotlib.figure import Figure

    operators = table["operator"].unique().to_pylist()
    known = table.filter(pc.is_valid(table["p90"]))
    estimators = known["estimator"].unique().to_pylist()
    figure = Figure(figsize=(1.6 + 3.2 * max(1, len(estimators)), 3.6), dpi=130, layout="constrained")
    axes = figure.subplots(1, max(1, len(estimators)), sharex=True, sharey=True, squeeze=False)[0]
    colours = matplotlib.colormaps["viridis"]
    depth = {operator: i / max(1, len(operators) - 1) for i, operator in enumerate(operators)}
    for axis, estimator in zip(axes, estimators):
        mine = known.filter(pc.equal(known["estimator"], estimator)).sort_by("samples")
        for operator in operators:
            line = mine.filter(pc.equal(mine["operator"], operator))
            axis.plot(line["samples"], line["p90"], color=colours(depth[operator]), linewidth=0.8, marker=".", ms=2)
        worst = mine.group_by("samples").aggregate([("p90", "max")]).sort_by("samples")
        draw_worst(axis, worst["samples"].to_numpy(), worst["p90_max"].to_numpy(), tolerance)
        last = max(latest(mine).to_pylist(), key=lambda row: row["p90"])
        axis.annotate(last["operator"], (last["samples"], last["p90"]), (3, 3), textcoords="offset points", fontsize=6)
        axis.set_title(estimator, fontsize=9)
    for axis in axes:
        axis.set(xscale="log", yscale="log")
        axis.set_xlabel("images", fontsize=8)
        axis.xaxis.set_major_formatter(plain)
        axis.yaxis.set_major_formatter(plain)
        axis.tick_params(labelsize=7)
        axis.tick_params(which="minor", labelsize=0)
        axis.grid(which="major", linewidth=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("standard error / pattern,\nnine in ten neurons below", fontsize=8)
    if estimators:
        axes[0].legend(fontsize=7, frameon=False, loc="upper right")
        bar = figure.colorbar(
            matplotlib.cm.ScalarMappable(cmap=colours), ax=list(axes), ticks=[0, 1], pad=0.01, aspect=40
        )
        bar.ax.set_yticklabels([operators[0], operators[-1]], fontsize=6)
        bar.outline.set_visible(False)
    else:
        axes[0].text(0.5, 0.5, "too few parts yet", transform=axes[0].transAxes, ha="center", fontsize=8)
    save_figure(path, figure)


def draw_worst(axis: Any, samples: np.ndarray, p90: np.ndarray, tolerance: float | None) -> None:
    """The worst operator's line, the tolerance, and between them the 1/√n by which they meet."""
    axis.plot(samples, p90, color="black", linewidth=2, label="worst operator")
    end = samples[-1] * 2.0
    if tolerance is not None:
        axis.axhline(tolerance, color="tab:red", linewidth=1, label=f"tolerance {tolerance:g}")
        end = max(end, samples[-1] * min(FARTHEST, (p90[-1] / tolerance) ** 2))
    onward = np.array([samples[-1], end])
    axis.plot(onward, p90[-1] * np.sqrt(samples[-1] / onward), ":", color="black", linewidth=1.2, label="1/√n")


def plain(value: float, _: int) -> str:
    """A number on an axis: 0.01, 500, 20k, 1.28M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
