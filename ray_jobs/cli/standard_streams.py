"""Standard streams that cannot stop a job: closed ones, readers that went away, and encodings that lack a letter."""

import errno
import io
import os
import sys
from typing import Any

GONE = {errno.EPIPE, errno.EBADF, errno.EIO, errno.ECONNRESET}  # no reader is left: the pipe or terminal is closed


class Output(io.RawIOBase):
    """A file descriptor whose output is dropped once nobody can read it.

    Args:
        number: The file descriptor.
        drop_all: Whether to drop it after other errors too, such as a full disk; else they are raised.
    """

    def __init__(self, number: int, drop_all: bool) -> None:
        self.number, self.drop_all, self.dropped = number, drop_all, False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.number

    def isatty(self) -> bool:
        return os.isatty(self.number)

    def write(self, data: Any) -> int:
        if self.dropped:
            return len(data)
        try:
            return os.write(self.number, data)
        except OSError as error:
            if not (self.drop_all or error.errno in GONE):
                self.dropped = True  # what is buffered must not fail again at exit
                raise
            self.dropped = True
            return len(data)


def use_utf8() -> None:
    """Start this process anew in Python's UTF-8 mode, if its locale has no letters but ASCII: paths hold others."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def secure() -> None:
    """Make the standard streams of this process safe. To be called before anything opens a file."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, so that no data file gets it
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = text(sys.stdout, 1, False), text(sys.stderr, 2, True)


def text(stream: Any, number: int, drop_all: bool) -> io.TextIOWrapper:
    """Return a text stream in the place of another one, with its encoding; letters that it lacks are escaped."""
    if stream is not None:
        stream.flush()
    encoding = getattr(stream, "encoding", None) or "utf-8"
    buffer = io.BufferedWriter(Output(number, drop_all))
    return io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=True)
