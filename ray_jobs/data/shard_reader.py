"""A shard → a stream of decoded batches, and the samples in it that could not be used."""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from patterns import UserError
from ray_jobs.config import Preprocessing
from ray_jobs.data import image_folders, parquet_reader, tar_reader
from ray_jobs.data.byte_streams import opened, seekable
from ray_jobs.data.image_decoding import boxes_of, inputs, label_of, seen
from ray_jobs.data.samples import Box, Rejected, Sample, SampleError, distinct
from ray_jobs.io.file_systems import translated
from ray_jobs.io.prefetch import in_order


@dataclass(frozen=True)
class Batch:
    """images: (N, C, H, W) in the model's dtype, on the CPU.

    labels, boxes: None where a sample has none; boxes are in the model's input, and read where they are asked for.
    """

    images: Tensor
    keys: list[str]
    labels: list[int | None]
    boxes: list[list[Box] | None]


Used = tuple[str, Tensor, int | None, list[Box] | None]


def read_shard(shard: str) -> Generator[Sample, None, None]:
    """The samples of a shard as they stand: `__key__`, and bytes by extension; `__refused__` where one is unusable.

    In order and in bounded memory, with keys that are all different. UserError where the shard is not whole
    and sound to its end, or holds no sample; whatever the reason, it may be gone at another attempt.
    """
    empty = True
    with translated(shard, remedy="Replace it, or leave it out of --shards."):
        for sample in distinct(raw_samples(shard)):
            empty = False
            yield sample
    if empty:
        kind = "Parquet file" if parquet_reader.is_table(shard) else "tar archive"
        raise UserError(shard, f"a {kind} without a sample", "Replace it, or leave it out of --shards.")


def raw_samples(shard: str) -> Iterator[Sample]:
    if match := image_folders.SHARD.fullmatch(shard):
        yield from image_folders.samples(match)
    elif parquet_reader.is_table(shard):
        with seekable(shard) as file:
            yield from parquet_reader.samples(file)
    else:
        with opened(shard) as stream:
            yield from tar_reader.samples(stream)


@dataclass
class ShardReader:
    """Streams a shard's samples as batches; samples that cannot be used are put into `refused`.

    max_samples: the first so many samples of the shard are looked at, whether they can be used or not.
    check: raises SampleError for further samples that the job cannot use, given the label.
    with_boxes: whether boxes are wanted.
    only: of these, the samples of these keys; None: all.  skip: but not those of these keys.
    threads: how many decode.
    """

    shard: str
    preprocessing: Preprocessing
    batch_size: int
    dtype: torch.dtype = torch.float32
    max_samples: int | None = None
    check: Callable[[int | None], None] = lambda _: None
    with_boxes: bool = False
    only: frozenset[str] | None = None
    skip: frozenset[str] = frozenset()
    threads: int = 1
    refused: list[Rejected] = field(default_factory=list)

    def __iter__(self) -> Iterator[Batch]:
        taken: list[Used] = []
        self.lacking = set(self.only or ())
        with (
            closing(read_shard(self.shard)) as samples,
            closing(in_order(self.used, self.wanted(samples), self.threads)) as found,
        ):
            for used in found:
                if isinstance(used, Rejected):
                    self.refused.append(used)
                else:
                    taken.append(used)
                if len(taken) == self.batch_size:
                    yield self.batch(taken)
                    taken = []
        if taken:
            yield self.batch(taken)
        self.refused += [Rejected(self.shard, key, "read", "the shard has it no more") for key in sorted(self.lacking)]

    def wanted(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        """Those of a shard's samples that are asked for."""
        for sample in islice(samples, self.max_samples):
            key = sample["__key__"]
            self.lacking.discard(key)
            if key not in self.skip and (self.only is None or key in self.only):
                yield sample

    def used(self, sample: Sample) -> Used | Rejected:
        """A sample's key, input, label and boxes, or why it is refused."""
        key = sample["__key__"]
        if reason := sample.get("__refused__"):
            return Rejected(self.shard, key, "read", reason)
        try:
            label = label_of(sample)
            self.check(label)
            boxes = boxes_of(sample, self.preprocessing) if self.with_boxes else None
            return key, seen(sample, self.preprocessing), label, boxes
        except SampleError as error:
            return Rejected(self.shard, key, "decode", str(error))

    def batch(self, taken: list[Used]) -> Batch:
        keys, images, labels, boxes = zip(*taken)
        return Batch(inputs(images, self.preprocessing).to(self.dtype), list(keys), list(labels), list(boxes))
