"""Read a shard as a stream of decoded batches, and list the samples that cannot be used."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import webdataset
from torch import Tensor
from webdataset import DataPipeline, SimpleShardList, batched

from patterns import UserError
from ray_jobs.config import Preprocessing
from ray_jobs.data import image_folders, parquet_reader
from ray_jobs.data.annotations import parse_boxes, parse_label, parse_mask
from ray_jobs.data.byte_streams import open_seekable
from ray_jobs.data.decoders import Decode, make_decode
from ray_jobs.data.image_decoding import decode_input, normalize_batch
from ray_jobs.data.references import fetch_references, split_shard
from ray_jobs.data.samples import REPLACE, Box, RejectedSample, Sample, SampleError, reject, reject_duplicates
from ray_jobs.data.tar_reader import verified_tar
from ray_jobs.io.file_systems import translate_errors
from ray_jobs.io.process_pool import ProcessPool

PART_SAMPLES, PART_BYTES = 8, 1 << 22  # that a process decodes at once: a few hundredths of a second


@dataclass(frozen=True)
class Batch:
    """Decoded samples.

    Attributes:
        images: The model's input, (N, C, H, W), in its dtype, on the CPU.
        keys: The keys of the samples.
        labels: The label of each sample; None if it has no label.
        boxes: The boxes of each sample in pixels of the model's input; None if it has no boxes, or the config does not
            ask for boxes.
        masks: The mask of each sample, see `parse_mask`; None if it has no mask, or the config does not ask for masks.
    """

    images: Tensor
    keys: list[str]
    labels: list[int | None]
    boxes: list[list[Box] | None]
    masks: list[Tensor | None]


class Decoded(NamedTuple):
    """A decoded sample.

    Attributes:
        key: The key.
        image: The input (C, H, W), uint8 for an image and float32 otherwise.
        label: See `Batch`.
        boxes: See `Batch`.
        mask: See `Batch`.
    """

    key: str
    image: np.ndarray
    label: int | None
    boxes: list[Box] | None
    mask: np.ndarray | None


class Rejection(NamedTuple):
    """A sample that cannot be used; see `RejectedSample`."""

    key: str
    stage: str
    reason: str


def read_shard(shard: str) -> Generator[Sample, None, None]:
    """Yield the samples of a shard in order, in bounded memory; samples that cannot be used have a `rejection`.

    Images that the shard names by URLs or paths are fetched ahead.

    Args:
        shard: The shard. All keys that are yielded are different.

    Raises:
        UserError: If the shard is incomplete, damaged or empty; another attempt may succeed.
    """
    return fetch_references(list_samples(shard), split_shard(shard)[1])


def list_samples(shard: str) -> Generator[Sample, None, None]:
    """Yield the samples of a shard like `read_shard`, but do not fetch the images that they name."""
    with translate_errors(shard, remedy=REPLACE):
        empty = True
        for sample in DataPipeline(SimpleShardList([shard]), read_raw_samples, reject_duplicates):
            empty = False
            yield sample
    if empty:
        raise UserError(shard, f"a {find_format(shard).name} without a sample", REPLACE)


def read_raw_samples(sources: Iterable[Mapping[str, str]]) -> Iterator[Sample]:
    """Yield the samples of the shards that each `url` names; several samples may have the same key."""
    for source in sources:
        yield from find_format(source["url"]).read(source["url"])


def read_folder(shard: str) -> Iterator[Sample]:
    """Yield the samples of a shard of a folder of images."""
    match = image_folders.SHARD.fullmatch(shard)
    assert match is not None
    return image_folders.read_samples(match)


def read_parquet(shard: str) -> Iterator[Sample]:
    """Yield the rows of a Parquet file as samples."""
    path, column = split_shard(shard)
    with open_seekable(path) as file:
        yield from parquet_reader.read_samples(file, column.name if column else None)


def read_tar(shard: str) -> Iterator[Sample]:
    """Yield the samples of a tar archive."""
    return map(Sample.of, verified_tar([{"url": shard}]))


@dataclass(frozen=True)
class ShardFormat:
    """A row of `SHARD_FORMATS`.

    Attributes:
        name: The name of the format in messages.
        matches: Returns whether a shard has the format, by the shard's name.
        read: Yields the samples of a shard in bounded memory, and raises ShardError if the shard is not complete.
    """

    name: str
    matches: Callable[[str], bool]
    read: Callable[[str], Iterator[Sample]]


# The first row that matches is the format of a shard.
SHARD_FORMATS = (
    ShardFormat("folder of images", lambda shard: image_folders.SHARD.fullmatch(shard) is not None, read_folder),
    ShardFormat("Parquet file", parquet_reader.is_parquet, read_parquet),
    ShardFormat("tar archive", lambda shard: True, read_tar),
)


def find_format(shard: str) -> ShardFormat:
    """Return the format of a shard, by the shard's name."""
    return next(row for row in SHARD_FORMATS if row.matches(shard))


