"""Standard streams that do not stop a job if they are closed, lose their reader, or cannot encode a character."""

import errno
import io
import os
import sys
from typing import Any

NO_READER = {errno.EPIPE, errno.EBADF, errno.EIO, errno.ECONNRESET}  # the pipe or terminal is closed


class Output(io.RawIOBase):
    """A file descriptor whose output is dropped if nobody can read it any more.

    Args:
        number: The file descriptor.
        drop_all: Whether to drop it after other errors too, such as a full disk. If not, they are raised.
    """

    def __init__(self, number: int, drop_all: bool) -> None:
        """Start without dropping anything."""
        self.number, self.drop_all, self.dropped = number, drop_all, False

    def writable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the file descriptor."""
        return self.number

    def isatty(self) -> bool:
        """Return whether the file descriptor is a terminal."""
        return os.isatty(self.number)

    def write(self, data: Any) -> int:
        """Write bytes, or drop them. Return their number."""
        if self.dropped:
            return len(data)
        try:
            return os.write(self.number, data)
        except OSError as error:
            if not (self.drop_all or error.errno in NO_READER):
                self.dropped = True  # the buffered rest must not fail again at exit
                raise
            self.dropped = True
            return len(data)


def use_utf8() -> None:
    """Restart this process in Python's UTF-8 mode if its locale has another encoding, so that all paths can be used."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def secure() -> None:
    """Make the standard streams of this process safe. Call it before anything opens a file."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which a data file would get otherwise
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = open_text(sys.stdout, 1, False), open_text(sys.stderr, 2, True)


def open_text(stream: Any, number: int, drop_all: bool) -> io.TextIOWrapper:
    """Return a text stream that writes to a file descriptor through `Output`.

    Args:
        stream: The stream that it replaces, which is flushed and gives the encoding; None: UTF-8. Characters that the
            encoding lacks are escaped.
        number: The file descriptor.
        drop_all: See `Output`.
    """
    if stream is not None:
        stream.flush()
    encoding = getattr(stream, "encoding", None) or "utf-8"
    buffer = io.BufferedWriter(Output(number, drop_all))
    return io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=True)
