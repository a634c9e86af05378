"""Byte streams of paths, URLs and shell commands: decompressed, in bounded memory, verified to be complete."""

import io
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import pyarrow as pa
from fsspec.compression import compr

from ray_jobs.data.samples import ShardError
from ray_jobs.data.shell_pipes import open_pipe
from ray_jobs.io.file_systems import is_url, open_file_system
from ray_jobs.io.web import open_url

READ_TIMEOUT = 60.0  # seconds without a byte from an HTTP server
CHUNK = 1 << 18
REMOTE_BLOCK = 1 << 23  # bytes of one request to an object store

# By the first bytes instead of the name, because names of files and URLs need not have an extension.
COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    # Skippable frames: pzstd and `zstd --adapt` write them first, with sizes.
    **{bytes([number, 0x2A, 0x4D, 0x18]): "zstd" for number in range(0x50, 0x60)},
}


class CountingReader(io.RawIOBase):
    """A stream that counts the bytes that were read from it."""

    def __init__(self, source: Any) -> None:
        """Wrap a file-like object."""
        self.source, self.count = source, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer and return the number of bytes."""
        count: int = self.source.readinto(buffer)
        self.count += count
        return count


@contextmanager
def open_stream(path: str) -> Iterator[BinaryIO]:
    """Open the bytes of a path, a URL or `pipe:COMMAND`; gzip, bzip2, xz and zstd are decompressed.

    When the block ends without an exception, the rest of the stream is read, so that its length can be verified.

    Args:
        path: The path, URL or `pipe:COMMAND`.

    Yields:
        A stream of the decompressed bytes.

    Raises:
        ShardError: If the number of bytes is not the file's size, the object's size or the Content-Length.
    """
    with open_source(path) as (raw, size):
        counted = CountingReader(raw)
        compressed = io.BufferedReader(counted, CHUNK)
        stream = decompress(compressed)
        yield stream
        for each in (stream, compressed):
            while each.read(CHUNK):
                pass
        if size is not None and counted.count != size:
            raise ShardError(f"{counted.count} bytes were read, but its size is {size} bytes")


@contextmanager
def open_seekable(path: str) -> Iterator[BinaryIO]:
    """Open a path or URL as a file with random access; a remote file is copied to disk first."""
    if not is_url(path):
        with open(path, "rb") as file:
            yield file
    else:
        with TemporaryFile() as copy:
            with open_stream(path) as stream:
                shutil.copyfileobj(stream, copy, CHUNK)
            copy.seek(0)
            yield copy


def decompress(stream: "io.BufferedReader[Any]") -> BinaryIO:
    """Return the decompressed stream, or the stream itself if its first bytes name no compression."""
    start = stream.peek(8)
    for magic, name in COMPRESSIONS.items():
        if start.startswith(magic):
            if name == "zstd":  # Arrow's reader takes files of several frames, as pzstd writes them
                return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), name), CHUNK)
            return io.BufferedReader(compr[name](stream, mode="rb"), CHUNK)
    return stream


@contextmanager
def open_source(path: str) -> Iterator[tuple[Any, int | None]]:
    """Open a file-like object, and yield it with its size in bytes; the size is None if it is not known."""
    if path.startswith("pipe:"):
        with open_pipe(path.removeprefix("pipe:")) as output:
            yield output, None
    elif path.startswith(("http://", "https://")):
        try:
            with open_url(path, READ_TIMEOUT) as response:
                yield response, response.length
        except TimeoutError as error:
            raise ShardError(f"the server sent no data for {READ_TIMEOUT:g} s") from error
    elif is_url(path):
        filesystem, name = open_file_system(path)
        with filesystem.open(name, "rb", block_size=REMOTE_BLOCK) as file:
            yield file, getattr(file, "size", None)
    else:
        with open(path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            yield file, status.st_size if stat.S_ISREG(status.st_mode) else None
