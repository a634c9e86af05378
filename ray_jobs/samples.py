"""A sample: its key and its files, and why it may be refused before anything is decoded."""

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Any

# `__key__`; the bytes of each file by its extension in lower case; `__refused__`, where it must not be used: why.
Sample = dict[str, Any]

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels

IMAGES = ("jpg", "jpeg", "png", "webp")
TENSOR = "npy"
MAX_SAMPLE_BYTES = 1 << 27  # of all files of a sample; a ready tensor of 3×1024×1024 has 12 MB


def seed_of(name: str) -> int:
    """A seed for what is random about a sample, from a name of it alone."""
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogateescape"), digest_size=7).digest())


class SampleError(Exception):
    """A sample that cannot be used; its message says why."""


class ShardError(Exception):
    """A shard that cannot be read as a whole; its message says why."""


def refused(key: str, reason: str) -> Sample:
    """A sample that must not be used."""
    return {"__key__": printable(key), "__refused__": reason}


def printable(name: str) -> str:
    r"""A name with the bytes that are not UTF-8 written as \xNN, so that it can stand in any file."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def unsafe(name: str) -> str | None:
    """Why a file name must not become a key, which outputs are named after; None where it may."""
    if name.startswith("/") or ".." in name.split("/"):
        return "its path leads out of the folder"
    if any(ord(c) < 32 or ord(c) == 127 for c in name):
        return "control characters in its name"
    return None


def distinct(samples: Iterable[Sample]) -> Iterator[Sample]:
    """The same samples, but of those with the same key only the first is used; the next are KEY#2, KEY#3, …"""
    seen: dict[str, int] = {}
    for sample in samples:
        key = sample["__key__"]
        seen[key] = seen.get(key, 0) + 1
        yield sample if seen[key] == 1 else refused(f"{key}#{seen[key]}", "an earlier sample has the same key")
