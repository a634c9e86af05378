"""Hugging Face: an `imagefolder` with metadata and a dataset card."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from patterns.attribution import encode_png, render_map
from ray_jobs.views.export.files import write_file, write_picture
from ray_jobs.views.export.samples import Description, ExportedSample, Writer

ROWS = 10_000  # of a row group of the metadata
# Names that end in `file_name` become images, named without this ending.
COLUMNS = {
    "file_name": (pa.string(), "the photograph as the model sees it (column `image`)"),
    "map_file_name": (pa.string(), "the map as a picture (column `map`)"),
    "shard": (pa.string(), "the shard of the sample"),
    "key": (pa.string(), "its key in the shard"),
    "label": (pa.string(), "the class of the sample; null if it is not known"),
    "label_number": (pa.int64(), "its number"),
    "prediction": (pa.string(), "the predicted class"),
    "prediction_number": (pa.int64(), "its number"),
    "probability": (pa.float32(), "the probability of the prediction"),
    "explained": (pa.string(), "the class that the map explains"),
    "score": (pa.float32(), "the value that the map explains"),
}
PLACES = {
    "cluster": (pa.int32(), "the cluster of the map among those of the explained class; 0 is the largest"),
    "suspicion": (pa.float64(), "how much the cluster differs from the rest of its class"),
    "p": (pa.float64(), "the corrected p-value of the cluster"),
    "distance": (pa.float32(), "distance of the map from the mean map of its class"),
    "loss": (pa.float32(), "the cross entropy of the label"),
    "x": (pa.float32(), "first principal component of the maps of the class"),
    "y": (pa.float32(), "second principal component"),
}
SIZES = (("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6), ("1M<n<10M", 10**7))
CARD = """\
---
pretty_name: {quoted}
task_categories:
- image-classification
tags:
- explainable-ai
- attribution-maps
size_categories:
- {size}
configs:
- config_name: default
  data_files:
  - split: train
    path: train/**
---

# {name}

{samples} images with maps of {method}: what the model `{model}` looks at for {target}. Written by patternnet-ray.

| column | meaning |
| --- | --- |
{columns}

The licence is that of the images.
"""


def quote_yaml(text: str) -> str:
    r"""Return a text as a YAML scalar in ASCII.

    Example:
        >>> print(quote_yaml('a "b": é'))
        "a \x22b\x22: \xe9"
    """
    return '"' + "".join(c if " " <= c <= "~" and c not in '"\\' else escape(ord(c)) for c in text) + '"'


def escape(code: int) -> str:
    """Return the escape of a character in YAML."""
    return f"\\x{code:02x}" if code < 0x100 else f"\\U{code:08x}"


def make_inline(text: str) -> str:
    """Return a text for a line of Markdown: without characters that end a line or begin markup."""
    return "".join(c if c.isalnum() or c in " .,:;/@=+-()[]_" else " " for c in text)


@dataclass
class HuggingFaceWriter:
    """Writes the pictures, and the rows of the metadata."""

    folder: Path
    description: Description
    table: pq.ParquetWriter
    rows: list[dict[str, Any]] = field(default_factory=list)
    count: int = 0

    def write(self, sample: ExportedSample) -> None:
        """Write a sample."""
        row, name = sample.row, self.description.name_class
        picture = write_picture(self.folder / "images", sample)
        write_file(self.folder / f"maps/{sample.stem}.png", encode_png(render_map(self.description.method, row.map)))
        values = {
            "file_name": f"images/{picture}",
            "map_file_name": f"maps/{sample.stem}.png",
            "shard": sample.shard,
            "key": row.key,
            "label": name(row.label),
            "label_number": row.label,
            "prediction": name(row.prediction),
            "prediction_number": row.prediction,
            "probability": row.probability,
            "explained": name(row.explained),
            "score": row.score,
        }
        if row.place is not None:
            values |= {column: getattr(row.place, column) for column in PLACES}
        self.rows.append(values)
        self.count += 1
        if len(self.rows) == ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait."""
        if self.rows:
            self.table.write_table(pa.Table.from_pylist(self.rows, self.table.schema))
            self.rows = []


@contextmanager
def open_huggingface(folder: Path, description: Description) -> Iterator[Writer]:
    """Open a folder with `train/metadata.parquet`, `train/images/`, `train/maps/` and `README.md`."""
    columns = COLUMNS | (PLACES if description.has_atlas else {})
    schema = pa.schema([(name, type_) for name, (type_, _) in columns.items()])
    (folder / "train").mkdir()
    with ExitStack() as stack:
        table = stack.enter_context(pq.ParquetWriter(folder / "train/metadata.parquet", schema))
        writer = HuggingFaceWriter(folder / "train", description, table)
        yield writer
        writer.flush()
    card = CARD.format(
        quoted=quote_yaml(description.name),
        size=next((size for size, limit in SIZES if writer.count < limit), "10M<n<100M"),
        samples=writer.count,
        columns="\n".join(f"| `{name}` | {meaning} |" for name, (_, meaning) in columns.items()),
        **{name: make_inline(getattr(description, name)) for name in ("name", "method", "model", "target")},
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
