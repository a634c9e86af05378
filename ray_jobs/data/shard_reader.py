"""Read a shard as a stream of decoded batches, and list the samples that cannot be used."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import webdataset
from torch import Tensor
from webdataset import DataPipeline, SimpleShardList, batched

from patterns import UserError
from ray_jobs.config import Preprocessing
from ray_jobs.data import image_folders, parquet_reader
from ray_jobs.data.annotations import parse_boxes, parse_label, parse_mask
from ray_jobs.data.byte_streams import open_seekable
from ray_jobs.data.decoders import Decode
from ray_jobs.data.image_decoding import decode_input, normalize_batch
from ray_jobs.data.references import fetch_references, split_shard
from ray_jobs.data.samples import REPLACE, Box, RejectedSample, Sample, SampleError, reject, reject_duplicates
from ray_jobs.data.tar_reader import verified_tar
from ray_jobs.io.file_systems import translate_errors
from ray_jobs.io.prefetch import map_in_order


@dataclass(frozen=True)
class Batch:
    """Decoded samples.

    Attributes:
        images: The model's input, (N, C, H, W), in its dtype, on the CPU.
        keys: The keys.
        labels: The label of each sample; None if it has no label.
        boxes: The boxes of each sample in pixels of the model's input; None if it has no boxes, or the reader's config
            does not ask for them.
        masks: The mask of each sample, see `parse_mask`; None likewise.
    """

    images: Tensor
    keys: list[str]
    labels: list[int | None]
    boxes: list[list[Box] | None]
    masks: list[Tensor | None]


Decoded = tuple[str, Tensor, int | None, list[Box] | None, Tensor | None]


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
        kind = "Parquet file" if parquet_reader.is_parquet(shard) else "tar archive"
        raise UserError(shard, f"a {kind} without a sample", REPLACE)


def read_raw_samples(sources: Iterable[Mapping[str, str]]) -> Iterator[Sample]:
    """Yield the samples of the shards that each `url` names; several may have the same key."""
    for source in sources:
        shard = source["url"]
        if match := image_folders.SHARD.fullmatch(shard):
            yield from image_folders.read_samples(match)
        elif parquet_reader.is_parquet(shard):
            path, column = split_shard(shard)
            with open_seekable(path) as file:
                yield from parquet_reader.read_samples(file, column.name if column else None)
        else:
            yield from map(Sample.of, verified_tar([source]))


@dataclass(frozen=True)
class ReaderConfig:
    """How a worker reads its shards.

    Attributes:
        preprocessing: From an image to the model's input.
        batch_size: The number of samples of a batch; the last batch of a shard may have fewer.
        dtype: The dtype of the model's input.
        validate_label: Raises SampleError if the job cannot use a sample with this label.
        with_regions: Whether the boxes and masks of samples are read.
        needed_region: "mask" or "box" if samples without one cannot be used; None if neither is needed.
        threads: The number of threads that decode images.
        decode: From a sample to its input, float32 (C, H, W), or SampleError. None: images and ready tensors are read.
    """

    preprocessing: Preprocessing
    batch_size: int
    dtype: torch.dtype = torch.float32
    validate_label: Callable[[int | None], None] = lambda _: None
    with_regions: bool = False
    needed_region: str | None = None
    threads: int = 1
    decode: Decode | None = None

    def decode_input(self, sample: Sample) -> Tensor:
        """Return the input of a sample, uint8 for an image and float32 otherwise. SampleError if there is none."""
        return decode_input(sample.files, self.preprocessing) if self.decode is None else self.decode(sample)


@dataclass(frozen=True)
class ShardTask:
    """The samples of one shard that a worker reads.

    Attributes:
        shard: The shard.
        max_samples: The number of samples at most that are read from the start of the shard, usable or not.
            None: all.
        only: Only samples with these keys are used. None: all.
        skip: Samples with these keys are not used.
    """

    shard: str
    max_samples: int | None = None
    only: frozenset[str] | None = None
    skip: frozenset[str] = frozenset()


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
            partial(map_in_order, self.decode, threads=self.config.threads),
            self.leave_out_rejected,
            batched(self.config.batch_size, self.make_batch),
        )
        return iter(DataPipeline(*stages))

    def select(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Yield the samples that the reader is to use."""
        missing = set(self.only or ())
        for sample in samples:
            missing.discard(sample.key)
            if sample.key not in self.skip and (self.only is None or sample.key in self.only):
                yield sample
        for key in sorted(missing):
            yield reject(key, "the shard does not contain it any more")

    def leave_out_rejected(self, found: Iterable[Decoded | RejectedSample]) -> Iterator[Decoded]:
        """Yield the decoded samples, and append the others to `rejected`."""
        for each in found:
            if isinstance(each, RejectedSample):
                self.rejected.append(each)
            else:
                yield each

    def decode(self, sample: Sample) -> Decoded | RejectedSample:
        """Return the key, input, label and boxes of a sample, or why it is rejected."""
        key = sample.key
        if reason := sample.rejection:
            return RejectedSample(self.shard, key, "read", reason)
        try:
            label = parse_label(sample.files)
            self.config.validate_label(label)
            boxes, mask = self.parse_regions(sample)
            return key, self.config.decode_input(sample), label, boxes, mask
        except SampleError as error:
            return RejectedSample(self.shard, key, "decode", str(error))

    def parse_regions(self, sample: Sample) -> tuple[list[Box] | None, Tensor | None]:
        """Return the boxes and the mask of a sample, if the job reads them. Raise SampleError if it cannot use them."""
        if not self.config.with_regions:
            return None, None
        needed, preprocessing = self.config.needed_region, self.config.preprocessing
        boxes = parse_boxes(sample.files, preprocessing)
        try:
            mask = parse_mask(sample.files, preprocessing)
        except SampleError:
            if needed == "mask":
                raise
            mask = None
        if (needed, boxes) == ("box", None) or (needed == "mask" and mask is None):
            files = "boxes in its json" if needed == "box" else "mask.png or seg.png"
            raise SampleError(f"the target needs a {needed}, and the sample has no {files}")
        return boxes, mask

    def make_batch(self, taken: list[Decoded]) -> Batch:
        """Return a batch of decoded samples."""
        keys, images, labels, boxes, masks = zip(*taken)
        return Batch(
            normalize_batch(images, self.config.preprocessing).to(self.config.dtype),
            list(keys),
            list(labels),
            list(boxes),
            list(masks),
        )
