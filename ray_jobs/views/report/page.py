"""Contents → one file of HTML that asks for nothing else, and runs no script but its own."""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from patterns.io import write_atomically
from ray_jobs.views.report.contents import FLAGS, Contents, contents

HERE = Path(__file__).parent


def write_report(
    out: Path, runs: Sequence[str], count: int = 200, classes: str | None = None, seed: int = 0
) -> list[Contents]:
    """Write a page about some runs, with so many samples of each at most; gives what it says of each.

    classes: a file of the classes' names, else as the model's library has them.
    UserError where a folder is none of a run, or the classes cannot be read.
    """
    told = [contents(run, number, count, classes, seed, len(runs)) for number, run in enumerate(runs)]
    page = rendered(told)
    write_atomically(out, lambda aside: aside.write_text(page, encoding="utf-8", errors="backslashreplace"))
    return told


def rendered(runs: Sequence[Contents]) -> str:
    """The page. All that comes from a run is escaped by the templates; only our own style and script are not."""
    templates = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(thousands="{:,}".format)
    style, script = ((HERE / f"report.{kind}").read_text() for kind in ("css", "js"))
    return templates.get_template("report.html.jinja").render(
        runs=runs,
        compared=[(name, rows) for name, rows in compared(runs) if rows],
        flags=FLAGS,
        style=style,
        script=script,
        policy=policy(style, script),
        written=datetime.now(UTC).isoformat(" ", timespec="minutes").removesuffix("+00:00"),
    )


def policy(style: str, script: str) -> str:
    """The Content-Security-Policy under which this style and this script are all that counts."""
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
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def compared(runs: Sequence[Contents]) -> Iterator[tuple[str, list[tuple[str, list[str | None]]]]]:
    """What is set side by side, group by group: rows by name over all runs, None where a run lacks one."""
    groups = [run.compared for run in runs]
    for group in groups[0]:
        columns = [each[group] for each in groups]
        names = dict.fromkeys(name for column in columns for name in column)
        yield group, [(name, [column.get(name) for column in columns]) for name in names]
