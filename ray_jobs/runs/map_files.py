"""A shard's explanations as files: which there are, and how each is written."""

import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from webdataset import TarWriter

from patterns import UserError
from patterns.attribution import picture, png
from patterns.io import temporary_path
from ray_jobs.data.shard_specs import output_names
from ray_jobs.io.object_store import Location, located

OUTPUTS = ("npy", "png", "parquet", "zarr")
MAX_ROW_GROUP = 64 << 20  # bytes of maps


@dataclass(frozen=True)
class Outputs:
    """Where a shard's explanations go: files of some kinds, and its table's rows, which are written last."""

    folder: Location
    name: str

    @property
    def tar(self) -> str:
        """Arrays and pictures, sample by sample."""
        return f"{self.name}.tar"

    @property
    def maps(self) -> str:
        """Arrays as a table."""
        return f"{self.name}.maps.parquet"

    @property
    def zarr(self) -> str:
        """Arrays as a group of zarr's, in a zip file."""
        return f"{self.name}.zarr.zip"

    @property
    def refused(self) -> str:
        """The samples that could not be used."""
        return f"{self.name}.refused.parquet"

    @property
    def rows(self) -> str:
        """The rows of explanations.parquet. With this file, the shard is done."""
        return f"{self.name}.parquet"


def outputs(run: str, shards: Sequence[str], kind: str = "explanations") -> dict[str, Outputs]:
    """The output files of each input shard: its own name, with as many folders as tell the shards apart."""
    folder = located(run) / kind
    paths = {shard: folder / name for shard, name in output_names(shards).items()}
    return {shard: Outputs(path.parent, path.name) for shard, path in paths.items()}


@dataclass(frozen=True)
class Explained:
    """What became of a batch.

    rows, summaries: of each sample, what is said of it in its json, and in the table, which says more.
    arrays: by method, float16 (N, …), the map being array · 2^exponent; (N, T, …) for several targets.
    exponents: by method, int (N,), or (N, T).
    """

    keys: list[str]
    rows: list[dict[str, Any]]
    summaries: list[dict[str, Any]]
    arrays: dict[str, np.ndarray]
    exponents: dict[str, np.ndarray]


class Writer(Protocol):
    """Takes a shard's batches in order."""

    def write(self, batch: Explained) -> None: ...


@contextmanager
def writers(folder: Path, out: Outputs, kinds: Sequence[str]) -> Iterator[list[Writer]]:
    """Writers of a shard's files of some kinds, which have their names once all is written."""
    table: dict[str, tuple[str, Callable[[Path], AbstractContextManager[Writer]]]] = {
        "tar": (out.tar, lambda path: tar_writer(path, [k for k in ("npy", "png") if k in kinds])),
        "parquet": (out.maps, parquet_writer),
        "zarr": (out.zarr, zarr_writer),
    }
    wanted = [kind for kind in table if kind in kinds or (kind == "tar" and {"npy", "png"} & set(kinds))]
    with ExitStack() as stack:
        paths = [stack.enter_context(temporary_path(folder / table[kind][0])) for kind in wanted]
        yield [stack.enter_context(table[kind][1](path)) for kind, path in zip(wanted, paths)]


@dataclass
class Tar:
    """WebDataset: for each sample `{key}.json`, `{key}.{method}.npy` and `{key}.{method}.png`."""

    tar: TarWriter
    kinds: list[str]

    def write(self, batch: Explained) -> None:
        for number, (key, row) in enumerate(zip(batch.keys, batch.rows)):
            exponents = {method: e[number].tolist() for method, e in batch.exponents.items()}
            files: dict[str, Any] = {"__key__": key, "json": json.dumps(row | {"exponents": exponents}).encode()}
            for method, arrays in batch.arrays.items():
                if "npy" in self.kinds:
                    buffer = io.BytesIO()
                    np.save(buffer, arrays[number], allow_pickle=False)
                    files[f"{method}.npy"] = buffer.getvalue()
                if "png" in self.kinds:
                    files[f"{method}.png"] = png(picture(method, beside(arrays[number])))
            self.tar.write(files)


