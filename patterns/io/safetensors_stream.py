"""Files of named tensors in the safetensors format, written and read one tensor at a time.

The format's own library wants all tensors of a file in memory before it writes, and a file on this
machine to read. Moments may be larger than what is free, and lie where only ranges of bytes can be had.
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

# Type and shape of each tensor by name, in the order in which they lie in the file.
Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]
DTYPES = {"F32": torch.float32, "F64": torch.float64, "I64": torch.int64}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LARGEST_HEADER = 100 << 20  # bytes, the format's own limit


def tensor_specs(tensors: Mapping[str, Tensor]) -> Specs:
    """Types and shapes of some tensors."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write_tensors(path: Path, specs: Specs, tensors: Iterable[Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file of tensors that come one by one, in the order of their specs.

    ValueError for a tensor of another type or shape, and for too few or too many.
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
                raise ValueError(f"{name}: {tensor.dtype} of shape {tuple(tensor.shape)} where {spec} was announced")
            if tensor.numel():
                file.write(as_bytes(tensor.cpu().contiguous()))


class Opened(Protocol):
    """A path, of this machine or another."""

    def open(self, mode: Literal["rb"]) -> Any: ...


class TensorFile:
    """An open file of tensors; nothing is read but its header and what is asked for.

    specs: types and shapes by name.  metadata: what was written beside them.
    UserError where it is no whole file of this format.
    """

    def __init__(self, path: Opened) -> None:
        self.where = str(path)
        try:
            self._file: BinaryIO = path.open("rb")
        except FileNotFoundError as error:
            raise UserError(self.where, "no such file", "Delete the run's moments/ and fit again.") from error
        try:
            self.specs, self.metadata, self._starts = read_header(self._file)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._file.close()
            what = f"not a whole file of tensors ({error})"
            raise UserError(self.where, what, "Delete the run's moments/ and fit again.") from error

    def get(self, name: str) -> Tensor:
        """One tensor. KeyError where there is none of this name."""
        dtype, shape = self.specs[name]
        tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel():
            self._file.seek(self._starts[name])
            left = as_bytes(tensor)
            while count := self._file.readinto(left):  # type: ignore[attr-defined]
                left = left[count:]
            if left:
                raise EOFError(f"{name}: {len(left)} bytes are missing")
        return tensor

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()


def read_header(file: BinaryIO) -> tuple[Specs, dict[str, str], dict[str, int]]:
    """Specs, metadata, and where in the file each tensor begins. ValueError and its like for anything else."""
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
            raise ValueError(f"{name} lies at {entry['data_offsets']}")
        specs[name], starts[name] = (dtype, shape), 8 + length + end
        end = entry["data_offsets"][1]
    if 8 + length + end != size:
        raise ValueError(f"{size} bytes instead of {8 + length + end}")
    return specs, metadata, starts


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
