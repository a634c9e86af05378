"""The rows of a shard: one for each sample, with its pooled map and the relevance of its channels.

Maps and channel relevance are stored as shares: divided by the sum of their absolute values, which is the *mass*. A
share keeps its digits in float16 whatever the magnitude of the model's scores, and share times mass gives it back.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn import functional as F

from ray_jobs.units import format_bytes

ROW_GROUP = 256  # rows of one row group; readers of some classes skip those of other classes
PENDING_BYTES = 64 << 20  # of buffered rows, which are sorted when they are written
SCALARS = pa.schema(
    [
        ("shard", pa.string()),
        ("key", pa.string()),
        ("position", pa.int64()),  # of the sample among the samples of its shard that were used
        ("label", pa.int64()),
        ("prediction", pa.int64()),
        ("probability", pa.float32()),
        ("class", pa.int64()),  # that the map explains
        ("score", pa.float32()),
        ("loss", pa.float32()),
        ("map_mass", pa.float32()),
    ]
)
NUMBER_BYTES = sum(field.type.bit_width // 8 for field in SCALARS if pa.types.is_primitive(field.type))
HALF_MAX = float(torch.finfo(torch.float16).max)


@dataclass(frozen=True)
class RowShape:
    """The sizes of a row's lists.

    Attributes:
        side: Height and width of the pooled map.
        channels: The number of channels of each recorded operator, by name; empty if no pass was made.
        embedding: The length of the embedding; 0 without one.
    """

    side: int
    channels: Mapping[str, int]
    embedding: int = 0

    @property
    def lists(self) -> dict[str, int]:
        """The length of each column that is a list."""
        found = {"map": self.side**2}
        for name, size in self.channels.items():
            found |= {relevance_column(name): size, activation_column(name): size}
        return found | ({"embedding": self.embedding} if self.embedding else {})

    @property
    def schema(self) -> pa.Schema:
        """The columns of the rows."""
        masses = [(mass_column(name), pa.float32()) for name in self.channels]
        lists = [(name, pa.list_(pa.float16(), size)) for name, size in self.lists.items()]
        return pa.schema([*SCALARS, *masses, *lists], {"side": str(self.side)})

    @property
    def bytes_per_sample(self) -> dict[str, int]:
        """The bytes of a sample by what they hold, without the shard and the key."""
        channels = sum(2 * 2 * size + 4 for size in self.channels.values())
        parts = {"map": 2 * self.side**2, "channels": channels, "embedding": 2 * self.embedding}
        return {name: size for name, size in parts.items() if size} | {"numbers": NUMBER_BYTES}


def relevance_column(operator: str) -> str:
    """Return the name of the column with an operator's channel relevance."""
    return f"relevance/{operator}"


def mass_column(operator: str) -> str:
    """Return the name of the column with the mass of an operator's channel relevance."""
    return f"mass/{operator}"


def activation_column(operator: str) -> str:
    """Return the name of the column with an operator's activations."""
    return f"activation/{operator}"


def describe_cost(shape: RowShape, max_samples: int | None) -> str:
    """Return a line that says how much space the rows take."""
    parts = shape.bytes_per_sample
    total = sum(parts.values())
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    line = f"a sample takes {format_bytes(total)} ({listed}), 1000 samples {format_bytes(1000 * total)}"
    return line if max_samples is None else f"{line}, all {max_samples} {format_bytes(max_samples * total)}"


def pool_maps(maps: Tensor, side: int) -> Tensor:
    """Return maps summed over channels and averaged over a grid of cells, float32 (N, side, side).

    A cell of a size that is no whole number of pixels includes the pixels that it touches
    (`torch.nn.functional.adaptive_avg_pool2d`).

    Args:
        maps: (N, C, H, W).
        side: Height and width of the grid.
    """
    return F.adaptive_avg_pool2d(maps.float().sum(1, keepdim=True), side)[:, 0]


def to_shares(values: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return values divided by the sum of their absolute values, float16 (N, …), and these sums, float32 (N,).

    Values that are all 0 stay 0.
    """
    flat = values.double().flatten(1)
    mass = flat.abs().sum(1)
    shares = flat / torch.where(mass > 0, mass, 1.0)[:, None]
    return shares.half().cpu().numpy(), mass.float().cpu().numpy()


def to_half(values: Tensor) -> np.ndarray:
    """Return values as float16; those beyond its range become its largest or smallest number."""
    return values.float().clamp(-HALF_MAX, HALF_MAX).half().cpu().numpy()


def make_table(shape: RowShape, scalars: Sequence[Mapping[str, Any]], lists: Mapping[str, np.ndarray]) -> pa.Table:
    """Return rows as a table.

    Args:
        shape: The sizes of the lists.
        scalars: The scalar columns of each row.
        lists: The other columns: float16 (N, length), or float32 (N,) for masses.
    """
    schema = shape.schema
    names = [field.name for field in SCALARS if field.name != "map_mass"]
    columns = {name: pa.array([row.get(name) for row in scalars], schema.field(name).type) for name in names}
    for name, values in lists.items():
        flat = pa.array(values.reshape(-1))
        columns[name] = flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    return pa.table([columns[name] for name in schema.names], schema=schema)


class RowWriter:
    """Writes rows to a Parquet file, sorted by class within chunks of bounded size, so that readers skip row groups.

    Args:
        path: The file.
        shape: The sizes of the lists.
    """

    def __init__(self, path: Path, shape: RowShape) -> None:
        self.writer = pq.ParquetWriter(path, shape.schema, write_statistics=["class"], use_dictionary=["shard"])
        self.pending: list[pa.Table] = []

    def write(self, table: pa.Table) -> None:
        """Buffer rows, and write the buffered rows if they exceed `PENDING_BYTES`."""
        self.pending.append(table)
        if sum(each.nbytes for each in self.pending) > PENDING_BYTES:
            self.flush()

    def flush(self) -> None:
        """Sort and write the buffered rows."""
        if self.pending:
            table = pa.concat_tables(self.pending)
            order = pc.sort_indices(table, [("class", "ascending"), ("position", "ascending")])
            self.writer.write_table(table.take(order), row_group_size=ROW_GROUP)
            self.pending = []

    def close(self) -> None:
        """Write the buffered rows and the end of the file."""
        self.flush()
        self.writer.close()


def read_classes(file: Any, first: int, last: int, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield the rows of a file whose class is in a range; row groups without such rows are not read.

    Args:
        file: A path or an open file of rows.
        first: The first class.
        last: The last class.
        columns: The columns to read; must contain "class".
    """
    parquet = pq.ParquetFile(file)
    index = parquet.schema_arrow.get_field_index("class")
    place = next(i for i in range(parquet.metadata.num_columns) if parquet.schema.column(i).path == "class")
    assert index >= 0
    wanted = []
    for group in range(parquet.num_row_groups):
        statistics = parquet.metadata.row_group(group).column(place).statistics
        if statistics is None or not (statistics.max < first or statistics.min > last):
            wanted.append(group)
    for group in wanted:
        table = parquet.read_row_group(group, list(columns))
        chosen = pc.and_(pc.greater_equal(table["class"], first), pc.less_equal(table["class"], last))
        table = table.filter(chosen)
        if len(table):
            yield table


def list_values(table: pa.Table, column: str) -> np.ndarray:
    """Return a column of lists of equal length as an array (N, length), without going through Python objects."""
    combined = table[column].combine_chunks()
    if isinstance(combined, pa.ChunkedArray):
        combined = combined.chunk(0)
    size = combined.type.list_size
    return combined.flatten().to_numpy(zero_copy_only=False).reshape(-1, size)
