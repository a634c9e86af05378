"""Images that a Parquet file names by URLs or paths: which are allowed, and how they are fetched.

A table may come from anyone, so it must not choose which files of this machine or of a store are read. An entry is

- a URL of `http:` or `https:`;
- a path without `..` below the base, which is the table's folder or `--image-base`;
- any other absolute path or URL only if it lies below `--image-base`.

The choice of the column and the base are part of the shard's name, `FILE.parquet#image=COLUMN&base=BASE`, so that
every reader of the shard fetches the same images.
"""

import re
import threading
import time
from collections.abc import Generator, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from ray_jobs.data.byte_streams import CHUNK, open_source
from ray_jobs.data.image_folders import find_file_problem
from ray_jobs.data.samples import IMAGES, MAX_SAMPLE_BYTES, NAMED_FORMATS, Sample, SampleError, extension_of
from ray_jobs.io.file_systems import format_message, is_url
from ray_jobs.io.prefetch import map_in_order
from ray_jobs.io.web import call_patiently, open_url

FETCHES = 16  # images that are fetched at once; as many again wait to be used
DEADLINE = 60.0  # seconds for an image, with all pauses that its server asks for
SILENCE = 15.0  # seconds without a byte from a server
WEB = ("http://", "https://")
SHARD = re.compile(
    r"(?P<file>.*\.(?:parquet|pq)(?:\?[^#]*)?)#image=(?P<column>[^&#]+)(?:&base=(?P<base>[^&#]+))?", re.DOTALL
)


@dataclass(frozen=True)
class ImageColumn:
    """The column of a Parquet file that holds or names the images.

    Attributes:
        name: The column.
        folder: The folder or URL of relative paths.
        base: What the user gave as `--image-base`; None if relative paths start from the table's folder.
    """

    name: str
    folder: str
    base: str | None = None


def name_column(file: str, column: str, base: str | None) -> str:
    """Return the shard of a Parquet file whose images a column holds or names; see `ImageColumn`."""
    end = f"&base={quote(base.rstrip('/') or '/', safe='/:')}" if base else ""
    return f"{file}#image={quote(column, safe='')}{end}"


def split_shard(shard: str) -> tuple[str, ImageColumn | None]:
    """Return the file of a shard, and the column of its images if the shard's name has one.

    Example:
        >>> split_shard("/data/a.parquet#image=url")
        ('/data/a.parquet', ImageColumn(name='url', folder='/data', base=None))
    """
    match = SHARD.fullmatch(shard)
    if match is None:
        return shard, None
    file, base = match["file"], match["base"] and unquote(match["base"])
    folder = (file.partition("?")[0] if is_url(file) else file).rpartition("/")[0]
    return file, ImageColumn(unquote(match["column"]), base or folder, base)


def is_web(url: str) -> bool:
    """Return whether a URL is one of a web server. Its scheme may be in upper case.

    Example:
        >>> is_web("HTTP://host/x.jpg"), is_web("http/x.jpg")
        (True, False)
    """
    return url[: len(WEB[-1])].lower().startswith(WEB)


def resolve(reference: str, column: ImageColumn) -> str:
    """Return the absolute path or URL of an image.

    Args:
        reference: The value of the image's row: a URL, or a path.
        column: The column of the images.

    Raises:
        SampleError: If the row names no image, or an image that the table may not name; see the module.
    """
    shown = repr(reference[:200])
    if not reference.strip() or "\0" in reference:
        raise SampleError("the row names no image")
    if is_web(reference):
        return reference
    path = reference
    if is_url(path) or path.startswith(("/", "~", "file:", "\\")):
        below = f"{column.base.rstrip('/')}/" if column.base else None
        if below is None or not path.startswith(below):
            where = "--image-base" if column.base else "the table's folder; --image-base allows another"
            raise SampleError(f"{shown} is not below {where}")
        path = path.removeprefix(below)
    if ".." in re.split(r"[/\\]", path):
        raise SampleError(f"{shown} leaves its folder")
    path = quote(path) if is_web(column.folder) else path
    return f"{column.folder.rstrip('/')}/{path.removeprefix('./')}"


def fetch_references(samples: Iterable[Sample], column: ImageColumn | None) -> Generator[Sample, None, None]:
    """Yield samples in order, with the images that they name; those that cannot be fetched are rejected.

    `FETCHES` images are fetched at once, ahead of their use.
    """
    if column is None:
        yield from samples
        return
    stopped = threading.Event()
    with ExitStack() as stack:
        fetch_one = partial(fetch_sample, column=column, stopped=stopped)
        fetched = stack.enter_context(closing(map_in_order(fetch_one, samples, FETCHES)))
        stack.callback(stopped.set)  # first, so that closing does not wait for pauses
        for sample in fetched:  # noqa: UP028 - `yield from` would close the other generator first
            yield sample


def fetch_sample(sample: Sample, column: ImageColumn, stopped: threading.Event) -> Sample:
    """Return a sample with the image that it names; other samples are returned as they are."""
    if sample.reference is None or sample.rejection is not None:
        return sample
    try:
        where = resolve(sample.reference, column)
        data = fetch(where, stopped)
    except SampleError as error:
        return Sample(sample.key, rejection=str(error))
    extension = extension_of(urlsplit(where).path if is_url(where) else where)
    image = {extension if extension in NAMED_FORMATS else IMAGES[0]: data}
    return replace(sample, files=image | sample.files, reference=None)


def fetch(where: str, stopped: threading.Event) -> bytes:
    """Return the bytes of an image; busy servers are asked again within the deadline.

    Raises:
        SampleError: If it cannot be fetched in time, or is too large.
    """
    end = time.monotonic() + DEADLINE

    def pause(seconds: float) -> None:
        if stopped.wait(seconds):
            raise SampleError("the reader was closed")

    try:
        return call_patiently(lambda: read_image(where, end, stopped), DEADLINE, pause)
    except SampleError:
        raise
    except Exception as error:  # of any file system
        raise SampleError(f"{where[:200]} cannot be fetched ({format_message(error)})") from error


def read_image(where: str, end: float, stopped: threading.Event) -> bytes:
    """Return the bytes of a file or of a server's response, complete and of an allowed size."""
    if not is_url(where) and (problem := find_file_problem(where)):
        raise SampleError(f"{where[:200]}: {problem}")
    if is_web(where):
        with open_url(where, min(SILENCE, max(end - time.monotonic(), 0.1))) as response:
            return read_all(response, response.length, end, stopped)
    with open_source(where) as (file, size):
        return read_all(file, size, end, stopped)


def read_all(file: Any, size: int | None, end: float, stopped: threading.Event) -> bytes:
    """Return the content of a file of a given size, None if it is unknown, before a time."""
    data, read = bytearray(), getattr(file, "read1", file.read)  # `read` waits until all bytes are there
    while size is None or size <= MAX_SAMPLE_BYTES:
        chunk = read(CHUNK)
        data += chunk
        if not chunk:
            break
        if time.monotonic() > end or stopped.is_set():
            raise SampleError(f"not fetched within {DEADLINE:g} s")
        if len(data) > MAX_SAMPLE_BYTES:
            size = len(data)
    if size is not None and size > MAX_SAMPLE_BYTES:
        raise SampleError(f"it has more than {MAX_SAMPLE_BYTES} bytes")
    if size is not None and len(data) != size:
        raise SampleError(f"{len(data)} bytes were fetched, but its size is {size} bytes")
    return bytes(data)
