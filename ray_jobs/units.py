"""Durations, sizes and versions as people write them."""

from importlib.metadata import PackageNotFoundError, version
from typing import Literal

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_duration(text: str | float) -> float:
    """Seconds of `90`, `90s`, `15m`, `2h` or `1d`. ValueError for anything else."""
    if isinstance(text, float | int):
        return float(text)
    number, unit = (text, "s") if text[-1:].isdigit() else (text[:-1], text[-1:])
    if unit not in UNITS or not float(number) >= 0:
        raise ValueError(f"{text!r} is no duration; write 90s, 15m or 2h")
    return float(number) * UNITS[unit]


def parse_bytes(text: str) -> int:
    """Bytes of `16G`, `512M`, `1.5GiB` or `1000000`. ValueError for anything else."""
    plain = text.upper().removesuffix("B").removesuffix("I")
    number, unit = (plain, "") if plain[-1:].isdigit() else (plain[:-1], plain[-1:])
    if unit not in POWERS or not float(number) > 0:
        raise ValueError(f"{text!r} is no size; write 512M or 16G")
    return int(float(number) * 1024 ** POWERS[unit])


def parse_positions(text: str) -> int | Literal["auto"] | None:
    """Positions of `16`; None of `all`; `auto` as it stands. ValueError for anything else."""
    if text == "auto":
        return "auto"
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r} is no number of positions; write 16, all or auto")
    return int(text)


def format_bytes(size: int) -> str:
    """A size in KiB, MiB or GiB."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if abs(size) >= 2**power:
            return f"{size / 2**power:.2f} {unit}"
    return f"{size / 2**10:.2f} KiB"


def find_version(package: str) -> str:
    """The version of a package; of one that runs from a folder as it is, as a job's working directory, that."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def format_first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def encode_name(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def make_printable(name: str) -> str:
    r"""A name with the bytes that are not UTF-8 written as \xNN, so that it can stand in any file."""
    return encode_name(name).decode("utf-8", "backslashreplace")


def format_duration(seconds: float) -> str:
    """A duration as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
