"""Read the tables of an atlas into the values that its templates show."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from patterns import UserError
from patterns.attribution import render_map
from ray_jobs.config import Preprocessing
from ray_jobs.io.object_store import read_table
from ray_jobs.runs.atlas_files import ANOMALIES, CHANNELS, CLASSES, CLUSTERS, CONFUSIONS, SAMPLES_FILE
from ray_jobs.runs.map_files import list_shard_files
from ray_jobs.runs.run_folder import Run
from ray_jobs.units import make_printable
from ray_jobs.views.photographs import read_photographs
from ray_jobs.views.report.samples import embed

PROTOTYPES, OUTLIERS = 6, 4  # samples that are shown of each cluster, and of each class
PHOTOGRAPH, MAP = 96, 56  # pixels of a side at most
CONFUSED, WORTH, CHANNELS_SHOWN, CHANNEL_SAMPLES = 30, 20, 8, 4
POINTS = 400  # samples in the plot of a class
PLOT = 220.0  # pixels
Id = tuple[str, str]  # shard and key


@dataclass(frozen=True)
class Shown:
    """A sample as the page shows it: photograph and map; None if it cannot be read any more."""

    key: str
    photograph: str | None
    map: str | None
    value: float


@dataclass(frozen=True)
class ClusterView:
    """A cluster: its row of clusters.parquet with pictures."""

    row: Mapping[str, Any]
    label: str
    prediction: str
    map: str
    gain: str | None
    prototypes: list[Shown]


@dataclass(frozen=True)
class ClassView:
    """A class: its row of classes.parquet with pictures. A point of the plot is x, y and cluster."""

    row: Mapping[str, Any]
    name: str
    map: str
    clusters: list[ClusterView]
    outliers: list[Shown]
    points: list[tuple[float, float, int]]

    @property
    def p(self) -> float | None:
        """The smallest corrected p-value of its clusters; None if none was compared."""
        found = [each.row["p"] for each in self.clusters if each.row["p"] is not None]
        return min(found) if found else None

    @property
    def accuracy(self) -> float | None:
        """The fraction of labelled samples whose label is this class; None without labels."""
        return self.row["right"] / self.row["labelled"] if self.row["labelled"] else None


@dataclass
class Pictures:
    """Encoded photographs and pooled maps of the samples that the page shows."""

    photographs: dict[Id, str] = field(default_factory=dict)
    maps: dict[Id, str] = field(default_factory=dict)

    def show(self, sample: Mapping[str, Any]) -> Shown:
        """Return a sample of a list of samples."""
        id_ = sample["shard"], sample["key"]
        return Shown(sample["key"], self.photographs.get(id_), self.maps.get(id_), sample["value"])


class Atlas:
    """The atlas of a finished run.

    Args:
        run: The run.
        names: Class names by number.

    Raises:
        UserError: If the run holds no finished atlas.
    """

    def __init__(self, run: Run, names: Mapping[int, str]) -> None:
        self.run, self.names = run, names
        self.section = run.require_job("atlas", "Run `patternnet atlas` to the end first.")
        self.options = self.section["options"]
        self.side, (self.method,) = int(self.section["side"]), self.options["methods"]
        self.preprocessing = Preprocessing(**self.options["preprocessing"])
        self.files = list_shard_files(str(run.folder), tuple(self.options["shards"]), "atlas")
        self.shards = {make_printable(shard): shard for shard in self.files}
        self.classes = self.table(CLASSES, ["class", "samples", "labelled", "right", "mean_score", "mean_probability",
                                            "mean_loss", "clusters", "suspicion", "untypical", "mean_map"])  # fmt: skip
        self.clusters = self.table(CLUSTERS).to_pylist()
        self.by_class: dict[int, list[dict[str, Any]]] = {}
        for row in sorted(self.clusters, key=lambda row: row["cluster"]):
            self.by_class.setdefault(row["class"], []).append(row)

    def table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Return some columns of a table."""
        return read_table(self.run.folder / name, columns)

    def name(self, number: int | None) -> str:
        """Return the name of a class, or its number as text."""
        return "none" if number is None else self.names.get(number, str(number))

    def channels(self) -> dict[str, list[dict[str, Any]]]:
        """Return the channels with the largest mean relevance for a class, by operator."""
        if not (self.run.folder / CHANNELS).exists():
            return {}
        found: dict[str, list[dict[str, Any]]] = {}
        for row in self.table(CHANNELS).sort_by([("class_relevance", "descending")]).to_pylist():
            rows = found.setdefault(row["operator"], [])
            if len(rows) < CHANNELS_SHOWN:
                rows.append(row)
        return found

    def confusions(self) -> list[dict[str, Any]]:
        """Return the most frequent pairs of different label and prediction."""
        table = self.table(CONFUSIONS, ["label", "prediction", "samples", "mean_probability"])
        wrong = table.filter(pc.and_(pc.is_valid(table["label"]), pc.not_equal(table["label"], table["prediction"])))
        grouped = wrong.group_by(["label", "prediction"], use_threads=False).aggregate([("samples", "sum")])
        order = [("samples_sum", "descending"), ("label", "ascending"), ("prediction", "ascending")]
        return grouped.sort_by(order).slice(0, CONFUSED).to_pylist()

    def anomalies(self) -> list[dict[str, Any]]:
        """Return the first clusters and samples worth a look."""
        rows = self.table(ANOMALIES).to_pylist()
        kinds = ([row for row in rows if row["kind"] == kind][:WORTH] for kind in ("cluster", "sample"))
        return [row for of_kind in kinds for row in of_kind]

    def list_shown(self, channels: Mapping[str, Sequence[Mapping[str, Any]]]) -> set[Id]:
        """Return the samples that the page shows."""
        lists = [row["prototypes"][:PROTOTYPES] for row in self.clusters]
        lists += [samples[:OUTLIERS] for samples in self.classes["untypical"].to_pylist()]
        lists += [row["by_relevance"][:CHANNEL_SAMPLES] for rows in channels.values() for row in rows]
        return {(sample["shard"], sample["key"]) for samples in lists for sample in samples}

    def read_pictures(self, wanted: set[Id]) -> Pictures:
        """Return the pictures of some samples. Shards that cannot be read any more leave theirs out."""
        pictures, by_shard = Pictures(), dict[str, set[str]]()
        decoder = self.section["model"].get("decoder")
        for shard, key in wanted:
            by_shard.setdefault(shard, set()).add(key)
        for printable, keys in sorted(by_shard.items()):
            pictures.maps |= {(printable, key): uri for key, uri in self.read_maps(self.shards[printable], keys)}
            try:
                for key, image in read_photographs(self.shards[printable], keys, self.preprocessing, decoder):
                    pictures.photographs[printable, key] = encode(image, PHOTOGRAPH)
            except (UserError, OSError):  # the maps can still be shown
                continue
        return pictures

    def read_maps(self, shard: str, keys: set[str]) -> Iterator[tuple[str, str]]:
        """Yield the pooled maps of some samples of a shard as pictures."""
        files = self.files[shard]
        table = read_table(files.folder / files.rows, ["key", "map"])
        for row in table.filter(pc.is_in(table["key"], pa.array(sorted(keys)))).to_pylist():
            yield row["key"], self.draw_map(row["map"])

    def draw_map(self, values: Sequence[float]) -> str:
        """Return a pooled map as a picture."""
        array = np.array(values, np.float32).reshape(1, self.side, self.side)
        scale = max(1, MAP // self.side)
        image = render_map(self.method, array)
        return encode(image.resize((self.side * scale,) * 2, Image.Resampling.NEAREST), MAP, "png")

    def view(self, row: Mapping[str, Any], pictures: Pictures, points: np.ndarray) -> ClassView:
        """Return a class.

        Args:
            row: Its row of classes.parquet.
            pictures: The pictures of its samples.
            points: The samples of its plot: x, y and cluster (N, 3).
        """
        clusters = [
            ClusterView(
                each,
                self.name(each["label"]),
                self.name(each["prediction"]),
                self.draw_map(each["mean_map"]),
                self.draw_map(each["gain"]) if len(self.by_class[row["class"]]) > 1 else None,
                [pictures.show(sample) for sample in each["prototypes"][:PROTOTYPES]],
            )
            for each in self.by_class[row["class"]]
        ]
        outliers = [pictures.show(sample) for sample in row["untypical"][:OUTLIERS]]
        return ClassView(
            row, self.name(row["class"]), self.draw_map(row["mean_map"]), clusters, outliers, scale_points(points)
        )

    def views(self, pictures: Pictures) -> Iterator[ClassView]:
        """Yield the classes, the most suspicious one first."""
        samples = self.table(SAMPLES_FILE, ["class", "cluster", "x", "y"])
        classes = samples["class"].to_numpy()
        starts = np.flatnonzero(np.diff(classes, prepend=-1))  # the samples are sorted by class
        bounds = {int(classes[a]): (a, b) for a, b in zip(starts, [*starts[1:], len(classes)])}
        order = [("suspicion", "descending"), ("class", "ascending")]
        for row in self.classes.sort_by(order).to_pylist():
            first, last = bounds[row["class"]]
            part = samples.slice(first, last - first)
            every = np.arange(0, len(part), max(1, -(-len(part) // POINTS)))
            columns = [part[name].to_numpy()[every] for name in ("x", "y", "cluster")]
            yield self.view(row, pictures, np.stack(columns, 1))


def scale_points(points: np.ndarray) -> list[tuple[float, float, int]]:
    """Return points in pixels of the plot."""
    if not len(points):
        return []
    low, high = points[:, :2].min(0), points[:, :2].max(0)
    scaled = (points[:, :2] - low) / np.maximum(high - low, 1e-12) * (PLOT - 12) + 6
    return [(round(float(x), 1), round(float(PLOT - y), 1), int(c)) for (x, y), c in zip(scaled, points[:, 2])]


def encode(image: Image.Image, side: int, kind: str = "jpeg") -> str:
    """Return an image as a data URI, shrunk to a side."""
    if max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, kind, **({"quality": 80, "subsampling": 0} if kind == "jpeg" else {}))
    return embed(kind, buffer.getvalue())
