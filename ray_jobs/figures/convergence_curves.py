"""The standard errors of a fit's patterns at each convergence check: their table and their figure."""

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
from ray_jobs.units import format_quantity

# One row for each convergence check, operator (in the model's order) and estimator that depends on data.
# samples: number of images so far.  median, p90: the 50th and 90th percentile over the operator's neurons of the
# relative standard error; null if there are too few partial moments.  change: the median relative change since the
# previous check.
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


EXTRAPOLATION = 100  # the figure extrapolates to at most this multiple of the images so far


def check_rows(samples: int, operator: str, check: ConvergenceCheck, previous: Solution | None) -> pa.Table:
    """Return the rows of one operator's convergence check.

    Args:
        samples: Number of images so far.
        operator: Name of the operator.
        check: The result of the check.
        previous: The patterns at the previous check; None at the first one.
    """
    changes = check.changes(previous) if previous else {}
    rows = [
        {
            "samples": samples,
            "operator": operator,
            "estimator": row,
            "median": error and error.median,
            "p90": error and error.p90,
            "change": changes.get(row),
        }
        for row, error in check.errors.items()
    ]
    return pa.Table.from_pylist(rows, SCHEMA)


def append_rows(path: Path, rows: Sequence[pa.Table]) -> pa.Table:
    """Add the rows of a check to the table in a file.

    Rows that the file already has for the same operators and number of images are replaced, so a resumed fit can
    repeat its last check.

    Returns:
        All rows.
    """
    table = pa.concat_tables(rows) if rows else SCHEMA.empty_table()
    if path.exists():
        earlier = pq.read_table(path, schema=SCHEMA)
        repeated = pc.and_(*(pc.is_in(earlier[name], table[name]) for name in ("samples", "operator")))
        table = pa.concat_tables([earlier.filter(pc.invert(repeated)), table])
    write_table(path, SCHEMA, [table])
    return table


def last_check(table: pa.Table) -> pa.Table:
    """Return the rows of the last check."""
    return table.filter(pc.equal(table["samples"], pc.max(table["samples"])))


def draw_convergence(path: Path, table: pa.Table, tolerance: float | None = None) -> None:
    """Draw the 90th percentile of the standard error of every operator against the number of images.

    There is one panel for each estimator. Colors run from the first operator (dark) to the last (bright). The thick
    line is the maximum over the operators; a dotted line extrapolates it by 1/√n until it meets the tolerance. Checks
    without standard errors are left out.

    Args:
        path: The file to write, PNG or SVG by its suffix.
        table: Rows of convergence.parquet.
        tolerance: The standard error at which the fit stops; None if it has none.
    """
    from matplotlib.figure import Figure

    operators = table["operator"].unique().to_pylist()
    known = table.filter(pc.is_valid(table["p90"]))
    estimators = known["estimator"].unique().to_pylist()
    figure = Figure(figsize=(1.6 + 3.2 * max(1, len(estimators)), 3.6), dpi=130, layout="constrained")
    axes = figure.subplots(1, max(1, len(estimators)), sharex=True, sharey=True, squeeze=False)[0]
    colors = matplotlib.colormaps["viridis"]
    depth = {operator: i / max(1, len(operators) - 1) for i, operator in enumerate(operators)}
    for axis, estimator in zip(axes, estimators):
        mine = known.filter(pc.equal(known["estimator"], estimator)).sort_by("samples")
        for operator in operators:
            line = mine.filter(pc.equal(mine["operator"], operator))
            axis.plot(line["samples"], line["p90"], color=colors(depth[operator]), linewidth=0.8, marker=".", ms=2)
        worst = mine.group_by("samples").aggregate([("p90", "max")]).sort_by("samples")
        draw_worst(axis, worst["samples"].to_numpy(), worst["p90_max"].to_numpy(), tolerance)
        last = max(last_check(mine).to_pylist(), key=lambda row: row["p90"])
        axis.annotate(last["operator"], (last["samples"], last["p90"]), (3, 3), textcoords="offset points", fontsize=6)
        axis.set_title(estimator, fontsize=9)
    for axis in axes:
        axis.set(xscale="log", yscale="log")
        axis.set_xlabel("images", fontsize=8)
        axis.xaxis.set_major_formatter(lambda value, _: format_quantity(value))
        axis.yaxis.set_major_formatter(lambda value, _: format_quantity(value))
        axis.tick_params(labelsize=7)
        axis.tick_params(which="minor", labelsize=0)
        axis.grid(which="major", linewidth=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("standard error / pattern,\n90th percentile of neurons", fontsize=8)
    if estimators:
        axes[0].legend(fontsize=7, frameon=False, loc="upper right")
        bar = figure.colorbar(
            matplotlib.cm.ScalarMappable(cmap=colors), ax=list(axes), ticks=[0, 1], pad=0.01, aspect=40
        )
        bar.ax.set_yticklabels([operators[0], operators[-1]], fontsize=6)
        bar.outline.set_visible(False)
    else:
        axes[0].text(0.5, 0.5, "too few partial moments", transform=axes[0].transAxes, ha="center", fontsize=8)
    save_figure(path, figure)


def draw_worst(axis: Any, samples: np.ndarray, p90: np.ndarray, tolerance: float | None) -> None:
    """Draw the worst operator's line, the tolerance, and the extrapolation by 1/√n to where they meet."""
    axis.plot(samples, p90, color="black", linewidth=2, label="worst operator")
    end = samples[-1] * 2.0
    if tolerance is not None:
        axis.axhline(tolerance, color="tab:red", linewidth=1, label=f"tolerance {tolerance:g}")
        end = max(end, samples[-1] * min(EXTRAPOLATION, (p90[-1] / tolerance) ** 2))
    ahead = np.array([samples[-1], end])
    axis.plot(ahead, p90[-1] * np.sqrt(samples[-1] / ahead), ":", color="black", linewidth=1.2, label="1/√n")
