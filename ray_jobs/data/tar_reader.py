"""Tar archives: read their samples, grouped as WebDataset groups them.

This module replaces three stages of webdataset. Its tar expander uses Python's tarfile, which takes a damaged header
for the end of the archive and reads extended headers of any size into memory. Its `group_by_keys` holds samples of any
size, and a repeated name ends the shard. Its opener does not compare the number of bytes with the size of the file.
"""

import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from ray_jobs.data.byte_streams import open_stream
from ray_jobs.data.samples import KEY, MAX_SAMPLE_BYTES, REJECTION, REPLACE, ShardError
from ray_jobs.io.file_systems import translate_errors
from ray_jobs.units import make_printable

BLOCK = tarfile.BLOCKSIZE
MAX_HEADER_BYTES = 1 << 20  # of one extended header; paths have a few hundred bytes
FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
PAX_HEADERS = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
RECORD = re.compile(rb"(\d{1,20}) ([^=]+)=")
NAME = re.compile(r"((?:.*/)?[^./]+)\.((?!__)[^/]*)", re.DOTALL)  # key, extension; `__` begins WebDataset's metadata
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
META = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class Member:
    """An entry of an archive.

    Attributes:
        name: Its path.
        size: Its size in bytes.
        problem: Why it is not a regular file; None if it is.
    """

    name: str
    size: int
    problem: str | None


class Archive:
    """Iterator over the members of a tar archive, without its directories.

    Iteration raises a ShardError if anything up to the end-of-archive mark is damaged, or anything but zeros follows.
    """

    def __init__(self, stream: BinaryIO) -> None:
        """Read from a stream, which need not be seekable."""
        self.stream = stream
        self.unread = 0  # bytes before the next header

    def __iter__(self) -> Iterator[Member]:
        """Yield the members in order."""
        while (member := self.next()) is not None:
            yield member
        while rest := self.stream.read(1 << 16):
            if rest.strip(b"\0"):
                raise ShardError("there is data after its end-of-archive mark; archives cannot be joined by cat")

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes of the current member."""
        data = self.read_exactly(size)
        self.unread -= size
        return data

    def read_exactly(self, size: int) -> bytes:
        """Return `size` bytes of the stream; raise ShardError if it ends before."""
        data = self.stream.read(size)
        if len(data) < size:
            raise ShardError("it is truncated: it ends within a member")
        return data

    def next(self) -> Member | None:
        """Return the next member; None at the end-of-archive mark."""
        while self.unread:  # read instead of seek, because streams need not be seekable
            self.read(min(self.unread, 1 << 16))
        extended: dict[str, str] = {}
        while (header := self.read_header()) is not None:
            if header.type in PAX_HEADERS:
                extended |= parse_pax_records(self.read_extension(header))
            elif header.type == tarfile.GNUTYPE_LONGNAME:
                name, end, _ = self.read_extension(header).partition(b"\0")
                if not end:
                    raise ShardError("an extended header is damaged")
                extended["path"] = name.decode("utf-8", "surrogateescape")
            elif header.type in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
                self.read_extension(header)
            elif header.type == tarfile.DIRTYPE:
                extended = {}
            else:
                return self.make_member(header, extended)
        if extended:
            raise ShardError("no member follows an extended header")
        return None

    def read_header(self) -> "Header | None":
        """Return the next header; None for a block of zeros, which marks the end of the archive."""
        block = self.stream.read(BLOCK)
        if not block:
            raise ShardError("it is truncated: it ends without an end-of-archive mark")
        if len(block) < BLOCK:
            raise ShardError("not a tar archive, or damaged: truncated header")
        if not block.strip(b"\0"):
            return None
        header = parse_header(block)
        if header.type == tarfile.GNUTYPE_SPARSE:
            more = block[482]  # whether another block of the sparse map follows, as byte 504 of that block says
            while more:
                more = self.read_exactly(BLOCK)[504]
        return header

    def read_extension(self, header: "Header") -> bytes:
        """Return the contents of an extended header."""
        if header.size > MAX_HEADER_BYTES:
            raise ShardError(f"an extended header of {header.size} bytes; at most {MAX_HEADER_BYTES} are read")
        return self.read_exactly(pad_size(header.size))[: header.size]

    def make_member(self, header: "Header", extended: dict[str, str]) -> Member:
        """Return the member of a header and the extended headers before it."""
        name, size, problem = extended.get("path", header.name), header.size, None
        if "size" in extended:
            if not extended["size"].isdecimal():
                raise ShardError(f"a member's size is {extended['size'][:20]!r}")
            size = int(extended["size"])
        if header.type in WITHOUT_DATA:
            size, problem = 0, "a link or a device, not a file"
        elif header.type == tarfile.GNUTYPE_SPARSE or any(k.startswith("GNU.sparse.") for k in extended):
            name, problem = extended.get("GNU.sparse.name", name), "a sparse file"
        elif header.type not in FILES:
            problem = f"a member of unknown type {header.type!r}"
        self.unread = pad_size(size)
        return Member(name, size, problem)


class Header(NamedTuple):
    """A header block: the name, size and type of the member or extended header that follows."""

    name: str
    size: int
    type: bytes


def parse_header(block: bytes) -> Header:
    """Return the fields of a header block that are needed.

    `tarfile.TarInfo.frombuf` parses 13 fields, which takes half of the time that a shard of JPEGs is read for.

    Raises:
        ShardError: If the block is not a header, or its checksum is wrong.
    """
    size, checksum = parse_number(block[124:136]), parse_number(block[148:156])
    total = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if checksum != total and checksum != total - 256 * sum(byte > 127 for byte in block):  # of signed bytes
        raise ShardError("not a tar archive, or damaged: bad checksum")
    if size < 0:
        raise ShardError("a member has a negative size")
    kind, name, prefix = block[156:157], parse_text(block[:100]), parse_text(block[345:500])
    if prefix and kind not in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.GNUTYPE_SPARSE):
        name = f"{prefix}/{name}"
    is_folder = kind == tarfile.AREGTYPE and name.endswith("/")
    return Header(name, size, tarfile.DIRTYPE if is_folder else kind)


def parse_text(field: bytes) -> str:
    """Return a text field of a header; bytes that are not UTF-8 become surrogate escapes."""
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def parse_number(field: bytes) -> int:
    """Return a number field of a header: octal digits, or GNU's binary form. Raise ShardError if it is neither."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:]) - (field[0] == 0xFF) * 256 ** (len(field) - 1)
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError as error:
        raise ShardError("not a tar archive, or damaged: invalid header") from error


