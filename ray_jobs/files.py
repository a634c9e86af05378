"""Where jobs write: a folder on this machine, or at any URL that fsspec writes. Every file is wholly there or not."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from patterns import UserError
from patterns.storage import aside_of


def located(where: str | Path) -> UPath:
    """A path or URL, the same from every process."""
    return UPath(where) if "://" in str(where) else UPath(Path(where).absolute())


def here(path: UPath) -> bool:
    """Whether a path is one of this machine, or of a file system that is mounted on it."""
    return isinstance(path, Path)


@contextmanager
def published(folder: UPath) -> Iterator[Path]:
    """A folder of this machine; what is written into it stands in `folder` afterwards.

    Where `folder` is on this machine it is the same, and files get their names when they are whole (see
    `patterns.storage.aside_of`); else each file is put there as one object. UserError where that fails.
    """
    try:
        if here(folder):
            folder.mkdir(parents=True, exist_ok=True)
            yield Path(str(folder))
            return
        with TemporaryDirectory() as local:
            yield Path(local)
            for file in sorted(Path(local).rglob("*")):
                if file.is_file():
                    put(file, folder / file.relative_to(local).as_posix())
    except OSError as error:
        what = f"cannot be written ({error.strerror or error})"
        raise UserError(str(folder), what, "Make room or give the right; the same command then goes on.") from error


def put(file: Path, path: UPath) -> None:
    try:
        path.fs.put_file(str(file), path.path)
    except Exception as error:  # what fsspec's file systems raise has no common base
        raise OSError(str(error) or type(error).__name__) from error


@contextmanager
def fetched(path: UPath) -> Iterator[Path]:
    """A file of this machine with the content of `path`, as long as it is needed. FileNotFoundError without one."""
    if here(path):
        yield Path(str(path))
        return
    with TemporaryDirectory() as local:
        copy_ = Path(local) / path.name
        path.fs.get_file(path.path, str(copy_))
        yield copy_


def read_table(path: UPath) -> pa.Table:
    """A Parquet file, wherever it is. FileNotFoundError without one."""
    with fetched(path) as file:
        return pq.read_table(file)


def copy(source: UPath, folder: UPath) -> None:
    """Put a file's content under the same name into a folder."""
    with fetched(source) as local, published(folder) as out, aside_of(out / source.name) as aside:
        shutil.copyfile(local, aside)


def names(folder: UPath, prefix: str = "") -> list[str]:
    """The names of the files in a folder that begin with a prefix; none where there is no such folder."""
    if not here(folder):
        folder.fs.invalidate_cache()
    if not folder.exists():
        return []
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(prefix))


def remove(path: UPath) -> None:
    """Delete a file, if it is there."""
    path.unlink(missing_ok=True)
