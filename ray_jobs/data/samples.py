"""Samples: their keys and files, and rejection before anything is decoded."""

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from patterns import UserError
from ray_jobs.units import encode_name, make_printable

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels

# Extensions of images, the preferred ones first: formats of photographs before formats of masks.
IMAGES = ("jpg", "jpeg", "jpe", "jfif", "webp", "png", "apng", "ppm", "pgm", "pbm", "pnm", "bmp", "tif", "tiff")
# Formats that Pillow decodes only in files with these extensions, which torchvision's ImageFolder takes too. JPEG, PNG
# and WebP are recognized by their content. No other decoder of Pillow receives any bytes.
NAMED_FORMATS = dict.fromkeys(("ppm", "pgm", "pbm", "pnm"), "PPM") | {"bmp": "BMP", "tif": "TIFF", "tiff": "TIFF"}
# Extensions of images that are not decoded. Their files are listed as rejected samples.
UNREAD_IMAGES = (
    *("gif", "avif", "heic", "heif", "jxl", "jp2", "j2k", "jpf", "jpx", "ico", "cur", "tga", "psd", "svg"),
    *("pfm", "pcx", "dib", "exr", "hdr", "dng", "cr2", "cr3", "nef", "arw", "raf", "orf", "rw2"),
)
TENSOR = "npy"
KEY, REJECTION = "__key__", "__rejection__"  # of a sample in a `webdataset.DataPipeline`
REPLACE = "Replace it, or leave it out of the shards."  # the remedy for a shard that cannot be read
INPUT_NAMES = ("image", "img", "input", "photo", "rgb")  # may stand before the extension: 17.image.jpg
# Names of a sample's file, the preferred ones first: plain extensions in their order, then those with a name before.
IMAGE_NAMES = (*IMAGES, *(f"{name}.{extension}" for name in INPUT_NAMES for extension in IMAGES))
TENSOR_NAMES = (TENSOR, *(f"{name}.{TENSOR}" for name in INPUT_NAMES))
MAX_SAMPLE_BYTES = 1 << 27  # of all files of a sample; a ready tensor of 3×1024×1024 has 12 MB

# Characters that a key cannot have: the dot, which ends a WebDataset key; the comma of `--keys KEY,KEY`; the percent
# sign of this encoding; backslashes, control characters, line separators and bytes that are not UTF-8; leading,
# trailing and double slashes; space at either end; and `__` at the start, which WebDataset takes for metadata.
UNSAFE = re.compile(r"[%.,\\\x00-\x1f\x7f-\x9f\u2028\u2029\udc80-\udcff]|\A/|(?<=/)/|/\Z|\A\s+|\s+\Z|\A_(?=_)")


def make_key(name: str) -> str:
    """Return the key of a sample with a given name; tars, tables, file names and `--keys` can hold it.

    Characters that would be misread are percent-encoded, so that `urllib.parse.unquote` restores the name. The slashes
    between folders stay. Different names have different keys.

    Args:
        name: A path in a folder, or a value of the key column of a Parquet file. Bytes that are not UTF-8 are
            surrogate escapes.

    Example:
        >>> make_key("n01440764/img.1.jpg")
        'n01440764/img%2E1%2Ejpg'
    """
    return UNSAFE.sub(lambda match: "".join(f"%{byte:02X}" for byte in encode_name(match[0])), name)


@dataclass(frozen=True)
class Sample:
    """A sample as its shard holds it.

    Attributes:
        key: The key, unique within the shard.
        files: The bytes of each file by its extension in lower case.
        rejection: Why the sample must not be used; None if it may be.
        reference: The URL or path of its image, which is not fetched yet; None if there is none.
    """

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    rejection: str | None = None
    reference: str | None = None

    @classmethod
    def of(cls, sample: Mapping[str, Any]) -> "Sample":
        """Return a sample of a `webdataset.DataPipeline`."""
        files = {name: data for name, data in sample.items() if not name.startswith("__")}
        return cls(sample[KEY], files, sample.get(REJECTION))


def reject(key: str, reason: str) -> Sample:
    """Return a sample without files that must not be used."""
    return Sample(make_printable(key), rejection=reason)


def find_image(files: Container[str]) -> str | None:
    """Return the name of the file that holds the image of a sample; None if there is no image."""
    return next((name for name in IMAGE_NAMES if name in files), None)


def find_tensor(files: Container[str]) -> str | None:
    """Return the name of the file that holds the ready tensor of a sample; None if an image is used instead."""
    return None if find_image(files) else next((name for name in TENSOR_NAMES if name in files), None)


def derive_seed(name: str) -> int:
    """Return a seed for the random choices about a sample.

    Args:
        name: A name of the sample, the only input of the seed.

    Returns:
        A number of 56 bits.
    """
    return int.from_bytes(blake2b(encode_name(name), digest_size=7).digest())


@dataclass(frozen=True)
class RejectedSample:
    """A sample that was not used.

    Attributes:
        shard: The shard.
        key: The sample's key.
        stage: Where it was rejected: read, decode or model.
        reason: Why.
    """

    shard: str
    key: str
    stage: str
    reason: str


class SampleError(Exception):
    """Reason why a sample cannot be used."""


class ShardError(Exception):
    """Reason why a shard cannot be read completely."""


def extension_of(name: str) -> str:
    """Return the last extension of a file name, in lower case."""
    return name.rpartition(".")[2].lower()


def explain_unread_format(extension: str) -> str:
    """Return the reason for rejecting an image in a format that is not decoded."""
    return f"{extension.upper()} images are not decoded; convert it to PNG or JPEG"


def reject_duplicates(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Yield the samples; those whose key an earlier sample has are rejected as KEY#2, KEY#3 and so on."""
    seen: dict[str, int] = {}
    for sample in samples:
        key = sample.key
        seen[key] = seen.get(key, 0) + 1
        yield sample if seen[key] == 1 else reject(f"{key}#{seen[key]}", "an earlier sample has the same key")


def zip_explanations(
    inputs: Iterable[Mapping[str, Any]], explanations: Iterable[Mapping[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Yield each explained sample of a shard with its explanation; rejected inputs have none and are left out.

    Args:
        inputs: The samples of a shard as WebDataset reads them, in order.
        explanations: The samples of the shard of its explanations, in the same form and order.

    Raises:
        UserError: If an explanation has no input.

    Example:
        >>> inputs = [{"__key__": "a"}, {"__key__": "b"}]
        >>> [sample["__key__"] for sample, _ in zip_explanations(inputs, [{"__key__": "b", "gradient.npy": b""}])]
        ['b']
    """
    remaining = iter(explanations)
    explained = next(remaining, None)
    for sample in inputs:
        if explained is None:
            return
        if sample["__key__"] == explained["__key__"]:
            yield sample, explained
            explained = next(remaining, None)
    if explained is not None:
        remedy = "Zip a shard with its own explanations, in order."
        raise UserError(explained["__key__"], "this explanation has no input", remedy)
