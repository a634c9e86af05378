"""A path or URL → its bytes, read once from front to back, in bounded memory, and known to be all of them."""

import io
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import Any, BinaryIO
from urllib.parse import quote
from urllib.request import Request, urlopen

import pyarrow as pa
from fsspec.compression import compr

from ray_jobs.data.samples import ShardError
from ray_jobs.data.shell_pipes import open_pipe
from ray_jobs.io.file_systems import is_url, open_file_system

READ_TIMEOUT = 60.0  # seconds without a byte from an HTTP server
CHUNK = 1 << 18
REMOTE_BLOCK = 1 << 23  # bytes that are asked of an object store at once


# By the first bytes rather than the name: servers and people name things as they like.
COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    # Skippable frames, which zstd files may begin with: pzstd's and `zstd --adapt`'s hold sizes.
    **{bytes([number, 0x2A, 0x4D, 0x18]): "zstd" for number in range(0x50, 0x60)},
}


class CountingReader(io.RawIOBase):
    """A stream that knows how many bytes were read."""

    def __init__(self, source: Any) -> None:
        self.source, self.count = source, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.source.read(len(buffer))
        buffer[: len(data)] = data
        self.count += len(data)
        return len(data)


@contextmanager
def open_stream(path: str) -> Iterator[BinaryIO]:
    """The bytes behind a path, a URL or `pipe:COMMAND`, decompressed where they are gzip, bzip2, xz or zstd.

    A reader that leaves the block as usual has the rest read too: ShardError where the bytes turn out
    to be other than the file's size, the object's size or the server's Content-Length said.
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
            raise ShardError(f"{counted.count} bytes came, {size} were promised")


@contextmanager
def open_seekable(path: str) -> Iterator[BinaryIO]:
    """The bytes behind a path or URL as a file that can be read in any order: a copy on disk, where it is remote."""
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
    start = stream.peek(8)
    for magic, name in COMPRESSIONS.items():
        if start.startswith(magic):
            if name == "zstd":  # Arrow's reader takes files of several frames, as pzstd writes them
                return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), name), CHUNK)
            return io.BufferedReader(compr[name](stream, mode="rb"), CHUNK)
    return stream


@contextmanager
def open_source(path: str) -> Iterator[tuple[Any, int | None]]:
    """A file-like object, and how many bytes it should give, where that is known."""
    if path.startswith("pipe:"):
        with open_pipe(path.removeprefix("pipe:")) as output:
            yield output, None
    elif path.startswith(("http://", "https://")):
        # Plain HTTP: fsspec's asks for ranges, which not every server gives, and ends any read after five minutes.
        request = Request(quote(path, safe="%/:=&?~#+!$,;'@()*[]"), headers={"User-Agent": "patternnet-ray"})
        try:
            with urlopen(request, timeout=READ_TIMEOUT) as response:
                yield response, response.length
        except TimeoutError as error:
            raise ShardError(f"no byte for {READ_TIMEOUT:g} s") from error
    elif is_url(path):
        filesystem, name = open_file_system(path)
        with filesystem.open(name, "rb", block_size=REMOTE_BLOCK) as file:
            yield file, getattr(file, "size", None)
    else:
        with open(path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            yield file, status.st_size if stat.S_ISREG(status.st_mode) else None