def pad_size(size: int) -> int:
    """Round a size up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def parse_pax_records(data: bytes) -> dict[str, str]:
    """Return the records `LENGTH KEYWORD=VALUE` of a pax header."""
    found = {}
    position = 0
    while data[position:].strip(b"\0"):
        match = RECORD.match(data, position)
        end = position + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise ShardError("an extended header is damaged")
        keyword, value = match[2], data[match.end() : end - 1]
        found[keyword.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        position = end
    return found


def find_name_problem(name: str) -> str | None:
    """Return why a file name cannot be a key, which names outputs; None if it can."""
    if name.startswith("/") or ".." in name.split("/"):
        return "its path leaves the folder"
    if CONTROL.search(name):
        return "its name has control characters"
    return None


def read_samples(stream: BinaryIO) -> Iterator[dict[str, Any]]:
    """Yield the samples of a tar archive; see `verified_tar`, which adds `__url__`."""
    archive = Archive(stream)
    sample, rejection, room = dict[str, Any](), None, 0
    for member in archive:
        match = NAME.fullmatch(member.name)
        if match is None or META.match(member.name):
            continue
        key, extension = make_printable(match[1]), match[2].lower()
        if key != sample.get(KEY) or extension in sample:
            if sample:
                yield sample if rejection is None else {KEY: sample[KEY], REJECTION: rejection}
            sample, rejection, room = {KEY: key}, None, MAX_SAMPLE_BYTES
        room -= member.size + BLOCK
        problem = member.problem or find_name_problem(member.name)
        if room < 0:
            problem = f"its files have more than {MAX_SAMPLE_BYTES} bytes"
        if problem and rejection is None:
            rejection = f"{make_printable(extension)}: {problem}"
        sample[extension] = b"" if problem else archive.read(member.size)
    if sample:
        yield sample if rejection is None else {KEY: sample[KEY], REJECTION: rejection}


def verified_tar(sources: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Stage of a `webdataset.DataPipeline` that reads tar archives and verifies that they are complete.

    It takes the place of `webdataset.tarfile_to_samples()`. A sample is a run of members whose paths are equal up to
    the first dot of the last component. Directories, hidden files, files without an extension and WebDataset's `__…__`
    files are skipped.

    Args:
        sources: Dictionaries with the `url` of an archive, as `webdataset.SimpleShardList` yields them: a path, a URL
            of fsspec, or `pipe:COMMAND`. gzip, bzip2, xz and zstd are decompressed.

    Yields:
        The samples as WebDataset yields them: `__key__`, `__url__`, and the bytes of each file by its extension in
        lower case. A sample that must not be used has `__rejection__`, the reason, in place of its files: one of its
        members is a link, a device or a sparse file, its path leaves the folder or has control characters, or its
        files have more than 128 MiB. A repeated name begins a sample with the same key.

    Raises:
        UserError: If an archive is damaged or incomplete, after the samples before the damage; `where` is its URL.

    Example:
        >>> import io, tarfile, tempfile, webdataset
        >>> shard = f"{tempfile.mkdtemp()}/0.tar"
        >>> with tarfile.open(shard, "w") as tar:
        ...     tar.addfile(tarfile.TarInfo("cat.jpg"), io.BytesIO())
        >>> pipeline = webdataset.DataPipeline(webdataset.SimpleShardList([shard]), verified_tar)
        >>> [(sample["__key__"], sample["jpg"]) for sample in pipeline]
        [('cat', b'')]
    """
    for source in sources:
        url = source["url"]
        with translate_errors(url, remedy=REPLACE), open_stream(url) as stream:
            for sample in read_samples(stream):
                yield {KEY: sample.pop(KEY), "__url__": url, **sample}
