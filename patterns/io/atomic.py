"""Files that are either complete or absent: they are written under a temporary name and renamed."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

if TYPE_CHECKING:
    import pyarrow as pa

TEMPORARY_PREFIX = ".aside-"  # the name of a file that is not complete begins with this


@contextmanager
def temporary_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write a file to, which is then made durable and renamed to its own.

    If the block raises, the temporary file is deleted and a previous file of this name stays as it was.

    Args:
        path: The file. Its folder is created if it does not exist.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with temporary_path(Path(folder) / "file") as temporary:
        ...         _ = temporary.write_text("complete")
        ...     [child.name for child in Path(folder).iterdir()]
        ['file']
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid4().hex}-{path.name}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors denies access to other users
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, make it durable, and rename it to its own.

    Args:
        path: The file.
        write: Writes the file to the path that it is given.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_atomically(Path(folder) / "file", lambda temporary: temporary.write_text("complete"))
        ...     (Path(folder) / "file").read_text()
        'complete'
    """
    with temporary_path(path) as temporary:
        write(temporary)


def write_table(path: Path, schema: "pa.Schema", tables: Iterable["pa.Table"]) -> None:
    """Write a Parquet file atomically.

    Args:
        path: The file.
        schema: The schema of the tables.
        tables: The tables to concatenate; each becomes a row group.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import pyarrow as pa, pyarrow.parquet as pq
        >>> table = pa.table({"n": [1, 2]})
        >>> with TemporaryDirectory() as folder:
        ...     write_table(Path(folder) / "it.parquet", table.schema, [table, table])
        ...     pq.read_table(Path(folder) / "it.parquet")["n"].to_pylist()
        [1, 2, 1, 2]
    """
    import pyarrow.parquet as pq

    def write(temporary: Path) -> None:
        with pq.ParquetWriter(temporary, schema) as writer:
            for table in tables:
                writer.write_table(table)

    write_atomically(path, write)


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, atomically.

    Args:
        path: The file.
        value: The value.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_json(Path(folder) / "it.json", {"n": 1})
        ...     json.loads((Path(folder) / "it.json").read_text())
        {'n': 1}
    """
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n"))
