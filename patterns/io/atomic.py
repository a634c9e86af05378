"""Files that are complete or absent: each is written under another name and renamed."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

TEMPORARY_PREFIX = ".aside-"  # part of the name of every file still being written


def write_table(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write tables one after the other, each its own row group."""

    def write(aside: Path) -> None:
        with pq.ParquetWriter(aside, schema) as writer:
            for table in tables:
                writer.write_table(table)

    write_atomically(path, write)


def write_json(path: Path, value: object) -> None:
    """Write a value as readable JSON."""
    write_atomically(path, lambda aside: aside.write_text(json.dumps(value, indent=1) + "\n"))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name, make it durable, and rename it to its own."""
    with temporary_path(path) as aside:
        write(aside)


@contextmanager
def temporary_path(path: Path) -> Iterator[Path]:
    """Another name to write a file under, which then is made durable and renamed to its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{TEMPORARY_PREFIX}{uuid4().hex}-{path.name}")
    try:
        aside.touch()
        mode = aside.stat().st_mode
        yield aside
        aside.chmod(mode)  # safetensors would keep other users out
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
