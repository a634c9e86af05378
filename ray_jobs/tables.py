"""A Parquet file with images in it → samples, row group by row group."""

import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ray_jobs.samples import IMAGES, MAX_SAMPLE_BYTES, Sample, ShardError, refused, unsafe

ROWS = 16  # read at once
MAX_GROUP_BYTES = 1 << 31
IMAGE_COLUMNS = ("image", "img", *IMAGES, "bytes", "image_bytes", "content")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "target", "fine_label")
KEY_COLUMNS = ("__key__", "key")


def is_table(shard: str) -> bool:
    """Whether a shard is a Parquet file, by its name."""
    return re.search(r"\.(parquet|pq)($|\?)", shard) is not None


def samples(file: BinaryIO) -> Iterator[Sample]:
    """The rows of a Parquet file in its order, named after their number or by its column `__key__` or `key`.

    The image: a column of bytes, or a struct with the field `bytes`, as Hugging Face has it. The label: a
    column of whole numbers. ShardError where the file has no images, or fewer rows than its footer says.
    """
    table = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
    schema = table.schema_arrow
    image = image_column(schema)
    key = next((name for name in KEY_COLUMNS if name in schema.names), None)
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    for number in range(table.metadata.num_row_groups):
        size = table.metadata.row_group(number).total_byte_size
        if size > MAX_GROUP_BYTES:
            raise ShardError(f"row group {number} has {size} bytes; at most {MAX_GROUP_BYTES} are read")
    rows = 0
    for batch in table.iter_batches(ROWS, columns=[c for c in (image, label, key) if c], use_threads=False):
        for row in batch.to_pylist():
            yield sample_of(str(row[key]) if key else f"{rows:08}", row[image], row[label] if label else None)
            rows += 1
    if rows != table.metadata.num_rows:
        raise ShardError(f"{rows} rows were read, its footer says {table.metadata.num_rows}")


def image_column(schema: pa.Schema) -> str:
    """The column that holds the images: by its name, else the only one that can."""
    able = [field.name for field in schema if holds_bytes(field.type)]
    named = [name for name in IMAGE_COLUMNS if name in able]
    if not named and len(able) != 1:
        raise ShardError(f"no column of image bytes; it has {', '.join(schema.names) or 'no columns'}")
    return (named or able)[0]


def holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and holds_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def sample_of(key: str, image: Any, label: Any) -> Sample:
    if trouble := unsafe(key):
        return refused(key, trouble)
    data = image.get("bytes") if isinstance(image, dict) else image
    if data is None:
        return refused(key, "no image bytes in this row")
    if len(data) > MAX_SAMPLE_BYTES:
        return refused(key, f"it has more than {MAX_SAMPLE_BYTES} bytes")
    sample: Sample = {"__key__": key, IMAGES[0]: data}  # whatever it is: images are known by their content
    return sample if label is None else sample | {"cls": str(label).encode()}
