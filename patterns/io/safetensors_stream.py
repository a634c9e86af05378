"""Files of named tensors in the safetensors format, written and read one tensor at a time.

The safetensors library needs all tensors of a file in memory to write it, and a local file to read. Moments may be
larger than the free memory, and be in an object store that serves ranges of bytes.
"""

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Protocol

import torch
from torch import Tensor

from patterns.errors import UserError

# Dtype and shape of each tensor by name, in the order of the tensors in the file.
Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LARGEST_HEADER = 100 << 20  # bytes; the limit of the format
REMEDY = "Delete the folder moments/ of the run and fit again."


def tensor_specs(tensors: Mapping[str, Tensor]) -> Specs:
    """Return the dtypes and shapes of tensors by name."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write_tensors(path: Path, specs: Specs, tensors: Iterable[Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors that come one by one to a safetensors file.

    Args:
        path: The file. It is not written atomically.
        specs: The dtype and shape of each tensor by name.
        tensors: The tensors in the order of `specs`.
        metadata: Texts to write to the header.

    Raises:
        ValueError: If a tensor has another dtype or shape than announced, or if there are more or fewer tensors.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "file"
        ...     write_tensors(path, {"one": (torch.float32, (3,))}, iter([torch.ones(3)]), {"by": "me"})
        ...     with TensorFile(path) as file:
        ...         file.metadata, file.get("one")
        ({'by': 'me'}, tensor([1., 1., 1.]))
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in specs.items():
        start, end = end, end + dtype.itemsize * prod(shape)
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for (name, spec), tensor in zip(specs.items(), tensors, strict=True):
            if (tensor.dtype, tuple(tensor.shape)) != spec:
                raise ValueError(f"{name}: {tensor.dtype} of shape {tuple(tensor.shape)}, but {spec} was announced")
            if tensor.numel():
                file.write(view_bytes(tensor.cpu().contiguous()))


class Openable(Protocol):
    """A local or remote path."""

    def open(self, mode: Literal["rb"]) -> Any:
        """Open the file to read bytes."""


class TensorFile:
    """An open safetensors file; only its header is read until a tensor is requested.

    Attributes:
        where: The path, for messages.
        specs: Dtypes and shapes by name.
        metadata: The texts in the header.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "file"
        ...     write_tensors(path, {"one": (torch.float32, (3,))}, [torch.ones(3)], {})
        ...     with TensorFile(path) as file:
        ...         file.specs
        {'one': (torch.float32, (3,))}
    """

    def __init__(self, path: Openable) -> None:
        """Open a file and read its header. Raise UserError if there is no file, or if it is not complete."""
        self.where = str(path)
        try:
            self._file: BinaryIO = path.open("rb")
        except FileNotFoundError as error:
            raise UserError(self.where, "no such file", REMEDY) from error
        try:
            self.specs, self.metadata, self._starts = read_header(self._file)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._file.close()
            raise UserError(self.where, f"not a complete file of tensors ({error})", REMEDY) from error

    def get(self, name: str) -> Tensor:
        """Read a tensor.

        Raises:
            KeyError: If there is no tensor of this name.
            EOFError: If the file was truncated after it was opened.
        """
        dtype, shape = self.specs[name]
        tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel():
            self._file.seek(self._starts[name])
            remaining = view_bytes(tensor)
            while count := self._file.readinto(remaining):  # type: ignore[attr-defined]
                remaining = remaining[count:]
            if remaining:
                raise EOFError(f"{name}: {len(remaining)} bytes are missing")
        return tensor

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()


def read_header(file: BinaryIO) -> tuple[Specs, dict[str, str], dict[str, int]]:
    """Read the header of a file.

    Returns:
        The dtype and shape of each tensor by name, the metadata, and the byte at which each tensor begins.

    Raises:
        ValueError: If the sizes or offsets in the file do not fit together, or the header is not JSON.
        KeyError: If the entry of a tensor lacks a field, or its dtype is unknown.
    """
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(LARGEST_HEADER, size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    specs: Specs = {}
    starts: dict[str, int] = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        if entry["data_offsets"] != [end, end + dtype.itemsize * prod(shape)] or not all(n >= 0 for n in shape):
            raise ValueError(f"{name} is at {entry['data_offsets']}")
        specs[name], starts[name] = (dtype, shape), 8 + length + end
        end = entry["data_offsets"][1]
    if 8 + length + end != size:
        raise ValueError(f"{size} bytes instead of {8 + length + end}")
    return specs, metadata, starts


def view_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
