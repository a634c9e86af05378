"""Files that several formats write: pictures in numbered folders, and JSON lists that are larger than the memory."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ray_jobs.views.export.samples import ExportedSample


def write_file(path: Path, content: bytes) -> None:
    """Write a file, and its folder if it is the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_picture(folder: Path, sample: ExportedSample) -> str:
    """Write the photograph of a sample to a folder, and return its path in there."""
    write_file(folder / sample.picture_name, sample.picture_file)
    return sample.picture_name


def finite(value: float | None) -> float | None:
    """Return a number; None if it is not finite, which JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None


class JsonList:
    """A list of JSON values in a temporary file, which are later copied into a JSON file.

    Args:
        path: The temporary file. It is deleted at the end of the `with` block.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0

    def __enter__(self) -> Self:
        """Open the file."""
        self.file = self.path.open("w", encoding="utf-8")
        return self

    def append(self, value: Mapping[str, Any]) -> None:
        """Add a value."""
        self.file.write((",\n" if self.count else "\n") + json.dumps(value, allow_nan=False))
        self.count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close and delete the file."""
        self.file.close()
        self.path.unlink(missing_ok=True)


def write_json_file(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object, of which some values may be a `JsonList`."""
    with path.open("w", encoding="utf-8") as file:
        for number, (name, value) in enumerate(values.items()):
            file.write(f"{',' if number else '{'}\n{json.dumps(name)}: ")
            if isinstance(value, JsonList):
                value.file.flush()
                file.write("[")
                with value.path.open(encoding="utf-8") as items:
                    shutil.copyfileobj(items, file)
                file.write("]")
            else:
                file.write(json.dumps(value, allow_nan=False))
        file.write("}\n")
