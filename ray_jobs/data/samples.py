"""A sample: its key and its files, and why it may be rejected before anything is decoded."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from ray_jobs.units import encoded, printable

# `__key__`; the bytes of each file by its extension in lower case; `__refused__`, if it must not be used: why.
Sample = dict[str, Any]

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels

# Extensions of images, in the order of preference if a sample has several: photographs before masks.
IMAGES = ("jpg", "jpeg", "jpe", "jfif", "webp", "png", "apng", "ppm", "pgm", "pbm", "pnm", "bmp", "tif", "tiff")
# Pillow's formats that are decoded only in files of these names; torchvision's ImageFolder takes them too. JPEG, PNG
# and WebP are known by their content. No other of Pillow's decoders is given any bytes.
NAMED_FORMATS = dict.fromkeys(("ppm", "pgm", "pbm", "pnm"), "PPM") | {"bmp": "BMP", "tif": "TIFF", "tiff": "TIFF"}
# Extensions of images that are not decoded. Their files are listed as rejected samples.
UNREAD_IMAGES = (
    *("gif", "avif", "heic", "heif", "jxl", "jp2", "j2k", "jpf", "jpx", "ico", "cur", "tga", "psd", "svg"),
    *("pfm", "pcx", "dib", "exr", "hdr", "dng", "cr2", "cr3", "nef", "arw", "raf", "orf", "rw2"),
)
TENSOR = "npy"
INPUT_NAMES = ("image", "img", "input", "photo", "rgb")  # before the extension: 17.image.jpg
MAX_SAMPLE_BYTES = 1 << 27  # of all files of a sample; a ready tensor of 3×1024×1024 has 12 MB

# What must not stand in a key: the dot, which ends a WebDataset key; the comma of `--keys KEY,KEY`; the percent sign
# of this encoding; backslashes, control characters, line separators and bytes that are not UTF-8; slashes that name no
# folder; space at either end; and `__` at the start, which WebDataset takes for metadata.
UNSAFE = re.compile(r"[%.,\\\x00-\x1f\x7f-\x9f\u2028\u2029\udc80-\udcff]|\A/|(?<=/)/|/\Z|\A\s+|\s+\Z|\A_(?=_)")


def key_of(name: str) -> str:
    """Return a name as a sample's key, which tars, tables, file names and `--keys` can carry.

    Characters that would be misread are percent-encoded, so `urllib.parse.unquote` gives the name again. The slashes
    between folders stay. Different names have different keys.

    Args:
        name: A path in a folder, or the key column of a Parquet file; bytes that are not UTF-8 as surrogate escapes.

    Example:
        >>> key_of("n01440764/img.1.jpg")
        'n01440764/img%2E1%2Ejpg'
    """
    return UNSAFE.sub(lambda match: "".join(f"%{byte:02X}" for byte in encoded(match[0])), name)


def file_in(sample: Sample, extensions: Iterable[str]) -> str | None:
    """The file of a sample that has one of some extensions, or such a name before it as `image`; None without one.

    Of several the first in the order of the extensions; a plain extension comes first.
    """
    names = list(extensions)
    wanted = (*names, *(f"{prefix}.{name}" for prefix in INPUT_NAMES for name in names))
    return next((name for name in wanted if name in sample), None)


def image_in(sample: Sample) -> str | None:
    """The file of a sample that holds its image."""
    return file_in(sample, IMAGES)


def tensor_in(sample: Sample) -> str | None:
    """The file of a sample that holds its ready tensor; None if it has an image, which is used instead."""
    return None if image_in(sample) else file_in(sample, [TENSOR])


def seed_of(name: str) -> int:
    """A seed for what is random about a sample, from a name of it alone."""
    return int.from_bytes(blake2b(encoded(name), digest_size=7).digest())


@dataclass(frozen=True)
class Rejected:
    """A sample that was not used, at which stage (read, decode, model), and why."""

    shard: str
    key: str
    stage: str
    reason: str


class SampleError(Exception):
    """A sample that cannot be used; its message says why."""


class ShardError(Exception):
    """A shard that cannot be read as a whole; its message says why."""


def refused(key: str, reason: str) -> Sample:
    """A sample that must not be used."""
    return {"__key__": printable(key), "__refused__": reason}


def extension_of(name: str) -> str:
    """The last extension of a file's name, in lower case."""
    return name.rpartition(".")[2].lower()


def not_decoded(extension: str) -> str:
    """Why an image of a format that is not decoded is rejected."""
    return f"{extension.upper()} images are not decoded; convert it to PNG or JPEG"


def distinct(samples: Iterable[Sample]) -> Iterator[Sample]:
    """The same samples, but of those with the same key only the first is used; the next are KEY#2, KEY#3, …"""
    seen: dict[str, int] = {}
    for sample in samples:
        key = sample["__key__"]
        seen[key] = seen.get(key, 0) + 1
        yield sample if seen[key] == 1 else refused(f"{key}#{seen[key]}", "an earlier sample has the same key")
