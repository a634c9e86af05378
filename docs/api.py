"""Write api.md, the docstrings of the public names of `patterns`: `python docs/api.py`."""

import inspect
import re
from pathlib import Path

import patterns

PAGE = Path(__file__).parent / "api.md"


def documented(name: str) -> str:
    """Return the section of a public name."""
    value = getattr(patterns, name)
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return f"## `{name}`\n\nBy name: {', '.join(f'`{key}`' for key in value)}.\n"
    shown = f"{name}{signature(value)}"
    text = f"## `{name}`\n\n```\n{shown}\n```\n\n{inspect.cleandoc(value.__doc__ or '')}\n"
    if inspect.isclass(value):
        for key, member in vars(value).items():
            plain = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            wanted = not key.startswith("_") or key == "__call__"
            if wanted and inspect.isfunction(plain) and plain.__doc__:
                text += (
                    f"\n### `{name}.{key}`\n\n```\n{key}{signature(plain)}\n```\n\n{inspect.cleandoc(plain.__doc__)}\n"
                )
    return text


def signature(value: object) -> str:
    """Return the signature of a function or class, without the names of packages."""
    found = str(inspect.signature(value))  # type: ignore[arg-type]
    for package in ("torch.nn.modules.module.", "torch.", "collections.abc.", "patterns."):
        found = found.replace(package, "")
    return re.sub(r"<function (\S+) at \w+>", r"\1", found)


def page() -> str:
    """Return the whole page."""
    intro = (
        f"# API\n\nWritten by `python docs/api.py` from the docstrings. {inspect.cleandoc(patterns.__doc__ or '')}\n"
    )
    return "\n".join([intro, *map(documented, patterns.__all__)])


if __name__ == "__main__":
    PAGE.write_text(page())
