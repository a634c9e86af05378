"""Labels of concepts for a fit: a Parquet file with a column of keys and a column for each concept."""

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
from ray_jobs.units import format_first_line

KEY = "key"


@dataclass(frozen=True)
class ConceptLabels:
    """The values of concepts for some images.

    Attributes:
        names: The names of the C concepts.
        rows: The row of each image by its key.
        values: The values, float64, shape (images, C).
        digest: A digest of the file.
    """

    names: tuple[str, ...]
    rows: dict[str, int]
    values: np.ndarray
    digest: str

    def of(self, keys: Sequence[str]) -> Tensor:
        """Return the values for some images, float64 (N, C); a row of NaN for an image without labels."""
        found = np.full((len(keys), len(self.names)), np.nan)
        for number, key in enumerate(keys):
            if (row := self.rows.get(key)) is not None:
                found[number] = self.values[row]
        return torch.from_numpy(found)


def load_concepts(where: str | None) -> ConceptLabels | None:
    """Return the labels of a Parquet file; None if there is no file.

    Args:
        where: The path or URL of the file. Its column `key` holds the keys of images, and every other column is a
            concept, of numbers or booleans.

    Raises:
        UserError: If the file cannot be read, lacks the column of keys, names a key twice, or a concept is no number,
            is missing for an image, or is constant.
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
    names = tuple(name for name in table.column_names if name != KEY)
    if KEY not in table.column_names or not names or len({KEY, *names}) < table.num_columns:
        what = f"the columns are {', '.join(table.column_names) or 'none'}"
        raise UserError(where, what, f"Name one column `{KEY}`, and each concept by a column of its own.", "concepts")
    if not (pa.types.is_string(table[KEY].type) or pa.types.is_large_string(table[KEY].type)):
        raise UserError(where, f"the keys are of type {table[KEY].type}", "Write them as text.", "concepts")
    keys = table[KEY].to_pylist()
    rows = {key: number for number, key in enumerate(keys)}
    if len(rows) < len(keys):
        twice = next(key for number, key in enumerate(keys) if rows[key] != number)
        raise UserError(where, f"the key {twice!r} has several rows", "Keep one row for each image.", "concepts")
    values = np.stack([read_concept(where, name, table[name], keys) for name in names], 1)
    return ConceptLabels(names, rows, values, hashlib.sha256(content).hexdigest())


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
