"""Labels of concepts for a fit: a Parquet file with a column of keys, maybe of shards, and one for each concept."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from patterns import UserError
from ray_jobs.io.object_store import read_option_file
from ray_jobs.units import format_first_line, make_printable

KEY, SHARD = "key", "shard"
ADD_SHARDS = "If samples of several shards have the same key, add a column `shard`"


@dataclass(frozen=True)
class ConceptLabels:
    """The values of concepts for some images.

    Attributes:
        names: The names of the C concepts.
        rows: The row of each image by its shard's printable name and its key; the shard is empty without a column of
            shards.
        values: The values, float64, shape (images, C).
        digest: A digest of the file.
        by_shard: Whether the file has a column of shards.
    """

    names: tuple[str, ...]
    rows: dict[tuple[str, str], int]
    values: np.ndarray
    digest: str
    by_shard: bool = False

    def find_rows(self, shard: str, keys: Sequence[str]) -> Tensor:
        """Return the row of each of some images of a shard, int64 (N,); -1 for an image without labels."""
        name = make_printable(shard) if self.by_shard else ""
        return torch.tensor([self.rows.get((name, key), -1) for key in keys], dtype=torch.int64)

    def of(self, rows: Tensor) -> Tensor:
        """Return the values of rows, float64 (N, C); a row of NaN for row -1."""
        found = torch.from_numpy(self.values)[rows]
        return found.masked_fill_((rows < 0)[:, None], torch.nan)


def require_one_sample(samples: Tensor | None, out: str) -> None:
    """Raise UserError if a row of labels labels several samples, because samples of several shards have its key.

    Args:
        samples: The number of samples that each row labels; None if it is unknown.
        out: The folder of the fit, for errors.
    """
    if samples is not None and len(repeated := torch.nonzero(samples > 1)):
        number = int(repeated[0])
        what = f"row {number + 1} of the concepts labels {int(samples[number])} samples of different shards"
        raise UserError(out, what, f"{ADD_SHARDS}, and choose another --out.", "concepts")


def load_concepts(where: str | None, shards: Sequence[str]) -> ConceptLabels | None:
    """Return the labels of a Parquet file; None if there is no file.

    Args:
        where: The path or URL of the file. Its column `key` holds the keys of images, its column `shard`, if there is
            one, their shards, and every other column is a concept, of numbers or booleans.
        shards: The shards of the fit.

    Raises:
        UserError: If the file cannot be read, lacks the column of keys, names an image twice or no shard of the fit,
            or a concept is no number, is missing for an image, or is constant.
    """
    if where is None:
        return None
    content = read_option_file("`concepts`", where)
    try:
        table = pq.read_table(BytesIO(content))
    except Exception as error:  # a damaged file raises many types
        what = f"not a Parquet file ({format_first_line(error)})"
        raise UserError(
            where, what, "Write one with the columns `key` and one for each concept.", "concepts"
        ) from error
    names = tuple(name for name in table.column_names if name not in (KEY, SHARD))
    if KEY not in table.column_names or not names or len(set(table.column_names)) < table.num_columns:
        what = f"the columns are {', '.join(table.column_names) or 'none'}"
        raise UserError(where, what, f"Name one column `{KEY}`, and each concept by a column of its own.", "concepts")
    by_shard = SHARD in table.column_names
    for name in (SHARD, KEY) if by_shard else (KEY,):
        if not (pa.types.is_string(table[name].type) or pa.types.is_large_string(table[name].type)):
            raise UserError(where, f"the {name}s are of type {table[name].type}", "Write them as text.", "concepts")
    keys = table[KEY].to_pylist()
    images = list(zip(table[SHARD].to_pylist() if by_shard else [""] * len(keys), keys))
    rows = {image: number for number, image in enumerate(images)}
    if len(rows) < len(keys):
        shard, key = next(image for number, image in enumerate(images) if rows[image] != number)
        what = f"the key {key!r} has several rows" + (f" for {shard}" if by_shard else "")
        remedy = "Keep one row for each image." if by_shard else f"Keep one row for each image. {ADD_SHARDS}."
        raise UserError(where, what, remedy, "concepts")
    if by_shard and keys and not {shard for shard, _ in images} & set(map(make_printable, shards)):
        what = f"names no sample of these shards, but of {images[0][0]}"
        raise UserError(where, what, "Name shards as --shards does.", "concepts")
    values = np.stack([read_concept(where, name, table[name], keys) for name in names], 1)
    return ConceptLabels(names, rows, values, hashlib.sha256(content).hexdigest(), by_shard)


def read_concept(where: str, name: str, column: pa.ChunkedArray, keys: Sequence[str]) -> np.ndarray:
    """Return the values of a concept, float64 (images,).

    Args:
        where: The path or URL of the file, for errors.
        name: The name of the concept.
        column: The column of the concept.
        keys: The keys of the images, for errors.

    Raises:
        UserError: If the values are not numbers or booleans, if one is missing or not finite, or if all are equal.
    """
    kind = column.type
    if not (pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        what = f"the column {name!r} is of type {kind}"
        raise UserError(where, what, "Write concepts as numbers or booleans.", "concepts")
    values = column.cast(pa.int8()) if pa.types.is_boolean(kind) else column
    found = values.cast(pa.float64(), safe=False).to_numpy()  # integers above 2**53 lose at most 2**-53 of their value
    if not np.isfinite(found).all():
        key = keys[int(np.flatnonzero(~np.isfinite(found))[0])]
        what = f"the concept {name!r} has no finite value for {key!r}"
        raise UserError(where, what, "Leave out the row, or fill in the value.", "concepts")
    if len(found) == 0 or found.min() == found.max():
        what = f"the concept {name!r} is constant" if len(found) else "there is no row"
        raise UserError(where, what, "Label images with and without the concept, or drop the column.", "concepts")
    return found
