"""Write the report: one HTML file that loads nothing else and runs only its own script."""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from patterns.io import write_atomically
from ray_jobs.views.report.contents import FLAGS, Contents, read_contents

HERE = Path(__file__).parent
SCRIPTS = ("theme.js", "report.js")


def write_report(
    out: Path,
    runs: Sequence[str],
    count: int = 200,
    classes: str | None = None,
    seed: int = 0,
    price: str | None = None,
) -> list[Contents]:
    """Write a page about one or more runs.

    Args:
        out: The HTML file to write.
        runs: The folders of the runs.
        count: Maximum number of samples to show of each run.
        classes: A file of class names; None for the names of the model's library.
        seed: Seed of the random choice of samples.
        price: Price of the workers; None: what each job was given.

    Returns:
        The contents of the page, one item for each run.

    Raises:
        UserError: If a folder does not hold a run, or the class names cannot be read.
    """
    pages = [read_contents(run, number, count, classes, seed, len(runs), price) for number, run in enumerate(runs)]
    page = render(pages)
    write_atomically(out, lambda aside: aside.write_text(page, encoding="utf-8", errors="backslashreplace"))
    return pages


def render(runs: Sequence[Contents]) -> str:
    """Return the page. Templates escape everything that comes from a run."""
    templates = make_templates(HERE)
    style, script = (HERE / "report.css").read_text(), "".join((HERE / name).read_text() for name in SCRIPTS)
    return templates.get_template("report.html.jinja").render(
        runs=runs,
        compared=[(name, rows) for name, rows in compare(runs) if rows],
        flags=FLAGS,
        style=style,
        script=script,
        policy=policy(style, script),
        written=format_now(),
    )


def make_templates(*folders: Path) -> Environment:
    """Return the templates of some folders, which escape all values."""
    templates = Environment(
        loader=FileSystemLoader(folders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(thousands="{:,}".format)
    return templates


def format_now() -> str:
    """Return the date and time (UTC)."""
    return datetime.now(UTC).isoformat(" ", timespec="minutes").removesuffix("+00:00")


def policy(style: str, script: str) -> str:
    """Return a Content-Security-Policy that allows this style, this script and embedded images only."""
    allowed = {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": f"'{fingerprint(style)}'",
        "script-src": f"'{fingerprint(script)}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{directive} {sources}" for directive, sources in allowed.items())


def fingerprint(text: str) -> str:
    """Return the hash by which a Content-Security-Policy names a text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def compare(runs: Sequence[Contents]) -> Iterator[tuple[str, list[tuple[str, list[str | None]]]]]:
    """Yield each group of compared values: rows by name with one value per run, None if a run lacks the value."""
    groups = [run.compared for run in runs]
    for group in groups[0]:
        columns = [each[group] for each in groups]
        names = dict.fromkeys(name for column in columns for name in column)
        yield group, [(name, [column.get(name) for column in columns]) for name in names]
