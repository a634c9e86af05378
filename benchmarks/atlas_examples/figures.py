"""The pictures of the examples: mean maps, clusters with prototypes, unusual samples and channels."""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from patterns.attribution.rendering import render_map
from patterns.io import write_atomically
from ray_jobs.config import Preprocessing
from ray_jobs.io.object_store import read_table
from ray_jobs.runs.map_files import list_shard_files
from ray_jobs.runs.run_folder import Run
from ray_jobs.views.photographs import read_photographs

METHOD = "patternattribution"
Row = Mapping[str, Any]
Id = tuple[str, str]  # shard and key


@dataclass(frozen=True)
class Picture:
    """A sample as the model sees it, and its pooled map."""

    photograph: Image.Image
    map: Image.Image


class Pictures:
    """The tables and pictures of an atlas.

    Args:
        run: The run.
        names: Names of the classes by number.
    """

    def __init__(self, run: Run, names: Mapping[int, str]) -> None:
        self.run, self.names = run, names
        self.section = run.manifest()["atlas"]
        self.side = int(self.section["side"])
        self.files = list_shard_files(str(run.folder), tuple(self.section["options"]["shards"]), "atlas")

    def table(self, name: str, columns: list[str] | None = None) -> list[dict[str, Any]]:
        """Return the rows of a table of the atlas."""
        return read_table(self.run.folder / f"{name}.parquet", columns).to_pylist()

    def list_classes(self, number: int) -> list[int]:
        """Return the most suspicious classes with several clusters."""
        found = dict.fromkeys(row["class"] for row in self.table("clusters") if row["suspicion"] > 0)
        return list(found)[:number]

    def draw_map(self, values: Sequence[float]) -> Image.Image:
        """Return a pooled map as a picture of one pixel for each cell."""
        return render_map(METHOD, np.array(values, np.float32).reshape(1, self.side, self.side))

    def read(self, wanted: Iterable[Id]) -> dict[Id, Picture]:
        """Return the pictures of some samples."""
        by_shard: dict[str, set[str]] = {}
        for shard, key in wanted:
            by_shard.setdefault(shard, set()).add(key)
        found = {}
        for shard, keys in by_shard.items():
            files = self.files[shard]
            rows = read_table(files.folder / files.rows, ["key", "map"])
            maps = {row["key"]: row["map"] for row in rows.filter(pc.is_in(rows["key"], pa.array(keys))).to_pylist()}
            for key, photograph in self.read_photographs(shard, keys):
                found[shard, key] = Picture(photograph, self.draw_map(maps[key]))
        return found

    def read_photographs(self, shard: str, keys: set[str]) -> Iterable[tuple[str, Image.Image]]:
        """Yield keys and photographs of a shard, as the model sees them."""
        return read_photographs(shard, keys, Preprocessing(**self.section["options"]["preprocessing"]), None)

    def average_photographs(self) -> dict[int, Image.Image]:
        """Return the mean photograph of each class."""
        by_shard: dict[str, dict[str, int]] = {}
        for row in self.table("samples", ["shard", "key", "class"]):
            by_shard.setdefault(row["shard"], {})[row["key"]] = row["class"]
        sums: dict[int, np.ndarray] = {}
        counts: dict[int, int] = {}
        for shard, classes in by_shard.items():
            for key, photograph in self.read_photographs(shard, set(classes)):
                number = classes[key]
                sums[number] = sums.get(number, 0.0) + np.asarray(photograph, float)
                counts[number] = counts.get(number, 0) + 1
        return {number: Image.fromarray((sums[number] / counts[number]).astype(np.uint8)) for number in sums}


def id_of(sample: Row) -> Id:
    """Return the shard and the key of a sample."""
    return sample["shard"], sample["key"]


def make_grid(rows: int, columns: int, cell: float, titles: float, margin: float = 0.0) -> tuple[Figure, np.ndarray]:
    """Return a figure of square cells and its axes (rows, columns).

    Args:
        rows: The number of rows.
        columns: The number of columns.
        cell: Width and height of a cell in inches.
        titles: Height of the title above each row in inches.
        margin: Height of the space above the first row in inches.
    """
    height = (cell + titles) * rows + margin
    figure = Figure(figsize=(cell * columns, height), dpi=100)
    axes = figure.subplots(rows, columns, squeeze=False)
    gap = titles / cell + 0.04
    figure.subplots_adjust(0.002, 0.002, 0.998, 1 - (titles + margin) / height, wspace=0.04, hspace=gap)
    for axis in axes.flat:
        axis.axis("off")
    return figure, axes


