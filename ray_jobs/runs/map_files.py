"""The files of a shard's explanations, and how each is written."""

import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from webdataset import TarWriter

from patterns.attribution import encode_png, render_map
from patterns.io import temporary_path
from ray_jobs.config import OUTPUTS
from ray_jobs.data.shard_specs import name_outputs
from ray_jobs.io.extras import import_extra
from ray_jobs.io.object_store import Location, locate
from ray_jobs.io.prefetch import map_in_order

MAX_ROW_GROUP = 64 << 20  # bytes of maps


@dataclass(frozen=True)
class ShardFiles:
    """The files that a job writes for one shard.

    Attributes:
        folder: The folder of the files.
        name: The name that they share, without an extension.
    """

    folder: Location
    name: str

    @property
    def tar(self) -> str:
        """The file of arrays and pictures, sample by sample."""
        return f"{self.name}.tar"

    @property
    def maps(self) -> str:
        """The file of arrays as a Parquet table."""
        return f"{self.name}.maps.parquet"

    @property
    def zarr(self) -> str:
        """The file of arrays as a Zarr group in a zip archive."""
        return f"{self.name}.zarr.zip"

    @property
    def rejected(self) -> str:
        """The table of rejected samples."""
        return f"{self.name}.refused.parquet"

    @property
    def rows(self) -> str:
        """The table of a row for each sample. It is written last: with this file, the shard is finished."""
        return f"{self.name}.parquet"


def list_shard_files(run: str, shards: Sequence[str], folder: str = "explanations") -> dict[str, ShardFiles]:
    """Return the files of each shard, named as the shard with the parent folders that distinguish it from others.

    Args:
        run: The run's folder or URL.
        shards: The shards.
        folder: The folder in the run.
    """
    parent = locate(run) / folder
    paths = {shard: parent / name for shard, name in name_outputs(shards).items()}
    return {shard: ShardFiles(path.parent, path.name) for shard, path in paths.items()}


@dataclass(frozen=True)
class ExplainedBatch:
    """The explanations of a batch.

    Attributes:
        keys: The keys of the samples.
        rows: Label, prediction, target and score of each sample, for its JSON file.
        summaries: The rows with the statistics of the maps, for the table.
        arrays: By method, float16 (N, …), or (N, T, …) for several targets; the explanation is array · 2^exponent.
        exponents: By method, int (N,), or (N, T) for several targets.
    """

    keys: list[str]
    rows: list[dict[str, Any]]
    summaries: list[dict[str, Any]]
    arrays: dict[str, np.ndarray]
    exponents: dict[str, np.ndarray]


class Writer(Protocol):
    """Writes the batches of a shard in order."""

    def write(self, batch: ExplainedBatch) -> None:
        """Write a batch."""


@contextmanager
def open_writers(folder: Path, files: ShardFiles, outputs: Sequence[str], threads: int = 1) -> Iterator[list[Writer]]:
    """Open the writers of a shard's files, which get their names once they are complete.

    Args:
        folder: The folder to write to.
        files: The names of the files.
        outputs: Some of OUTPUTS.
        threads: The number of threads that encode arrays and pictures.
    """
    table: dict[str, tuple[str, Callable[[Path], AbstractContextManager[Writer]]]] = {
        "tar": (files.tar, lambda path: open_tar(path, [k for k in ("npy", "png") if k in outputs], threads)),
        "parquet": (files.maps, open_parquet),
        "zarr": (files.zarr, open_zarr),
    }
    wanted = [kind for kind in table if kind in outputs or (kind == "tar" and {"npy", "png"} & set(outputs))]
    with ExitStack() as stack:
        paths = [stack.enter_context(temporary_path(folder / table[kind][0])) for kind in wanted]
        yield [stack.enter_context(table[kind][1](path)) for kind, path in zip(wanted, paths)]


@dataclass
class TarMaps:
    """A WebDataset with `{key}.json`, `{key}.{method}.npy` and `{key}.{method}.png` for each sample."""

    tar: TarWriter
    outputs: list[str]
    threads: int

    def write(self, batch: ExplainedBatch) -> None:
        """Write a batch."""
        for files in map_in_order(partial(self.encode_sample, batch), range(len(batch.keys)), self.threads):
            self.tar.write(files)

    def encode_sample(self, batch: ExplainedBatch, number: int) -> dict[str, Any]:
        """Return the files of a sample of a batch."""
        exponents = {method: e[number].tolist() for method, e in batch.exponents.items()}
        row = json.dumps(batch.rows[number] | {"exponents": exponents})
        files: dict[str, Any] = {"__key__": batch.keys[number], "json": row.encode()}
        for method, arrays in batch.arrays.items():
            if "npy" in self.outputs:
                buffer = io.BytesIO()
                np.save(buffer, arrays[number], allow_pickle=False)
                files[f"{method}.npy"] = buffer.getvalue()
            if "png" in self.outputs:
                files[f"{method}.png"] = encode_png(render_map(method, tile_targets(arrays[number])))
        return files


