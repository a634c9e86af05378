"""Files and folders of jobs, on this machine or in any store that fsspec knows.

Every file is either complete or absent. All errors of file systems become UserErrors (see `file_systems`).
"""

import io
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from patterns import UserError
from patterns.io import temporary_path
from ray_jobs.io.file_systems import (
    call_with_timeout,
    expand_home,
    is_known_scheme,
    is_url,
    open_file_system,
    parse_scheme,
    resolve_file_url,
    to_user_error,
    translate_errors,
)
from ray_jobs.units import make_printable

if TYPE_CHECKING:
    import pyarrow as pa

READ_ONLY = {"http", "https"}


@dataclass(frozen=True)
class Location:
    """A file or folder on this machine or in a store. All methods raise UserError if the store fails.

    A file that does not exist raises MissingError, which is a UserError and a FileNotFoundError.

    Attributes:
        url: Its absolute path or URL.

    Example:
        >>> runs = Location("s3://bucket/runs")
        >>> str(runs / "fit"), (runs / "fit").name, runs.local is None
        ('s3://bucket/runs/fit', 'fit', True)
    """

    url: str

    def __str__(self) -> str:
        """Return the path or URL."""
        return self.url

    def __fspath__(self) -> str:
        """Return the path. Raise TypeError for a URL."""
        if self.local is None:
            raise TypeError(f"{self.url} is not on this machine")
        return self.url

    def __truediv__(self, name: str) -> "Location":
        """Return the location of a file or folder in this folder."""
        return Location(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last component."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "Location":
        """The folder that contains it."""
        return Location(self.url.rpartition("/")[0] or "/")

    @property
    def parts(self) -> tuple[str, ...]:
        """The components."""
        return tuple(part for part in self.url.split("/") if part)

    @property
    def local(self) -> Path | None:
        """The path, if it is on this machine or on a mounted file system; None for a URL."""
        return None if is_url(self.url) else Path(self.url)

    def info(self) -> dict[str, Any]:
        """Return the store's information about a file or folder, at least its `type`: file or directory."""
        if self.local is not None:
            with translate_errors(self.url):
                self.local.stat()
                return {"type": "directory" if self.local.is_dir() else "file"}
        store, path = open_file_system(self.url)
        with translate_errors(self.url):
            store.invalidate_cache()  # other processes write
            return dict(call_with_timeout(store.info, path))

    def exists(self) -> bool:
        """Return whether the file or folder exists. Raise UserError if the store fails, because runs depend on it."""
        try:
            self.info()
        except FileNotFoundError:
            return False
        return True

    def read_bytes(self) -> bytes:
        """Return a file's content."""
        if self.local is not None:
            with translate_errors(self.url):
                return self.local.read_bytes()
        store, path = open_file_system(self.url)
        with translate_errors(self.url):
            return bytes(call_with_timeout(store.cat_file, path))

    def read_text(self) -> str:
        """Return a file's content as text."""
        with translate_errors(self.url):
            return self.read_bytes().decode("utf-8")

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        """Open the file for reading with random access."""
        if self.local is not None:
            with translate_errors(self.url):
                return open(self.local, mode)
        store, path = open_file_system(self.url)
        with translate_errors(self.url):
            return io.BufferedReader(_Reader(self.url, call_with_timeout(store.open, path, mode)), 1 << 20)

    def entries(self) -> list[str]:
        """Return the sorted names in the folder; empty if it does not exist."""
        try:
            if self.local is not None:
                with translate_errors(self.url):
                    return sorted(path.name for path in self.local.iterdir())
            store, path = open_file_system(self.url)
            with translate_errors(self.url):
                store.invalidate_cache()
                paths = call_with_timeout(store.ls, path, False)
                return sorted({path.rstrip("/").rpartition("/")[2] for path in paths})
        except FileNotFoundError:
            return []

    def remove(self) -> None:
        """Delete the file if it exists."""
        try:
            if self.local is not None:
                with translate_errors(self.url, "deleted"):
                    self.local.unlink(missing_ok=True)
                return
            store, path = open_file_system(self.url)
            with translate_errors(self.url):
                call_with_timeout(store.rm_file, path)
        except FileNotFoundError:
            pass

    def put(self, file: Path) -> None:
        """Upload a file of this machine as one object."""
        store, path = open_file_system(self.url)
        with translate_errors(self.url, "written"):
            store.put_file(str(file), path)

    def get(self, file: Path) -> None:
        """Download the file to a path of this machine."""
        self.info()  # has a time limit, unlike the download, which takes long for a large file
        store, path = open_file_system(self.url)
        with translate_errors(self.url):
            store.get_file(path, str(file))


class _Reader(io.RawIOBase):
    """An open file of a store whose errors are UserErrors."""

    def __init__(self, url: str, file: Any) -> None:
        self.url, self.file = url, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with translate_errors(self.url):
            data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        with translate_errors(self.url):
            return int(self.file.seek(offset, whence))

    def tell(self) -> int:
        return int(self.file.tell())

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()


def normalize_location(where: str) -> str:
    """Return a path or URL with `~` expanded; a `file:` URL becomes a path.

    Raises:
        UserError: If it is empty, or a URL with a single slash, which would be a folder on this machine.
    """
    text = expand_home(resolve_file_url(where))
    if not text.strip():
        raise UserError(repr(where), "an empty path", "Pass a folder or file.")
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/(?!/)", text)
    if match and is_known_scheme(match[1]):
        raise UserError(where, "a URL with a single slash", f"Write {match[1]}://{text[match.end() :]}.")
    return text


def require_local_path(where: str | Path) -> Path:
    """Return the path of a file or folder on this machine. Raise UserError for a URL of a store."""
    text = normalize_location(str(where))
    if is_url(text):
        raise UserError(str(where), "a URL, but this file or folder must be on this machine", "Pass a path.")
    return Path(text)


def locate(where: str | Path) -> Location:
    """Return the location of a path or URL, with an absolute path, so that it is valid in every process.

    Raises:
        UserError: If the path is not UTF-8, because Arrow and safetensors cannot open it.
    """
    text = normalize_location(str(where))
    if make_printable(text) != text:
        raise UserError(make_printable(text), "its name is not UTF-8", "Rename the folder, or choose another.")
    if is_url(text):
        return Location(text.rstrip("/"))
    with translate_errors(text, remedy="Change to another folder, because the current folder may have been deleted."):
        return Location(str(Path(text).absolute()))


def require_writable(where: str | Path) -> Location:
    """Return the location of a folder that a job will write; nothing is created.

    Raises:
        UserError: If it is a file or below a file, or its store is read-only or does not respond.
    """
    folder = locate(where)
    if parse_scheme(folder.url) in READ_ONLY:
        raise UserError(folder.url, "a web server is read-only", "Choose a folder or an object store.")
    if folder.local is not None:
        for each in (folder.local, *folder.local.parents):
            with translate_errors(folder.url, "written"):
                if each.is_dir():
                    break
                if os.path.lexists(each) and not each.is_symlink():
                    raise UserError(folder.url, f"{each} is a file, not a folder", "Choose another folder.")
                if each.is_symlink():
                    raise UserError(folder.url, f"{each} is a link without a target", "Choose another folder.")
    elif folder.exists() and folder.info()["type"] == "file":
        raise UserError(folder.url, "this is a file, not a folder", "Choose another folder.")
    return folder


@contextmanager
def publish(folder: Location) -> Iterator[Path]:
    """Yield a folder of this machine, and publish the files that are written into it in `folder`.

    A local `folder` is yielded itself, so that its files must be written completely before they get their names (see
    `patterns.io.temporary_path`). Otherwise each file is uploaded as one object at the end of the block.

    Raises:
        UserError: If a file cannot be written.
    """
    if folder.local is not None:
        with translate_write_errors(str(folder)):
            folder.local.mkdir(parents=True, exist_ok=True)
            yield folder.local
        return
    with translate_write_errors("TMPDIR"), TemporaryDirectory() as local:
        yield Path(local)
        for file in sorted(Path(local).rglob("*")):
            if file.is_file():
                (folder / file.relative_to(local).as_posix()).put(file)


@contextmanager
def translate_write_errors(where: str) -> Iterator[None]:
    """Translate OSErrors of the block to UserErrors; other exceptions pass, because they are not about writing."""
    try:
        yield
    except OSError as error:
        if isinstance(error, UserError):
            raise
        raise to_user_error(error, where, "written") from error


@contextmanager
def fetch(path: Location) -> Iterator[Path]:
    """Yield a file of this machine with the content of `path`; a download is deleted afterwards.

    Raises:
        MissingError: If the file does not exist.
    """
    if path.local is not None:
        path.info()
        yield path.local
        return
    with TemporaryDirectory() as local:
        download = Path(local) / (path.name.partition("?")[0][-100:] or "file")
        path.get(download)
        yield download


def read_option_file(option: str, where: str) -> bytes:
    """Return the content of the file that an option names.

    Args:
        option: The option, for errors.
        where: The path or URL.

    Raises:
        UserError: If the file cannot be read.
    """
    try:
        with fetch(locate(where)) as file, translate_errors(where):
            return file.read_bytes()
    except UserError as error:
        raise UserError(f"{option} {where}", error.what, error.remedy) from error


def read_table(path: Location, columns: list[str] | None = None) -> "pa.Table":
    """Read a Parquet file, or some columns of it. Raise MissingError if it does not exist."""
    import pyarrow.parquet as pq

    with (
        fetch(path) as file,
        translate_errors(str(path), remedy="Delete it, then run the same command to write it again."),
    ):
        return pq.read_table(file, columns=columns)


def copy_file(source: Location, folder: Location) -> None:
    """Copy a file to a folder under the same name.

    Args:
        source: The file.
        folder: The folder.

    Raises:
        MissingError: If the file does not exist.
        UserError: If the copy cannot be written.
    """
    with fetch(source) as local, publish(folder) as out, temporary_path(out / source.name) as temporary:
        shutil.copyfile(local, temporary)


def list_names(folder: Location, prefix: str = "") -> list[str]:
    """Return the names in a folder that begin with a prefix.

    Args:
        folder: The folder.
        prefix: The prefix.

    Returns:
        The sorted names; empty if the folder does not exist.
    """
    return [name for name in folder.entries() if name.startswith(prefix)]


def remove(path: Location) -> None:
    """Delete a file, if it exists."""
    path.remove()
