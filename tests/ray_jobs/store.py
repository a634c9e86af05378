"""File system in memory whose operations fail from the n-th on, with different errors."""

import errno
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

ERRORS: tuple[Exception, ...] = (
    OSError(errno.ENOSPC, "No space left on device"),
    PermissionError("Forbidden"),
    ConnectionError("connection reset by peer"),
    TimeoutError("timed out"),
    ValueError("an error of the store\nin two lines"),
    type("ClientError", (Exception,), {})("An error occurred (503)"),
)


class FailingFileSystem(MemoryFileSystem):
    """Objects at failing://…; the operations from number `fail_at` on fail, or none if it is None."""

    protocol = "failing"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    count = 0
    fail_at: int | None = None

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).replace("failing://", "memory://"))

    @classmethod
    def reset(cls, fail_at: int | None = None) -> None:
        cls.count, cls.fail_at = 0, fail_at


def failing(name: str) -> Any:
    """Return an operation of a file system in memory that fails if `fail_at` is reached."""
    operation = getattr(MemoryFileSystem, name)

    def operate(self: FailingFileSystem, *arguments: Any, **options: Any) -> Any:
        cls = FailingFileSystem
        cls.count += 1
        if cls.fail_at is not None and cls.count >= cls.fail_at:
            raise ERRORS[cls.count % len(ERRORS)]
        return operation(self, *arguments, **options)

    return operate


for each in ("info", "ls", "cat_file", "_open", "put_file", "get_file", "rm_file", "find", "glob", "exists", "isfile"):
    setattr(FailingFileSystem, each, failing(each))
fsspec.register_implementation("failing", FailingFileSystem, clobber=True)
