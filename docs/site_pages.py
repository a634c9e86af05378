"""Hooks of mkdocs: pages of the site that lie outside docs/, links to them and to source files, and formulas."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Files outside docs/ that are pages of the site, and the names of these pages.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "cluster/image/README.md": "image.md",
}

# Formulas become text, because a library that draws them would be loaded from the network.
SYMBOLS = {"epsilon": "ε", "mu": "μ", "sigma": "σ", "odot": "⊙", "cdot": "·", "sim": "~", "quad": " ", "qquad": " "}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside docs/."""
    for source, name in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Make links valid in the site: to a page by its name in the site, to any other file of the repository as its path.

    Args:
        markdown: The text of a page; links are relative to the folder of its file.
        page: The page of mkdocs.
        config: The configuration of mkdocs.
        files: All files of the site.

    Raises:
        FileNotFoundError: If a link leads to a file that does not exist.
    """
    sources = {name: source for source, name in PAGES.items()}
    folder = (ROOT / sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent

    def replace(match: re.Match[str]) -> str:
        text, link, anchor = match.groups("")
        target = (folder / link).resolve(strict=True)
        if target.is_relative_to(ROOT / "docs"):
            return f"[{text}]({target.relative_to(ROOT / 'docs')}{anchor})"
        path = str(target.relative_to(ROOT))
        return f"[{text}]({PAGES[path]}{anchor})" if path in PAGES else f"{text} (`{path}`)"

    prose_and_code = re.split(r"(```.*?```|`[^`]*`)", markdown, flags=re.DOTALL)
    markdown = "".join(part if part.startswith("`") else format_formulas(part) for part in prose_and_code)
    return re.sub(r"(?<!!)\[([^\]]*)\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)", replace, markdown)


def format_formulas(text: str) -> str:
    """Convert the TeX formulas of a text, such as `$a_s$`, to HTML."""

    def convert(match: re.Match[str]) -> str:
        formula = re.sub(r"\\([a-z]+)", lambda command: SYMBOLS[command[1]], match[1])
        formula = re.sub(r"_(\w)", r"<sub>\1</sub>", formula)
        return "<em>" + re.sub(r"\^(\w)", r"<sup>\1</sup>", formula) + "</em>"

    return re.sub(r"\${1,2}([^$]+)\${1,2}", convert, text)
