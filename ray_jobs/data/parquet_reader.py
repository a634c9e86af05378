"""Parquet files with a column of images: read their samples, in bounded memory."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ray_jobs.data.labels import MAX_CLASS, UNLABELED
from ray_jobs.data.samples import (
    IMAGES,
    MAX_SAMPLE_BYTES,
    NAMED_FORMATS,
    Sample,
    SampleError,
    ShardError,
    extension_of,
    make_key,
    reject,
)

BATCH_ROWS = 16  # rows that are read at once
MAX_GROUP_BYTES = 1 << 31
IMAGE_COLUMNS = ("image", "img", *IMAGES, "bytes", "image_bytes", "content")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "target", "fine_label")
KEY_COLUMNS = ("__key__", "key")
MAX_KEY = 4096  # characters
WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,20}(\.0*)?")


def is_parquet(shard: str) -> bool:
    """Return whether a shard is a Parquet file, by its name."""
    return re.search(r"\.(parquet|pq)($|\?|#image=)", shard) is not None


def read_samples(file: BinaryIO, image_column: str | None = None) -> Iterator[Sample]:
    """Yield the rows of a Parquet file as samples.

    Images are a column of bytes, or of Hugging Face's structs with a field `bytes`. Labels are a column of class
    numbers. Keys are the column `__key__` or `key`, or the numbers of the rows.

    Args:
        file: The file.
        image_column: The column of the images, which may also hold their URLs or paths; None: see `find_image_column`.

    Raises:
        ShardError: If the file has no images, or another number of rows than its footer says.
    """
    table = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
    schema = table.schema_arrow
    image = find_image_column(schema) if image_column is None else require_image_column(schema, image_column)
    key = next((name for name in KEY_COLUMNS if name in schema.names), None)
    label = next((name for name in LABEL_COLUMNS if name in schema.names and name != image), None)
    for number in range(table.metadata.num_row_groups):
        size = table.metadata.row_group(number).total_byte_size
        if size > MAX_GROUP_BYTES:
            raise ShardError(f"row group {number} has {size} bytes; at most {MAX_GROUP_BYTES} are read")
    classes = read_class_names(schema, label) if label else ()
    rows = 0
    for batch in table.iter_batches(BATCH_ROWS, columns=[c for c in (image, label, key) if c], use_threads=False):
        names = read_keys(batch, key)
        for name, row in zip(names, batch.drop_columns([key] if key else []).to_pylist()):
            row_number = f"{rows:08}"
            if len(name) > MAX_KEY:
                yield reject(row_number, f"its key has {len(name)} characters; at most {MAX_KEY} are allowed")
            else:
                value = row[label] if label else None
                yield make_sample(name or row_number, row[image], value, classes, image_column is not None)
            rows += 1
    if rows != table.metadata.num_rows:
        raise ShardError(f"{rows} rows were read, but its footer says {table.metadata.num_rows}")


def read_keys(batch: pa.RecordBatch, key: str | None) -> list[str]:
    """Return the keys of some rows; "" if a row has no key. Bytes that are not UTF-8 become surrogate escapes."""
    if key is None:
        return [""] * len(batch)
    column = batch.column(key)
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.view(pa.binary() if pa.types.is_string(column.type) else pa.large_binary())
    values = column.to_pylist()
    return [os.fsdecode(v) if isinstance(v, bytes) else "" if v is None else str(v) for v in values]


def find_image_column(schema: pa.Schema) -> str:
    """Return the column of the images: by its name, otherwise the only column of bytes."""
    candidates = [field.name for field in schema if holds_bytes(field.type)]
    named = [name for name in IMAGE_COLUMNS if name in candidates]
    if not named and len(candidates) != 1:
        lists = [field.name for field in schema if is_list(field.type) and holds_bytes(field.type.value_type)]
        if lists:
            raise list_error(lists[0])
        remedy = "; --image-column names a column of URLs or paths"
        raise ShardError(f"no column of image bytes; its columns are {', '.join(schema.names) or 'none'}{remedy}")
    return (named or candidates)[0]


def require_image_column(schema: pa.Schema, name: str) -> str:
    """Return the name of a column. Raise ShardError if it does not exist, or holds no images, URLs or paths."""
    if name not in schema.names:
        raise ShardError(f"no column {name!r}; its columns are {', '.join(schema.names) or 'none'}")
    kind = schema.field(name).type
    if is_list(kind):
        raise list_error(name)
    text = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = pa.types.is_string(text) or pa.types.is_large_string(text) or pa.types.is_string_view(text)
    is_path = pa.types.is_struct(kind) and any(field.name == "path" for field in kind)
    if not (is_text or is_path or holds_bytes(kind)):
        raise ShardError(f"the column {name!r} holds {kind}, not bytes, URLs or paths")
    return name


def is_list(kind: pa.DataType) -> bool:
    """Return whether a type is a list of any size."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def list_error(name: str) -> ShardError:
    """Return the error for a column of lists."""
    return ShardError(f"the column {name!r} holds lists of images, but a sample has one: write a row for each image")


