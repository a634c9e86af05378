"""MNIST and Fashion-MNIST as their authors publish them, and shards of their images."""

import gzip
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from webdataset import TarWriter

from patterns import UserError
from patterns.io import write_atomically

NAMES: dict[str, tuple[str, ...]] = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": (
        "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    ),
}  # fmt: skip
PER_SHARD, SHARDS = 2500, 8
# An idx file (LeCun, Cortes & Burges 1998): two zeros, 8 for unsigned bytes, the number of dimensions, each dimension
# as big-endian int32, then the values.
UNSIGNED_BYTES = 8


def read_idx(path: Path) -> np.ndarray:
    """Return the values of an idx file of unsigned bytes, plain or gzipped.

    Raises:
        UserError: If the file cannot be read, or has another format.
    """
    remedy = "Choose a folder with the four idx files as their authors publish them, plain or gzipped."
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError) as error:
        raise UserError(str(path), f"cannot be read ({error})", remedy) from error
    shape = tuple(np.frombuffer(data, ">i4", data[3] if len(data) > 3 else 0, 4)) if len(data) >= 16 else ()
    if data[:3] != bytes((0, 0, UNSIGNED_BYTES)) or len(data) != 4 + 4 * len(shape) + int(np.prod(shape, dtype=int)):
        raise UserError(str(path), "not a complete idx file of bytes", remedy)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def read_digits(folder: Path, part: str, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 (N, 28, 28) and labels (N,).

    Args:
        folder: The folder of the idx files.
        part: `train` or `t10k`.
        limit: The number of images at most, from the start; None: all.

    Raises:
        UserError: If the folder does not hold them.
    """
    found = []
    for kind in ("images-idx3", "labels-idx1"):
        names = [f"{part}-{kind}-ubyte", f"{part}-{kind}-ubyte.gz"]
        path = next((folder / name for name in names if (folder / name).exists()), None)
        if path is None:
            what = f"holds neither {' nor '.join(names)}"
            raise UserError(str(folder), what, "Choose the folder with the four idx files.", "data")
        found.append(read_idx(path)[:limit])
    images, labels = found
    if len(images) != len(labels) or images.ndim != 3 or labels.ndim != 1:
        what = f"{part} has images of shape {images.shape} and labels of shape {labels.shape}"
        raise UserError(str(folder), what, "Use the files of one data set.")
    return images, labels


def to_inputs(images: np.ndarray) -> Tensor:
    """Return gray images uint8 (N, H, W) as inputs of the small networks, float32 (N, 1, H, W) in [-1, 1]."""
    return torch.from_numpy(images.copy())[:, None].float().div_(127.5).sub_(1)


def write_digits(images: np.ndarray, labels: Sequence[int] | np.ndarray, out: Path, name: str) -> list[Path]:
    """Write images as shards of PNGs, in order.

    Args:
        images: Gray images, uint8 (N, H, W).
        labels: Their labels.
        out: The folder to write to.
        name: The beginning of each file's name and key.

    Returns:
        The paths of the shards, at least SHARDS of them.
    """
    paths = []
    size = min(PER_SHARD, -(-len(images) // SHARDS))
    for number, first in enumerate(range(0, len(images), size)):
        paths.append(out / f"{name}-{number:03d}.tar")

        def write(temporary: Path, first: int = first) -> None:
            with open(temporary, "wb") as file:
                tar = TarWriter(file, encoder=False, mtime=0)
                for key in range(first, min(first + size, len(images))):
                    buffer = io.BytesIO()
                    Image.fromarray(images[key]).save(buffer, "png")
                    tar.write({"__key__": f"{name}-{key:05d}", "png": buffer.getvalue(), "cls": b"%d" % labels[key]})
                tar.close()

        write_atomically(paths[-1], write)
    return paths
