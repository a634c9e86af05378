"""Read the results of the evaluate job for the report's template."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from patterns.attribution import BASELINES


@dataclass(frozen=True)
class Column:
    """A measure.

    Attributes:
        name: Its name, as in the option `--measures`.
        title: Its title.
        higher_is_better: Whether a higher value is better.
    """

    name: str
    title: str
    higher_is_better: bool


@dataclass(frozen=True)
class Cell:
    """The mean of a measure over the samples.

    Attributes:
        mean: The mean.
        error: Its standard error; None if there is one sample.
        samples: The number of samples.
    """

    mean: float
    error: float | None
    samples: int


@dataclass(frozen=True)
class Row:
    """A row of the table: the values of one method.

    Attributes:
        method: The name of the method.
        cells: The value of each column; None if it was not measured.
        time: The time of a map, in units of the time of a gradient; None if it was not measured.
    """

    method: str
    cells: list[Cell | None]
    time: float | None


@dataclass(frozen=True)
class Evaluation:
    """Methods compared by several measures.

    Attributes:
        columns: The measures.
        methods: The methods, in the order of the job's options.
        baselines: The methods that ignore the model.
        not_measured: Why a measure is missing, by its title.
    """

    columns: list[Column]
    methods: list[Row]
    baselines: list[Row]
    not_measured: dict[str, str]

    @property
    def compared(self) -> dict[str, str]:
        """The means as text, by measure and method."""
        return {
            f"{column.name}: {row.method}": f"{cell.mean:.3f}"
            for number, column in enumerate(self.columns)
            for row in (*self.methods, *self.baselines)
            if (cell := row.cells[number]) is not None
        }


def read_evaluation(table: pa.Table | None, section: Mapping[str, Any]) -> Evaluation | None:
    """Return the results of the evaluate job; None if there are none.

    Args:
        table: The rows of evaluation-summary.parquet.
        section: The job's section of the manifest.
    """
    if table is None:
        return None
    found = table.to_pylist()
    described, times = section["measures"], section.get("times", {})
    columns = [Column(name, **described[name]) for name in dict.fromkeys(row["measure"] for row in found)]
    cells = {(row["method"], row["measure"]): Cell(row["mean"], row["error"], row["samples"]) for row in found}
    names = dict.fromkeys((*times, *(row["method"] for row in found)))
    rows = [Row(name, [cells.get((name, column.name)) for column in columns], times.get(name)) for name in names]
    return Evaluation(
        columns,
        [row for row in rows if row.method not in BASELINES],
        [row for row in rows if row.method in BASELINES],
        {described[name]["title"]: reason for name, reason in section["not_measured"].items()},
    )