def holds_bytes(kind: pa.DataType) -> bool:
    """Return whether a type is bytes, or a struct with a field `bytes`."""
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and holds_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def make_sample(name: str, image: Any, label: Any, classes: Sequence[str], may_refer: bool = False) -> Sample:
    """Return a row as a sample, which is rejected if its image or label cannot be used.

    Args:
        name: The row's key.
        image: The image's bytes, a struct with `bytes` and `path`, or its URL or path.
        label: The label.
        classes: The names of the classes, if the file's schema has them.
        may_refer: Whether a URL or path may stand in the place of bytes.
    """
    key = make_key(name)
    data: Any
    data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
    reference = data if isinstance(data, str) else path if data is None else None
    if reference is None and data is None:
        return reject(key, "the row has no image bytes")
    if reference is not None and not may_refer:
        return reject(key, "the row has no image bytes; --image-column fetches the image that it names")
    if reference is None and len(data) > MAX_SAMPLE_BYTES:
        return reject(key, f"it has more than {MAX_SAMPLE_BYTES} bytes")
    try:
        number = parse_class_number(label, classes)
    except SampleError as error:
        return reject(key, str(error))
    labels = {} if number is None else {"cls": str(number).encode()}
    if reference is not None:
        return Sample(key, labels, reference=reference)
    extension = extension_of(path) if isinstance(path, str) else ""
    return Sample(key, {extension if extension in NAMED_FORMATS else IMAGES[0]: data, **labels})


def parse_class_number(value: Any, classes: Sequence[str] = ()) -> int | None:
    """Return a value of a column of labels as a class number; None for null, NaN and -1.

    Args:
        value: A whole number in any form: an integer, 3.0, "3", true for 1, or a list with one of these.
        classes: The names of the classes, if the file's schema has them.

    Raises:
        SampleError: If the value is not a class number.
    """
    if isinstance(value, list) and len(value) == 1:
        return parse_class_number(value[0], classes)
    if value is None or value != value:  # NaN
        return None
    if isinstance(value, str) and value in classes:
        return classes.index(value)
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    text = str(int(value)) if isinstance(value, bool) else text.strip()
    if not WHOLE_NUMBER.fullmatch(text):
        remedy = "write the number of its class into the column" if isinstance(value, str) else "write one number"
        raise SampleError(f"the label {text[:40]!r} is not a class number: {remedy}")
    number = int(text.partition(".")[0])
    if not UNLABELED <= number < MAX_CLASS:
        raise SampleError(f"the label {text[:40]} is not a class number")
    return None if number == UNLABELED else number


def read_class_names(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """Return the class names of Hugging Face's `ClassLabel` in the metadata of a file; empty if there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[column]["names"]))
    except (KeyError, ValueError, TypeError):
        return ()
