"""Write api.md, the docstrings of the public names of `patterns`: `python docs/api.py`."""

import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import patterns

PAGE = Path(__file__).parent / "api.md"
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example")
INTRO = "# API\n\n`python docs/api.py` writes this page from the docstrings.\n\n"


def document_name(name: str) -> str:
    """Return the section of a public name."""
    value = getattr(patterns, name)
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        keys = ", ".join(f"`{key}`" for key in value)
        return f"## `{name}`\n\n{wrap(f'A table with the keys {keys}.')}\n"
    text = f"## `{name}`\n\n{format_signature(name, value)}\n\n{format_docstring(value.__doc__)}\n"
    for key, member in vars(value).items() if inspect.isclass(value) else ():
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if (key.startswith("_") and key != "__call__") or not getattr(function, "__doc__", None):
            continue
        if isinstance(member, property):
            text += f"\n### `{name}.{key}`\n\n{format_docstring(member.__doc__)}\n"
        elif inspect.isfunction(function):
            title = f"\n### `{name}.{key}`\n\n{format_signature(key, function)}\n\n"
            text += f"{title}{format_docstring(function.__doc__)}\n"
    return text


def format_signature(name: str, value: object) -> str:
    """Return a signature as a code block, with one parameter per line if it is long; without the names of modules."""
    signature = inspect.signature(value)  # type: ignore[arg-type]
    shown = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    parameters = [re.sub(r"<function (\S+) at \w+>", r"\1", str(parameter)) for parameter in shown]
    has_result = signature.return_annotation not in (inspect.Signature.empty, None)
    result = str(signature).rpartition(" -> ")[2].strip("'") if has_result else ""
    line = f"({', '.join(parameters)})"
    if len(name) + len(line) + len(result) > 100:
        line = "(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + ")"
    line += f" -> {result}" if result else ""
    without_modules = re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z])", "", line)
    return f"```\n{name}{without_modules}\n```"


def format_docstring(docstring: str | None) -> str:
    """Return a docstring in Google style as Markdown."""
    blocks = []
    for section, body in split_sections(inspect.cleandoc(docstring or "")):
        if section == "Example":
            blocks.append(f"```pycon\n{body}\n```")
        elif section in ("Args", "Attributes", "Raises"):
            entries = re.findall(r"^(\S[^:]*): (.*(?:\n .*)*)", body, re.M)
            items = [wrap(f"- `{entry}`: {text}", "  ") for entry, text in entries]
            blocks.append("\n".join([f"**{section}**\n", *items]))
        elif section:
            blocks.append(wrap(f"**{section}**: {body}"))
        else:
            blocks.append(body)
    return "\n\n".join(blocks)


def wrap(text: str, indent: str = "") -> str:
    """Wrap a paragraph; all lines after the first are indented."""
    return textwrap.fill(" ".join(text.split()), 120, subsequent_indent=indent, break_on_hyphens=False)


def split_sections(text: str) -> Iterator[tuple[str, str]]:
    """Yield the sections of a docstring: name and body; the name of text outside of sections is empty."""
    for block in re.split(rf"\n\n(?=(?:{'|'.join(SECTIONS)}):\n)", text):
        section, _, body = block.partition(":\n")
        if section not in SECTIONS:
            yield "", block
            continue
        inside = re.match(r"(?:(?: .*)?\n?)*", body)
        end = inside.end() if inside else len(body)
        yield section, inspect.cleandoc("\n" + body[:end])
        if body[end:]:
            yield "", body[end:]


def page() -> str:
    """Return the whole page."""
    return "\n".join([f"{INTRO}{format_docstring(patterns.__doc__)}\n", *map(document_name, patterns.__all__)])


if __name__ == "__main__":
    PAGE.write_text(page())
