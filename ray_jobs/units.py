"""Parsing and formatting of durations, sizes, versions and names."""

import math
from collections.abc import Mapping
from typing import Literal

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
SIZES = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


def parse_duration(text: str | float) -> float:
    """Return the seconds of a duration such as `90`, `90s`, `15m`, `2h` or `1d`; a number is returned as it is.

    Raises:
        ValueError: If the text is not a finite duration.

    Example:
        >>> parse_duration("15m")
        900.0
    """
    if isinstance(text, float | int):
        return float(text)
    seconds = parse_amount(text, UNITS, "s")
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{text!r} is not a duration; write 90s, 15m or 2h")
    return seconds


def parse_bytes(text: str) -> int:
    """Return the bytes of a size such as `16G`, `512M`, `1.5GiB` or `1000000`.

    Raises:
        ValueError: If the text is not a finite size of at least one byte.

    Example:
        >>> parse_bytes("1.5GiB")
        1610612736
    """
    size = parse_amount(text.upper().removesuffix("B").removesuffix("I"), SIZES, "")
    if not 1 <= size < math.inf:
        raise ValueError(f"{text!r} is not a size; write 512M or 16G")
    return int(size)


def parse_amount(text: str, units: Mapping[str, float], default_unit: str) -> float:
    """Return a number with a unit of one letter in the base unit; NaN if the text is anything else.

    Example:
        >>> parse_amount("2h", {"h": 3600.0, "s": 1.0}, "s"), parse_amount("2x", {"s": 1.0}, "s")
        (7200.0, nan)
    """
    number, unit = (text, default_unit) if text[-1:].isdigit() else (text[:-1], text[-1:])
    try:
        return float(number) * units[unit]
    except (ValueError, KeyError):
        return math.nan


def parse_positions(text: str) -> int | Literal["auto"] | None:
    """Return a number of spatial positions: `16` as a number, `all` as None, `auto` as it is.

    Raises:
        ValueError: If the text is not a number of positions.
    """
    if text == "auto":
        return "auto"
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r} is not a number of positions; write 16, all or auto")
    return int(text)


def format_bytes(size: int) -> str:
    """Format a size in KiB, MiB or GiB."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if abs(size) >= 2**power:
            return f"{size / 2**power:.2f} {unit}"
    return f"{size / 2**10:.2f} KiB"


def format_counts(counts: Mapping[str, int]) -> str:
    """Format numbers of things.

    Example:
        >>> format_counts({"norms": 25, "smooth gates": 12})
        '25 norms, 12 smooth gates'
    """
    return ", ".join(f"{count} {what}" for what, count in counts.items())


def find_version(package: str) -> str:
    """Return the version of an installed package; `not installed` also for a package that runs from its folder."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def format_first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if there is no message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def encode_name(name: str) -> bytes:
    """Return the bytes of a name, in which bytes that are not UTF-8 are surrogate escapes."""
    return name.encode("utf-8", "surrogateescape")


def make_printable(name: str) -> str:
    r"""Return a name with bytes that are not UTF-8 written as \xNN, so that every file can hold it."""
    return encode_name(name).decode("utf-8", "backslashreplace")


def format_duration(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def format_quantity(value: float) -> str:
    """Format a number for an axis: 0.01, 500, 20k, 1.28M.

    Example:
        >>> format_quantity(1_280_000)
        '1.28M'
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def format_number(value: float) -> str:
    """Format a number with three significant digits, without an exponent unless it is tiny.

    Example:
        >>> format_number(1234.6), format_number(0.01234), format_number(0)
        ('1,235', '0.0123', '0')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