@dataclass(frozen=True)
class ReaderConfig:
    """Settings with which a worker reads its shards.

    Attributes:
        preprocessing: From an image to the model's input.
        batch_size: The number of samples of a batch; the last batch of a shard may have fewer.
        dtype: The dtype of the model's input.
        classes: The number of classes, of which the label of each sample must be one. None: samples need no label.
        with_regions: Whether the boxes and masks of samples are read.
        needed_region: "mask" or "box" if samples without one cannot be used; None if neither is needed.
        decoder: The user's decoder, which makes the input; see `load_decoder`. None: images and ready tensors are read.
        pool: The processes that decode. None: the reading thread decodes.
    """

    preprocessing: Preprocessing
    batch_size: int
    dtype: torch.dtype = torch.float32
    classes: int | None = None
    with_regions: bool = False
    needed_region: str | None = None
    decoder: str | None = None
    pool: ProcessPool | None = None

    @cached_property
    def apply_decoder(self) -> Decode | None:
        """The user's decoder as a function; None if there is none."""
        return make_decode(self.decoder, self.preprocessing)

    def decode_all(self, samples: Iterable[Sample]) -> Iterator[Decoded | Rejection]:
        """Yield the results of `decode`, in order."""
        if self.pool is None:
            return map(self.decode, samples)
        plain = replace(self, pool=None)  # which can be sent to a process
        return chain.from_iterable(self.pool.map(plain.decode, reject_lost, split_samples(samples)))

    def decode(self, sample: Sample) -> Decoded | Rejection:
        """Return the input, label and regions of a sample, or why it is rejected."""
        if reason := sample.rejection:
            return Rejection(sample.key, "read", reason)
        try:
            label = parse_label(sample.files)
            if self.classes is not None and (label is None or label >= self.classes):
                raise SampleError(f"the label {label} is none of the model's {self.classes} classes")
            boxes, mask = self.parse_regions(sample)
            own = self.apply_decoder
            image = decode_input(sample.files, self.preprocessing) if own is None else own(sample)
            return Decoded(sample.key, image.numpy(), label, boxes, None if mask is None else mask.numpy())
        except SampleError as error:
            return Rejection(sample.key, "decode", str(error))

    def parse_regions(self, sample: Sample) -> tuple[list[Box] | None, Tensor | None]:
        """Return the boxes and the mask of a sample, if the job reads them. Raise SampleError if it cannot use them."""
        if not self.with_regions:
            return None, None
        boxes = parse_boxes(sample.files, self.preprocessing)
        try:
            mask = parse_mask(sample.files, self.preprocessing)
        except SampleError:
            if self.needed_region == "mask":
                raise
            mask = None
        if (self.needed_region, boxes) == ("box", None) or (self.needed_region == "mask" and mask is None):
            files = "boxes in its json" if self.needed_region == "box" else "mask.png or seg.png"
            raise SampleError(f"the target needs a {self.needed_region}, and the sample has no {files}")
        return boxes, mask