def beside(array: np.ndarray) -> np.ndarray:
    """The maps of several targets (T, C, H, W) side by side, (C, H, T W), each as bright as it can be; one as it is."""
    if array.ndim == 3:
        return array
    largest = np.abs(array.astype(np.float32)).max((1, 2, 3), keepdims=True)
    scaled = array / np.where(largest > 0, largest, 1.0)
    return np.concatenate(list(scaled), -1)


@contextmanager
def tar_writer(path: Path, kinds: list[str]) -> Iterator[Writer]:
    with open(path, "wb") as file:
        # No time of writing, so that the same explanations are the same bytes.
        tar = TarWriter(file, encoder=False, mtime=0)
        yield Tar(tar, kinds)
        tar.close()


@dataclass
class Rows:
    """A table with one row a sample: its key, and for each method `{method}` and `{method}_exponent`.

    A map is a list of fixed size, row-major; its shape is in the schema's metadata.
    """

    path: Path
    stack: ExitStack
    writer: pq.ParquetWriter | None = None

    def write(self, batch: Explained) -> None:
        columns: dict[str, pa.Array] = {"key": pa.array(batch.keys, pa.string())}
        for method, arrays in batch.arrays.items():
            size = int(np.prod(arrays.shape[1:]))
            columns[method] = pa.FixedSizeListArray.from_arrays(pa.array(arrays.reshape(-1)), size)
            columns[f"{method}_exponent"] = exponent_column(batch.exponents[method])
        shapes = {f"{method}_shape": json.dumps(a.shape[1:]) for method, a in batch.arrays.items()}
        table = pa.table(columns).replace_schema_metadata(shapes)
        if self.writer is None:
            self.writer = self.stack.enter_context(pq.ParquetWriter(self.path, table.schema))
        rows = max(1, MAX_ROW_GROUP // max(1, table.nbytes // max(1, len(table))))
        self.writer.write_table(table, row_group_size=rows)


def exponent_column(exponents: np.ndarray) -> pa.Array:
    flat = pa.array(exponents.reshape(-1).astype(np.int32))
    return flat if exponents.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, exponents.shape[1])


@contextmanager
def parquet_writer(path: Path) -> Iterator[Writer]:
    with ExitStack() as stack:
        rows = Rows(path, stack)
        yield rows
        if rows.writer is None:  # a shard none of whose samples could be used
            pq.write_table(pa.table({"key": pa.array([], pa.string())}), path)


@dataclass
class Zarr:
    """A group of zarr's: arrays `{method}` (N, …) and `{method}_exponent`, and the keys among its attributes."""

    group: Any
    keys: list[str]

    def write(self, batch: Explained) -> None:
        self.keys += batch.keys
        for method, arrays in batch.arrays.items():
            for name, values in ((method, arrays), (f"{method}_exponent", batch.exponents[method].astype(np.int32))):
                if name not in self.group:
                    shape = (0, *values.shape[1:])
                    self.group.create_array(name, shape=shape, chunks=values.shape, dtype=values.dtype)
                self.group[name].append(values)


@contextmanager
def zarr_writer(path: Path) -> Iterator[Writer]:
    zarr = import_zarr()
    with TemporaryDirectory() as folder:
        group = zarr.create_group(folder)
        written = Zarr(group, [])
        yield written
        group.attrs["keys"] = written.keys
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # chunks are compressed
            for file in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
                info = zipfile.ZipInfo(file.relative_to(folder).as_posix())  # of 1980: the same bytes each time
                archive.writestr(info, file.read_bytes())


def import_zarr() -> Any:
    try:
        import zarr
    except ImportError as error:
        raise UserError("--output zarr", "zarr is not installed", "pip install 'patternnet-ray[zarr]'.") from error
    return zarr


def bytes_per_sample(shapes: Mapping[str, Sequence[int]], kinds: Sequence[str]) -> dict[str, int]:
    """At most how many bytes a sample takes in each kind of output, by the shape of each method's maps."""
    values = {method: int(np.prod(shape)) for method, shape in shapes.items()}
    pixels = {method: 3 * values[method] // shape[-3] for method, shape in shapes.items()}
    most = {
        "npy": sum(2 * n + 1024 for n in values.values()),  # a tar's header, the array's, and padding
        "png": sum(n + 1024 for n in pixels.values()),
        "parquet": sum(2 * n for n in values.values()),
        "zarr": sum(2 * n for n in values.values()),
    }
    return {kind: most[kind] for kind in OUTPUTS if kind in kinds}