def show(axis: Axes, image: Image.Image, title: str = "") -> None:
    """Show an image with a title above it."""
    smooth = max(image.size) > 64
    axis.imshow(image, cmap="gray", aspect="equal", interpolation="antialiased" if smooth else "nearest")
    axis.set_title(title, fontsize=7, loc="left", pad=2)


def save(path: Path, figure: Figure) -> None:
    """Write a figure as PNG with at most 256 colors, or as JPEG, by the suffix of the path."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    image = Image.open(buffer).convert("RGB")
    options: dict[str, Any] = {"quality": 70, "format": "jpeg"}
    if path.suffix == ".png":
        image, options = image.quantize(256, dither=Image.Dither.NONE), {"format": "png", "optimize": True}
    write_atomically(path, partial(image.save, **options))


def draw_classes(path: Path, pictures: Pictures) -> None:
    """Draw for each class the mean photograph, the mean map, and the least typical sample with its map."""
    rows = sorted(pictures.table("classes"), key=lambda row: row["class"])
    farthest = pictures.read(id_of(row["untypical"][0]) for row in rows)
    means = pictures.average_photographs()
    figure, axes = make_grid(4, len(rows), 0.8, 0.16)
    for column, row in zip(axes.T, rows, strict=True):
        name, picture = pictures.names[row["class"]], farthest[id_of(row["untypical"][0])]
        show(column[0], means[row["class"]], f"{name}: mean image")
        show(column[1], pictures.draw_map(row["mean_map"]), "mean map")
        show(column[2], picture.photograph, "least typical")
        show(column[3], picture.map, "its map")
    save(path, figure)


def draw_clusters(path: Path, pictures: Pictures, classes: Sequence[int], prototypes: int, cell: float) -> None:
    """Draw the clusters of some classes: mean map, gain, and prototypes, each photograph next to its map.

    Args:
        path: The file to write.
        pictures: The atlas.
        classes: The classes.
        prototypes: The number of prototypes of a cluster.
        cell: Width and height of a picture in inches.
    """
    rows = [row for row in pictures.table("clusters") if row["class"] in classes]
    rows.sort(key=lambda row: (classes.index(row["class"]), row["cluster"]))
    found = pictures.read(id_of(sample) for row in rows for sample in row["prototypes"][:prototypes])
    figure, axes = make_grid(len(rows), 3 + 2 * prototypes, cell, 0.02, margin=0.28)
    for line, row in zip(axes, rows, strict=True):
        text = f"{pictures.names[row['class']]}\ncluster {row['cluster']}\n{row['samples']} images"
        line[0].text(0, 0.5, text, fontsize=7, va="center")
        show(line[1], pictures.draw_map(row["mean_map"]))
        show(line[2], pictures.draw_map(row["gain"]))
        for number, sample in enumerate(row["prototypes"][:prototypes]):
            show(line[3 + 2 * number], found[id_of(sample)].photograph)
            show(line[4 + 2 * number], found[id_of(sample)].map)
    headings = ["mean map", "more than\nthe rest", *["prototype", "its map"] * prototypes]
    for axis, heading in zip(axes[0][1:], headings, strict=True):
        axis.set_title(heading, fontsize=7, loc="left", pad=2)
    save(path, figure)


def draw_samples(
    path: Path, pictures: Pictures, samples: Sequence[Row], title: Callable[[Row], str], columns: int, cell: float
) -> None:
    """Draw samples, each photograph next to its map.

    Args:
        path: The file to write.
        pictures: The atlas.
        samples: The samples.
        title: Returns the text above a sample.
        columns: The number of samples in a row.
        cell: Width and height of a picture in inches.
    """
    found = pictures.read(map(id_of, samples))
    figure, axes = make_grid(-(-len(samples) // columns), 2 * columns, cell, 0.2)
    for axis, other, sample in zip(axes.flat[::2], axes.flat[1::2], samples):
        show(axis, found[id_of(sample)].photograph, title(sample))
        show(other, found[id_of(sample)].map)
    save(path, figure)