def split_samples(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    """Yield the samples in the parts that are sent to a process: several, or one with large files."""
    part, room = list[Sample](), PART_BYTES
    for sample in samples:
        part.append(sample)
        room -= sum(map(len, sample.files.values()))
        if len(part) == PART_SAMPLES or room <= 0:
            yield part
            part, room = [], PART_BYTES
    if part:
        yield part


def reject_lost(sample: Sample, reason: str) -> Rejection:
    """Return the rejection of a sample that kills or stops the process that decodes it."""
    return Rejection(sample.key, "decode", f"it cannot be decoded: {reason}")


@dataclass(frozen=True)
class ShardTask:
    """The samples of one shard that a worker reads.

    Attributes:
        shard: The shard.
        max_samples: The number of samples at most that are read from the start of the shard, usable or not.
            None: all.
        only: Of the samples that are read, only those with these keys are used. None: all.
        skip: Samples with these keys are not used.
    """

    shard: str
    max_samples: int | None = None
    only: frozenset[str] | None = None
    skip: frozenset[str] = frozenset()

    def uses(self, key: str) -> bool:
        """Return whether a sample with this key is used."""
        return key not in self.skip and (self.only is None or key in self.only)


def equal_share(total: int | None, item: int, items: int) -> int | None:
    """Return how many of `total` samples item number `item` of `items` contributes: equal shares in any order of work.

    None if there is no total.

    Example:
        >>> [equal_share(7, item, 3) for item in range(3)]
        [3, 2, 2]
    """
    if total is None:
        return None
    return total // items + (item < total % items)


@dataclass
class ShardReader:
    """The batches of a shard; samples that cannot be used are appended to `rejected`.

    Attributes:
        shard: The shard.
        config: How it is read.
        max_samples: See `ShardTask`.
        only: See `ShardTask`.
        skip: Samples with these keys are not used.
        rejected: The samples that were rejected until now.
    """

    shard: str
    config: ReaderConfig
    max_samples: int | None = None
    only: frozenset[str] | None = None
    skip: frozenset[str] = frozenset()
    rejected: list[RejectedSample] = field(default_factory=list)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches."""
        stages = (
            partial(list_samples, self.shard),
            webdataset.slice(self.max_samples),
            self.select,
            partial(fetch_references, column=split_shard(self.shard)[1]),
            self.config.decode_all,
            self.leave_out_rejected,
            batched(self.config.batch_size, self.make_batch),
        )
        return iter(DataPipeline(*stages))

    def select(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Yield the samples that the reader is to use; listed samples are missing if the shard was read to its end."""
        missing, task = set(self.only or ()), ShardTask(self.shard, self.max_samples, self.only, self.skip)
        seen = 0
        for sample in samples:
            seen += 1
            missing.discard(sample.key)
            if task.uses(sample.key):
                yield sample
        read_whole = self.max_samples is None or seen < self.max_samples
        for key in sorted(missing if read_whole else ()):
            yield reject(key, "the shard does not contain it any more")

    def leave_out_rejected(self, found: Iterable[Decoded | Rejection]) -> Iterator[Decoded]:
        """Yield the decoded samples, and append the others to `rejected`."""
        for each in found:
            if isinstance(each, Rejection):
                self.rejected.append(RejectedSample(self.shard, *each))
            else:
                yield each

    def make_batch(self, taken: list[Decoded]) -> Batch:
        """Return a batch of decoded samples."""
        keys, images, labels, boxes, masks = (list(column) for column in zip(*taken))
        batch = normalize_batch([torch.from_numpy(image) for image in images], self.config.preprocessing)
        regions = [None if mask is None else torch.from_numpy(mask) for mask in masks]
        return Batch(batch.to(self.config.dtype), keys, labels, boxes, regions)