def tile_targets(array: np.ndarray) -> np.ndarray:
    """Return the maps of several targets side by side, each scaled to the same largest value.

    Args:
        array: (T, C, H, W), or the map of a single target (C, H, W), which is returned unchanged.

    Returns:
        (C, H, T·W).
    """
    if array.ndim == 3:
        return array
    largest = np.abs(array.astype(np.float32)).max((1, 2, 3), keepdims=True)
    scaled = array / np.where(largest > 0, largest, 1.0)
    return np.concatenate(list(scaled), -1)


@contextmanager
def open_tar(path: Path, outputs: list[str], threads: int) -> Iterator[Writer]:
    """Open a writer of a tar."""
    # Without the time of writing, the same explanations are the same bytes.
    with open(path, "wb") as file, closing(TarWriter(file, encoder=False, mtime=0)) as tar:
        yield TarMaps(tar, outputs, threads)


@dataclass
class ParquetMaps:
    """A table with a row for each sample: its key, and for each method `{method}` and `{method}_exponent`.

    A map is a list of fixed size, row-major; its shape is in the schema's metadata.
    """

    path: Path
    stack: ExitStack
    writer: pq.ParquetWriter | None = None

    def write(self, batch: ExplainedBatch) -> None:
        """Write a batch."""
        columns: dict[str, pa.Array] = {"key": pa.array(batch.keys, pa.string())}
        for method, arrays in batch.arrays.items():
            size = int(np.prod(arrays.shape[1:]))
            columns[method] = pa.FixedSizeListArray.from_arrays(pa.array(arrays.reshape(-1)), size)
            columns[f"{method}_exponent"] = to_column(batch.exponents[method])
        shapes = {f"{method}_shape": json.dumps(a.shape[1:]) for method, a in batch.arrays.items()}
        table = pa.table(columns).replace_schema_metadata(shapes)
        if self.writer is None:
            # Maps have no repeated values, and nobody searches for one: dictionaries and statistics of them took three
            # quarters of the time, 0.18 instead of 0.05 ms for a map of 56×56.
            options = {"use_dictionary": ["key"], "write_statistics": ["key"]}
            self.writer = self.stack.enter_context(pq.ParquetWriter(self.path, table.schema, **options))
        rows = max(1, MAX_ROW_GROUP // max(1, table.nbytes // max(1, len(table))))
        self.writer.write_table(table, row_group_size=rows)


def to_column(exponents: np.ndarray) -> pa.Array:
    """Return exponents (N,) or (N, T) as a column of a table."""
    flat = pa.array(exponents.reshape(-1).astype(np.int32))
    return flat if exponents.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, exponents.shape[1])


@contextmanager
def open_parquet(path: Path) -> Iterator[Writer]:
    """Open a writer of a Parquet file."""
    with ExitStack() as stack:
        maps = ParquetMaps(path, stack)
        yield maps
        if maps.writer is None:  # all samples of the shard were rejected
            pq.write_table(pa.table({"key": pa.array([], pa.string())}), path)


@dataclass
class ZarrMaps:
    """A Zarr group: arrays `{method}` (N, …) and `{method}_exponent`, and the keys among its attributes."""

    group: Any
    keys: list[str]

    def write(self, batch: ExplainedBatch) -> None:
        """Write a batch."""
        self.keys += batch.keys
        for method, arrays in batch.arrays.items():
            for name, values in ((method, arrays), (f"{method}_exponent", batch.exponents[method].astype(np.int32))):
                if name not in self.group:
                    shape = (0, *values.shape[1:])
                    self.group.create_array(name, shape=shape, chunks=values.shape, dtype=values.dtype)
                self.group[name].append(values)


@contextmanager
def open_zarr(path: Path) -> Iterator[Writer]:
    """Open a writer of a Zarr group in a zip archive."""
    zarr = import_zarr()
    with TemporaryDirectory() as folder:
        maps = ZarrMaps(zarr.create_group(folder), [])
        yield maps
        maps.group.attrs["keys"] = maps.keys
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # chunks are compressed already
            for file in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
                info = zipfile.ZipInfo(file.relative_to(folder).as_posix())  # dated 1980: the same bytes each time
                archive.writestr(info, file.read_bytes())


def import_zarr() -> Any:
    """Return the package zarr. Raise UserError if it is not installed."""
    return import_extra("zarr", "zarr", parameter="outputs")


def estimate_bytes_per_sample(shapes: Mapping[str, Sequence[int]], outputs: Sequence[str]) -> dict[str, int]:
    """Return an upper bound of the bytes of a sample in each output.

    Args:
        shapes: The shape of each method's maps of a sample.
        outputs: Some of OUTPUTS.
    """
    values = {method: int(np.prod(shape)) for method, shape in shapes.items()}
    pixels = {method: 3 * values[method] // shape[-3] for method, shape in shapes.items()}
    bounds = {
        "npy": sum(2 * n + 1024 for n in values.values()),  # a tar's header, the array's header, and padding
        "png": sum(n + 1024 for n in pixels.values()),
        "parquet": sum(2 * n for n in values.values()),
        "zarr": sum(2 * n for n in values.values()),
    }
    return {output: bounds[output] for output in OUTPUTS if output in outputs}
