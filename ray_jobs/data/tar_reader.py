"""The bytes of a tar → samples, as webdataset groups them.

Python's tarfile takes a damaged header in the middle for the end of the archive, reads extended headers
of any size into memory, and webdataset raises on a name that comes twice; so the headers are walked here.
"""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from ray_jobs.data.samples import MAX_SAMPLE_BYTES, Sample, ShardError
from ray_jobs.units import make_printable

BLOCK = tarfile.BLOCKSIZE
MAX_HEADER_BYTES = 1 << 20  # of one extended header; a path in it has some hundred bytes
FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
PAX_HEADERS = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
RECORD = re.compile(rb"(\d{1,20}) ([^=]+)=")
NAME = re.compile(r"((?:.*/)?[^./]+)\.((?!__)[^/]*)", re.DOTALL)  # key, extension; `__` is for what is no file
META = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class Member:
    """An entry of an archive: its name, its size in bytes, and why it is no plain file, where it is none."""

    name: str
    size: int
    trouble: str | None


class Archive:
    """The members of a tar, one after the other; `read` gives the bytes of the current one.

    Raises ShardError unless everything up to the end-of-archive mark is sound, and nothing but zeros follows.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.unread = 0  # bytes before the next header

    def __iter__(self) -> Iterator[Member]:
        while (member := self.next()) is not None:
            yield member
        while rest := self.stream.read(1 << 16):
            if rest.strip(b"\0"):
                raise ShardError("data after its end-of-archive mark, as where archives were joined by cat")

    def read(self, size: int) -> bytes:
        """The first `size` bytes of the current member."""
        data = self.take(size)
        self.unread -= size
        return data

    def take(self, size: int) -> bytes:
        data = self.stream.read(size)
        if len(data) < size:
            raise ShardError("it was cut short: it ends within a member")
        return data

    def next(self) -> Member | None:
        """The next member; None at the end-of-archive mark."""
        while self.unread:  # not sought: not every stream can
            skipped = min(self.unread, 1 << 16)
            self.read(skipped)
        extended: dict[str, str] = {}
        while (header := self.header()) is not None:
            if header.type in PAX_HEADERS:
                extended |= parse_pax_records(self.extension(header))
            elif header.type == tarfile.GNUTYPE_LONGNAME:
                name, end, _ = self.extension(header).partition(b"\0")
                if not end:
                    raise ShardError("a damaged extended header")
                extended["path"] = name.decode("utf-8", "surrogateescape")
            elif header.type in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
                self.extension(header)
            else:
                return self.member(header, extended)
        if extended:
            raise ShardError("an extended header that no member follows")
        return None

    def header(self) -> tarfile.TarInfo | None:
        block = self.stream.read(BLOCK)
        if not block:
            raise ShardError("it ends without its end-of-archive mark: it was cut short")
        if not block.strip(b"\0") and len(block) == BLOCK:
            return None
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ShardError(f"not a tar archive, or a damaged one: {error}") from error
        if header.size < 0:
            raise ShardError("a member of negative size")
        if header.type == tarfile.GNUTYPE_SPARSE:
            more = block[482]  # whether further blocks of its map follow, as in the last byte used of each
            while more:
                more = self.take(BLOCK)[504]
        return header

    def extension(self, header: tarfile.TarInfo) -> bytes:
        """The contents of an extended header."""
        if header.size > MAX_HEADER_BYTES:
            raise ShardError(f"an extended header of {header.size} bytes; at most {MAX_HEADER_BYTES} are read")
        return self.take(pad_size(header.size))[: header.size]

    def member(self, header: tarfile.TarInfo, extended: dict[str, str]) -> Member:
        name, size, trouble = extended.get("path", header.name), header.size, None
        if "size" in extended:
            if not extended["size"].isdecimal():
                raise ShardError(f"a member's size is {extended['size'][:20]!r}")
            size = int(extended["size"])
        if header.type in WITHOUT_DATA:
            size, trouble = 0, "a link or a device, not a file"
        elif header.type == tarfile.GNUTYPE_SPARSE or any(k.startswith("GNU.sparse.") for k in extended):
            name, trouble = extended.get("GNU.sparse.name", name), "a sparse file"
        elif header.type not in FILES:
            trouble = f"a member of unknown type {header.type!r}"
        self.unread = pad_size(size)
        return Member(name, size, trouble)


def pad_size(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def parse_pax_records(data: bytes) -> dict[str, str]:
    """The records of a pax header: LENGTH KEYWORD=VALUE."""
    found = {}
    position = 0
    while data[position:].strip(b"\0"):
        match = RECORD.match(data, position)
        end = position + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise ShardError("a damaged extended header")
        keyword, value = match[2], data[match.end() : end - 1]
        found[keyword.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        position = end
    return found


def find_name_problem(name: str) -> str | None:
    """Why a file's name must not become a key, after which outputs are named; None if it may."""
    if name.startswith("/") or ".." in name.split("/"):
        return "its path leads out of the folder"
    if any(ord(c) < 32 or ord(c) == 127 for c in name):
        return "control characters in its name"
    return None


def read_samples(stream: BinaryIO) -> Iterator[Sample]:
    """The samples of a tar: neighbours with the same name up to the first dot of its last component.

    Directories, hidden files, files without an extension and webdataset's `__…__` files are passed over.
    """
    archive = Archive(stream)
    key, files, rejection, room = "", dict[str, bytes](), None, 0
    for member in archive:
        match = NAME.fullmatch(member.name)
        if match is None or META.match(member.name):
            continue
        name, extension = make_printable(match[1]), match[2].lower()
        if name != key or extension in files:
            if files:
                yield Sample(key, files, rejection)
            key, files, rejection, room = name, {}, None, MAX_SAMPLE_BYTES
        room -= member.size + BLOCK
        trouble = member.trouble or find_name_problem(member.name)
        if room < 0:
            trouble = f"its files have more than {MAX_SAMPLE_BYTES} bytes"
        if trouble and rejection is None:
            rejection = f"{make_printable(extension)}: {trouble}"
        files[extension] = b"" if trouble else archive.read(member.size)
    if files:
        yield Sample(key, files, rejection)
