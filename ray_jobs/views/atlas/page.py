"""Write the pages of an atlas. They load nothing else and run only their own script."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from patterns.io import write_atomically
from ray_jobs.models.class_names import load_class_names, map_numbers_to_names
from ray_jobs.runs.run_folder import Run
from ray_jobs.views.atlas.contents import PLOT, Atlas, ClassView
from ray_jobs.views.report.page import HERE as REPORT
from ray_jobs.views.report.page import format_now, make_templates, policy

HERE = Path(__file__).parent
MAX_SECTIONS = 40  # classes on one page; more get a page each
FOLDER = "atlas-classes"  # of the pages of classes


def write_atlas(out: Path, folder: str, classes: str | None = None, max_sections: int = MAX_SECTIONS) -> int:
    """Write the page of an atlas, and if it has many classes, a page for each in a folder next to it.

    Args:
        out: The HTML file to write.
        folder: The folder of the run.
        classes: A file of class names; None for the names of the model's library.
        max_sections: Number of classes up to which all are on one page.

    Returns:
        The number of files written.

    Raises:
        UserError: If the folder holds no finished atlas, or the class names cannot be read.
    """
    run = Run(folder)
    spec = run.require_job("atlas", "Run `patternnet atlas` to the end first.")["model"]["spec"]
    atlas = Atlas(run, map_numbers_to_names(load_class_names(spec, classes)))
    channels = atlas.channels()
    pictures = atlas.read_pictures(atlas.list_shown(channels))
    templates = make_templates(HERE, REPORT)
    style = (REPORT / "report.css").read_text() + (HERE / "atlas.css").read_text()
    script = (REPORT / "theme.js").read_text() + (HERE / "atlas.js").read_text()
    common: dict[str, Any] = {
        "atlas": atlas,
        "style": style,
        "script": script,
        "policy": policy(style, script),
        "written": format_now(),
        "plot": PLOT,
    }
    several = len(atlas.classes) > max_sections
    sections, lines, written = list[ClassView](), list[Mapping[str, Any]](), 1
    for view in atlas.views(pictures):
        number = view.row["class"]
        link = f"{FOLDER}/{number}.html" if several else f"#class-{number}"
        lines.append({"row": view.row, "name": view.name, "accuracy": view.accuracy, "p": view.p, "link": link})
        if several:
            page = templates.get_template("class.html.jinja").render(view=view, index=f"../{out.name}", **common)
            write_page(out.parent / FOLDER / f"{number}.html", page)
            written += 1
        else:
            sections.append(view)
    shown = {name: [(row, [pictures.show(s) for s in row["by_relevance"][:4]]) for row in rows]
             for name, rows in channels.items()}  # fmt: skip
    index = templates.get_template("atlas.html.jinja").render(
        sections=sections,
        lines=lines,
        links={line["row"]["class"]: line["link"] for line in lines},
        channels=shown,
        confusions=atlas.confusions(),
        anomalies=atlas.anomalies(),
        mean_map=atlas.draw_map(atlas.section["mean_map"]),
        **common,
    )
    write_page(out, index)
    return written


def write_page(path: Path, page: str) -> None:
    """Write a page."""
    write_atomically(path, partial(Path.write_text, data=page, encoding="utf-8", errors="backslashreplace"))
