"""WebDataset shards: from a spec to a list of shards, and from a shard to a stream of decoded batches."""

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from braceexpand import braceexpand
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as T
from webdataset.tariterators import group_by_keys, tar_file_expander

from patterns import UserError
from ray_jobs.config import Preprocessing
from ray_jobs.ledger import Refused

IMAGES = ("jpg", "jpeg", "png", "webp")
Sample = dict[str, Any]


class SampleError(Exception):
    """A sample that cannot be used; its message says why."""


@dataclass(frozen=True)
class Batch:
    """images: (N, C, H, W) in the model's dtype, on the CPU. labels: None where a sample has none."""

    images: Tensor
    keys: list[str]
    labels: list[int | None]


def list_shards(specs: Iterable[str]) -> tuple[str, ...]:
    """The shards of some specs (paths or URLs, with brace ranges and globs), in order.

    Local paths become absolute, since workers run elsewhere. UserError where there is none, where one
    is missing or empty, or where one is named twice.
    """
    shards: list[str] = []
    for spec in specs:
        for pattern in braceexpand(spec):
            shards += expand(pattern)
    if not shards:
        raise UserError("--shards", "no shards were named", "Name at least one tar file.")
    if len(set(shards)) < len(shards):
        repeated = next(s for s in shards if shards.count(s) > 1)
        raise UserError(f"--shards {repeated}", "named twice", "Name each shard once.")
    return tuple(shards)


def expand(pattern: str) -> list[str]:
    if "://" in pattern:
        if not any(c in pattern for c in "*?["):
            return [pattern]  # its absence shows when it is read
        filesystem, path = fsspec.core.url_to_fs(pattern)
        found = [filesystem.unstrip_protocol(p) for p in sorted(filesystem.glob(path))]
    else:
        path = Path(pattern).absolute()
        wild = any(c in pattern for c in "*?[")
        found = sorted(map(str, Path(path.anchor).glob(str(path.relative_to(path.anchor))))) if wild else [str(path)]
        for name in found:
            if not Path(name).is_file():
                raise UserError(name, "no such shard", "Check --shards; brace ranges are {000..015}.")
            if Path(name).stat().st_size == 0:
                raise UserError(name, "not a tar archive (it is empty)", "Delete or replace it.")
    if not found:
        raise UserError(f"--shards {pattern}", "nothing matches", "Check the path.")
    return found


class Tail(io.RawIOBase):
    """A stream that remembers the last bytes read, to see whether a tar came to its proper end."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.last = stream, b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data: bytes = self.stream.read(size)
        if data:
            self.last = (self.last + data[-512:])[-512:]
        return data


def read_shard(shard: str) -> Iterator[Sample]:
    """The samples of a shard as they stand: `__key__`, and bytes by extension.

    Raises UserError where the shard cannot be read to its end-of-archive mark, or holds no sample.
    """
    samples = 0
    try:
        with fsspec.open(shard, "rb", compression="infer") as stream:
            tail = Tail(stream)
            members = tar_file_expander([{"stream": tail, "url": shard}], handler=reraise)
            for sample in group_by_keys(members, handler=reraise):
                samples += 1
                yield sample
            while tail.read(1 << 20):
                pass
    except GeneratorExit:
        raise
    except Exception as error:  # what tarfile, fsspec's file systems and webdataset raise has no common base
        raise UserError(shard, f"cannot be read ({error})", "Replace it, or leave it out of --shards.") from error
    if not samples:
        raise UserError(shard, "a tar archive without a sample", "Replace it, or leave it out of --shards.")
    if tail.last.strip(b"\0"):
        raise UserError(shard, "the tar ends without its end-of-archive mark: it was cut short", "Replace it.")


def reraise(error: Exception) -> bool:
    raise error


def decode(sample: Sample, preprocessing: Preprocessing) -> Tensor:
    """A sample's input, float32 of shape (C, H, W). SampleError where it cannot be used."""
    try:
        if "npy" in sample:
            return ready_tensor(sample["npy"], preprocessing)
        for extension in IMAGES:
            if extension in sample:
                return image_tensor(sample[extension], preprocessing)
    except SampleError:
        raise
    except Exception as error:  # untrusted bytes make Pillow and numpy raise anything
        raise SampleError(f"{type(error).__name__}: {error}") from error
    found = ", ".join(sorted(k for k in sample if not k.startswith("__"))) or "nothing"
    raise SampleError(f"neither an image ({', '.join(IMAGES)}) nor a tensor (npy); it has {found}")


def ready_tensor(data: bytes, preprocessing: Preprocessing) -> Tensor:
    array = np.load(io.BytesIO(data), allow_pickle=False)
    if array.shape != preprocessing.input_shape:
        raise SampleError(f"a tensor of shape {array.shape}, the model takes {preprocessing.input_shape}")
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if not tensor.isfinite().all():
        raise SampleError("a tensor that is not finite")
    return tensor


def image_tensor(data: bytes, preprocessing: Preprocessing) -> Tensor:
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB" if len(preprocessing.mean) == 3 else "L")
    pixels = T.pil_to_tensor(cropped(image, preprocessing)).float() / 255
    return T.normalize(pixels, list(preprocessing.mean), list(preprocessing.std))


def cropped(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """The part of an image that the model sees, at the model's resolution."""
    interpolation = InterpolationMode(preprocessing.interpolation)
    image = T.resize(image, [preprocessing.resize], interpolation)
    return T.center_crop(image, [preprocessing.image_size, preprocessing.image_size])


def label_of(sample: Sample) -> int | None:
    """The class of a sample's `cls`; None without one. SampleError where it is no number."""
    if "cls" not in sample:
        return None
    try:
        return int(sample["cls"])
    except ValueError as error:
        raise SampleError(f"cls is no class number: {sample['cls'][:20]!r}") from error


@dataclass
class ShardReader:
    """Streams a shard's samples as batches; samples that cannot be used are put into `refused`.

    only: the keys to take; None: all.  skip: keys to leave out, without a word.
    check: raises SampleError for further samples that the job cannot use, given the label.
    """

    shard: str
    preprocessing: Preprocessing
    batch_size: int
    dtype: torch.dtype = torch.float32
    max_samples: int | None = None
    check: Callable[[int | None], None] = lambda _: None
    only: frozenset[str] | None = None
    skip: frozenset[str] = frozenset()
    refused: list[Refused] = field(default_factory=list)

    def __iter__(self) -> Iterator[Batch]:
        taken: list[tuple[str, Tensor, int | None]] = []
        for number, sample in enumerate(read_shard(self.shard)):
            if number == self.max_samples:
                break
            key = sample["__key__"]
            if key in self.skip or (self.only is not None and key not in self.only):
                continue
            try:
                label = label_of(sample)
                self.check(label)
                taken.append((sample["__key__"], decode(sample, self.preprocessing), label))
            except SampleError as error:
                self.refused.append(Refused(self.shard, sample["__key__"], "decode", str(error)))
            if len(taken) == self.batch_size:
                yield self.batch(taken)
                taken = []
        if taken:
            yield self.batch(taken)

    def batch(self, taken: list[tuple[str, Tensor, int | None]]) -> Batch:
        keys, images, labels = zip(*taken)
        return Batch(torch.stack(images).to(self.dtype), list(keys), list(labels))
