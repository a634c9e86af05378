"""Parsers of options of the form NAME=VALUE and of names of functions."""

from pathlib import Path


def parse_setting(text: str) -> tuple[str, float]:
    """Parse NAME=NUMBER. ValueError for anything else."""
    name, _, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a setting; write METHOD.SETTING=NUMBER") from error


def parse_input(text: str) -> tuple[str, str]:
    """Parse NAME=VALUE. ValueError for anything else."""
    name, equals, value = text.partition("=")
    name, value = name.strip(), value.strip()
    if not equals or not name.isidentifier() or not value:
        raise ValueError(f"{text!r} is not an input; write NAME=VALUE")
    return name, str(Path(value).expanduser().absolute()) if value.endswith(".npy") and ":" not in value else value


def parse_function(text: str) -> str:
    """Parse `module:function` or `file.py:function`, whose path becomes absolute. ValueError for anything else."""
    place, colon, name = text.rpartition(":")
    if not colon or not name.isidentifier() or not place:
        raise ValueError(f"{text!r} names no function; write module:function or file.py:function")
    return f"{Path(place).expanduser().absolute()}:{name}" if place.endswith(".py") else text
