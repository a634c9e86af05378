"""Results of benchmarks: JSON files in docs/results/, and the same tables between markers in the pages of docs/.

A page includes the table of docs/results/NAME.json between two comments, `<!-- results:NAME begin -->` and
`<!-- results:NAME end -->`. The prose around them is written by hand.
"""

import argparse
import inspect
import json
import math
import re
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
Cell = str | float | Sequence[float]


@dataclass(frozen=True)
class Table:
    """A table of numbers and text.

    Attributes:
        columns: The titles, each with the format of its numbers, such as `{:.2f}` or `{:.2f} ± {:.2f}`.
        rows: The cells: text, which is shown as it is, a number, or several numbers.

    Example:
        >>> print(Table({"method": "", "error": "{:.2f} ± {:.2f}"}, [["linear", [0.5, 0.125]]]).render())
        | method | error |
        | --- | --- |
        | linear | 0.50 ± 0.12 |
    """

    columns: Mapping[str, str]
    rows: Sequence[Sequence[Cell]]

    def render(self) -> str:
        """Return the table as Markdown."""
        lines = [[*self.columns], ["---"] * len(self.columns)]
        lines += [[format_cell(cell, form) for cell, form in zip(row, self.columns.values())] for row in self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_cell(cell: Cell, form: str) -> str:
    """Return a cell as text; numbers are formatted by the format of their column."""
    if isinstance(cell, str):
        return cell
    return form.format(*cell) if isinstance(cell, Sequence) else form.format(cell)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of some values and its standard error, which is NaN for a single value."""
    variance = statistics.variance(values) if len(values) > 1 else math.nan
    return statistics.fmean(values), math.sqrt(variance / len(values))


def save_results(docs: Path, name: str, table: Table | None = None, **values: object) -> None:
    """Write a result to results/NAME.json in the folder of the docs, and its table to the pages that include it.

    Args:
        docs: The folder of the docs.
        name: The name of the result.
        table: Its table.
        values: Single numbers, which the prose of a page may quote.
    """
    path = docs / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = {} if table is None else {"columns": dict(table.columns), "rows": table.rows}
    lines = json.dumps(contents | ({"values": values} if values else {}), ensure_ascii=False, indent=1)
    path.write_text(re.sub(r"\n {3,}(?! *[{}])|\n +(?=\])", " ", lines) + "\n")  # one row per line
    if table is not None:
        include(docs, f"results:{name}", table.render())


def load_table(docs: Path, name: str) -> Table | None:
    """Return the table of a result; None if it consists of single numbers only."""
    contents = json.loads((docs / "results" / f"{name}.json").read_text())
    return Table(contents["columns"], contents["rows"]) if "columns" in contents else None


def include(docs: Path, marker: str, block: str) -> None:
    """Replace the text between the comments of a marker in all pages of the docs."""
    begin, end = f"<!-- {marker} begin -->", f"<!-- {marker} end -->"
    for page in sorted(docs.glob("*.md")):
        text = page.read_text()
        if begin in text:
            before, _, rest = text.partition(begin)
            _, _, after = rest.partition(end)
            page.write_text(f"{before}{begin}\n\n{block}\n\n{end}{after}")


def included(text: str) -> dict[str, str]:
    """Return the blocks of a page by marker."""
    found = re.findall(r"<!-- (\S+) begin -->\n\n(.*?)\n\n<!-- (\S+) end -->", text, re.S)
    assert all(begin == end for begin, _, end in found)
    return {marker: block for marker, block, _ in found}


def source_code(function: Callable[..., object] | type) -> str:
    """Return the source of a function or class as a block of Markdown."""
    return f"```python\n{textwrap.dedent(inspect.getsource(function)).rstrip()}\n```"


def make_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser that all benchmarks share: `--write DOCS`."""
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=description)
    parser.add_argument("--write", type=Path, metavar="DOCS", help="write results and figures to this docs folder")
    return parser
