"""Where jobs read and write: a folder on this machine, or a URL of any store that fsspec knows.

Every file is complete or absent. Whatever a file system raises becomes a UserError (see `file_systems`).
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
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

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

READ_ONLY = {"http", "https"}


@dataclass(frozen=True)
class Location:
    """A file or folder by its absolute path or its URL. All of its methods raise UserError if the store fails.

    A file that does not exist is a MissingError, which is a FileNotFoundError too.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __fspath__(self) -> str:
        if self.local is None:
            raise TypeError(f"{self.url} is not on this machine")
        return self.url

    def __truediv__(self, name: str) -> "Location":
        return Location(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "Location":
        return Location(self.url.rpartition("/")[0] or "/")

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(part for part in self.url.split("/") if part)

    @property
    def local(self) -> Path | None:
        """The path, if it is on this machine or on a file system that is mounted on it."""
        return None if is_url(self.url) else Path(self.url)

    def info(self) -> dict[str, Any]:
        """Return what the store knows of a file or folder: its `type` at least."""
        if self.local is not None:
            with translate_errors(self.url):
                self.local.stat()
                return {"type": "directory" if self.local.is_dir() else "file"}
        store, path = open_file_system(self.url)
        with translate_errors(self.url):
            store.invalidate_cache()  # other processes write
            return dict(call_with_timeout(store.info, path))

    def exists(self) -> bool:
        """Return whether there is a file or folder; a store that fails is an error, because runs depend on it."""
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
        """Return an open file to read at any position."""
        if self.local is not None:
            with translate_errors(self.url):
                return open(self.local, mode)
        store, path = open_file_system(self.url)
        with translate_errors(self.url):
            return io.BufferedReader(_Reader(self.url, call_with_timeout(store.open, path, mode)), 1 << 20)

    def entries(self) -> list[str]:
        """Return the names in a folder; empty if there is no such folder."""
        try:
            if self.local is not None:
                with translate_errors(self.url):
                    return sorted(path.name for path in self.local.iterdir())
            store, path = open_file_system(self.url)
            with translate_errors(self.url):
                store.invalidate_cache()
                listed = call_with_timeout(store.ls, path, False)
                return sorted({entry.rstrip("/").rpartition("/")[2] for entry in listed})
        except FileNotFoundError:
            return []

    def remove(self) -> None:
        """Delete a file, if it exists."""
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
        """Write a file of this machine here, as one object."""
        store, path = open_file_system(self.url)
        with translate_errors(self.url, "written"):
            store.put_file(str(file), path)

    def get(self, file: Path) -> None:
        """Copy this file to one of this machine."""
        self.info()  # its time limit is for a store that does not answer at all; a large file may take longer
        store, path = open_file_system(self.url)
        with translate_errors(self.url):
            store.get_file(path, str(file))


class _Reader(io.RawIOBase):
    """A store's open file whose errors are UserErrors."""

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
    """Return a path or URL as it is meant: `~` expanded, and a `file:` URL as the path that it names.

    UserError for an empty one, and for a URL with one slash, which would name a folder on this machine.
    """
    text = expand_home(resolve_file_url(where))
    if not text.strip():
        raise UserError(repr(where), "an empty path", "Name a folder or file.")
    single = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/(?!/)", text)
    if single and is_known_scheme(single[1]):
        raise UserError(where, "a URL with one slash", f"Write {single[1]}://{text[single.end() :]}.")
    return text


def require_local_path(where: str | Path) -> Path:
    """Return the path of a file or folder that must be on this machine. UserError for a URL of a store."""
    text = normalize_location(str(where))
    if is_url(text):
        raise UserError(str(where), "a URL, but this must be on this machine", "Name a path.")
    return Path(text)


def locate(where: str | Path) -> Location:
    """Return the location of a path or URL, the same from every process.

    UserError if its name is not UTF-8, because Arrow and safetensors open no such files.
    """
    text = normalize_location(str(where))
    if make_printable(text) != text:
        raise UserError(make_printable(text), "its name is not UTF-8", "Rename the folder, or choose another.")
    if is_url(text):
        return Location(text.rstrip("/"))
    with translate_errors(text, remedy="The current folder may have been deleted; change to another."):
        return Location(str(Path(text).absolute()))


def require_writable(where: str | Path) -> Location:
    """Return the location of a folder that a job will write.

    UserError if it is a file or below a file, and if its store can only be read or cannot be reached; nothing is
    created.
    """
    folder = locate(where)
    if parse_scheme(folder.url) in READ_ONLY:
        raise UserError(folder.url, "a web server can only be read", "Write to a folder or an object store.")
    if folder.local is not None:
        for each in (folder.local, *folder.local.parents):
            with translate_errors(folder.url, "written"):
                if each.is_dir():
                    break
                if os.path.lexists(each) and not each.is_symlink():
                    raise UserError(folder.url, f"{each} is a file, no folder", "Choose another folder.")
                if each.is_symlink():
                    raise UserError(folder.url, f"{each} is a link to nothing", "Choose another folder.")
    elif folder.exists() and folder.info()["type"] == "file":
        raise UserError(folder.url, "this is a file, no folder", "Choose another folder.")
    return folder


@contextmanager
def publish(folder: Location) -> Iterator[Path]:
    """Give a folder of this machine; what is written into it stands in `folder` afterwards.

    If `folder` is on this machine it is the same, and files get their names when they are complete (see
    `patterns.io.temporary_path`); else each file is put there as one object. UserError if that fails.
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
    """Translate errors of this machine's file systems only: other errors in the block are not about writing."""
    try:
        yield
    except OSError as error:
        if isinstance(error, UserError):
            raise
        raise to_user_error(error, where, "written") from error


@contextmanager
def fetch(path: Location) -> Iterator[Path]:
    """Give a file of this machine with the content of `path`, as long as it is needed. MissingError without one."""
    if path.local is not None:
        path.info()
        yield path.local
        return
    with TemporaryDirectory() as local:
        copy_ = Path(local) / (path.name.partition("?")[0][-100:] or "file")
        path.get(copy_)
        yield copy_


def read_option_file(option: str, where: str) -> bytes:
    """Return the content of a file or URL that an option names. UserError that names the option too."""
    try:
        with fetch(locate(where)) as file, translate_errors(where):
            return file.read_bytes()
    except UserError as error:
        raise UserError(f"{option} {where}", error.what, error.remedy) from error


def read_table(path: Location) -> pa.Table:
    """Read a Parquet file, wherever it is. MissingError without one."""
    with (
        fetch(path) as file,
        translate_errors(str(path), remedy="Delete it, then run the same command to write it again."),
    ):
        return pq.read_table(file)


def copy_file(source: Location, folder: Location) -> None:
    """Put a file's content under the same name into a folder."""
    with fetch(source) as local, publish(folder) as out, temporary_path(out / source.name) as aside:
        shutil.copyfile(local, aside)


def list_names(folder: Location, prefix: str = "") -> list[str]:
    """Return the names of the files in a folder that begin with a prefix; none if there is no such folder."""
    return [name for name in folder.entries() if name.startswith(prefix)]


def remove(path: Location) -> None:
    """Delete a file, if it exists."""
    path.remove()
