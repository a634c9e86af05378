"""Sources of the samples of an export: the explanations of a run, or the rows of an atlas, shard by shard."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from patterns import UserError
from ray_jobs.io.object_store import fetch, read_table
from ray_jobs.runs.atlas_files import CLUSTERS, SAMPLES_FILE
from ray_jobs.runs.map_files import list_shard_files
from ray_jobs.runs.run_folder import Run
from ray_jobs.runs.stored_maps import describe_other_maps, read_maps, require_arrays
from ray_jobs.units import make_printable
from ray_jobs.views.export.samples import Place, Row

DEFAULT_METHOD = "patternattribution"
MAPS = "Run `patternnet explain` or `patternnet atlas` to the end first."
SCALARS = ["label", "prediction", "probability", "score"]


class AtlasPlaces:
    """The values that an atlas has for each sample.

    It holds 20 bytes for each sample, and the keys of one shard at a time.

    Args:
        run: The run of the atlas.

    Raises:
        UserError: If it holds no finished atlas.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.section = run, run.require_job("atlas", "Run `patternnet atlas` to the end first.")
        self.files = list_shard_files(str(run.folder), tuple(self.section["options"]["shards"]), "atlas")
        columns = ["class", "cluster", "suspicion", "p"]
        clusters = read_table(run.folder / CLUSTERS, columns).to_pylist()
        self.clusters = {(row["class"], row["cluster"]): (row["suspicion"], row["p"]) for row in clusters}
        self.read_samples()

    def read_samples(self) -> None:
        """Read the places of all samples, in the order of the shards."""
        self.first: dict[str, int] = {}  # the number of the first sample of each shard
        with fetch(self.run.folder / SAMPLES_FILE) as path:
            file = pq.ParquetFile(path)
            count = file.metadata.num_rows
            self.cluster, self.distance = np.zeros(count, np.int32), np.zeros(count, np.float32)
            self.points = np.zeros((count, 2), np.float32)
            for batch in file.iter_batches(columns=["number", "shard", "cluster", "distance", "x", "y"]):
                numbers = batch["number"].to_numpy()
                for name, values in (("cluster", self.cluster), ("distance", self.distance)):
                    values[numbers] = batch[name].to_numpy(zero_copy_only=False)
                self.points[numbers] = np.stack([batch[axis].to_numpy(zero_copy_only=False) for axis in "xy"], 1)
                smallest = pa.table({"shard": batch["shard"], "number": batch["number"]}).group_by("shard")
                for row in smallest.aggregate([("number", "min")]).to_pylist():
                    self.first[row["shard"]] = min(row["number_min"], self.first.get(row["shard"], count))

    def of_shard(self, shard: str) -> dict[str, Place]:
        """Return the places of a shard's samples by key; empty if it is no shard of the atlas."""
        if shard not in self.files:
            return {}
        files = self.files[shard]
        rows = read_table(files.folder / files.rows, ["key", "position", "class", "loss"]).to_pylist()
        return {row["key"]: self.place(shard, row) for row in rows}

    def place(self, shard: str, row: Mapping[str, Any]) -> Place:
        """Return the place of a sample.

        Args:
            shard: Its shard.
            row: Its position, class and loss.
        """
        number = self.first[make_printable(shard)] + row["position"]
        cluster = int(self.cluster[number])
        suspicion, p = self.clusters[row["class"], cluster]
        x, y = self.points[number].tolist()
        return Place(row["class"], cluster, suspicion, p, float(self.distance[number]), x, y, row["loss"])


class Explanations:
    """The maps of `explain`. If a sample has several, the first is used.

    Args:
        run: The run.
        method: The method; None for PatternAttribution, or the first method if it was not used.

    Attributes:
        section: The section of the manifest.
        shards: The shards.
        method: The method.

    Raises:
        UserError: If the run holds no maps of this method that can be read.
    """

    def __init__(self, run: Run, method: str | None) -> None:
        self.section = run.require_job("explain", MAPS)
        options = self.section["options"]
        self.shards, self.outputs = options["shards"], options["outputs"]
        require_arrays(str(run.folder), self.outputs)
        self.method = choose_method(run, options["methods"], method)
        self.files = list_shard_files(str(run.folder), tuple(self.shards))

    def read(self, shard: str) -> Iterator[Row]:
        """Yield the samples of a shard in the order of the shard."""
        files = self.files[shard]
        table = read_table(files.folder / files.rows, ["key", "target", *SCALARS])
        rows = {row["key"]: row for row in table.to_pylist()}
        for key, array, exponent in read_maps(files, self.method, self.outputs, rows):
            row = {name: first_of(value) for name, value in rows[key].items()}
            first, power = (array[0], exponent[0]) if isinstance(exponent, list) else (array, exponent)
            values = np.ldexp(first.astype(np.float32), power)
            yield Row(key, values, explained=row["target"], **{name: row[name] for name in SCALARS})


class PooledMaps:
    """The pooled maps of an atlas.

    Args:
        run: The run.
        method: The method; None for that of the atlas.

    Attributes:
        section: The section of the manifest.
        shards: The shards.
        method: The method.

    Raises:
        UserError: If the atlas has maps of another method.
    """

    def __init__(self, run: Run, method: str | None) -> None:
        self.section = run.require_job("atlas", MAPS)
        options = self.section["options"]
        self.shards, self.side = options["shards"], int(self.section["side"])
        self.files = list_shard_files(str(run.folder), tuple(self.shards), "atlas")
        self.method = choose_method(run, options["methods"], method)

    def read(self, shard: str) -> Iterator[Row]:
        """Yield the samples of a shard in the order of the shard."""
        files = self.files[shard]
        table = read_table(files.folder / files.rows, ["key", "position", "class", "map", "map_mass", *SCALARS])
        table = table.take(pc.sort_indices(table, [("position", "ascending")]))
        for batch in table.to_batches(max_chunksize=256):
            maps = batch["map"].flatten().to_numpy(zero_copy_only=False).astype(np.float32)
            maps = maps.reshape(-1, 1, self.side, self.side) * batch["map_mass"].to_numpy().reshape(-1, 1, 1, 1)
            for array, row in zip(maps, batch.drop_columns(["map", "map_mass", "position"]).to_pylist()):
                yield Row(row["key"], array, explained=row["class"], **{name: row[name] for name in SCALARS})


Source = Explanations | PooledMaps


def open_source(run: str, atlas: str | None, method: str | None) -> tuple[Source, AtlasPlaces | None]:
    """Open the samples of a run: its explanations if it has some, else the pooled maps of its atlas.

    Args:
        run: The folder of `explain` or `atlas`.
        atlas: The folder of an atlas of the same samples; None for that of the run itself, if it has one.
        method: The method of the maps; None for the default.

    Raises:
        UserError: If the folders do not hold what is needed, or do not match.
    """
    folder = Run(run)
    manifest = folder.manifest()
    finished = [job for job in ("explain", "atlas") if manifest.get(job, {}).get("status") == "complete"]
    if not finished:
        raise UserError(str(folder.folder), "holds no finished explain or atlas", MAPS)
    shape = manifest["model"]["input_shape"]
    if len(shape) != 3:
        raise UserError(
            str(folder.folder), f"its model takes inputs of the shape {shape}, not images", "Export images."
        )
    source = (Explanations if "explain" in finished else PooledMaps)(folder, method)
    places = AtlasPlaces(Run(atlas) if atlas else folder) if atlas or "atlas" in finished else None
    if places is not None:
        require_match(source, places)
    return source, places


def require_match(source: Source, places: AtlasPlaces) -> None:
    """Raise UserError if an atlas describes none of the shards, other targets, or maps of another model.

    If it describes the same method, it must have the same patterns and estimators too.
    """
    options, described = source.section["options"], places.section["options"]
    where = str(places.run.folder)
    if not set(options["shards"]) & set(described["shards"]):
        raise UserError(where, "its atlas has none of the explained shards", "Pass an atlas of these shards.", "atlas")
    if options["target"] != described["target"]:
        what = f"its atlas describes maps of {described['target']!r}, not of {options['target']!r}"
        raise UserError(where, what, "Pass an atlas of the same --target.", "atlas")
    if difference := describe_other_maps(places.section, source.section, source.method):
        what, remedy = f"its atlas describes maps with {difference}", "Pass an atlas of the exported maps."
        raise UserError(where, what, remedy, "atlas")


def with_places(rows: Iterator[Row], places: Mapping[str, Place]) -> Iterator[Row]:
    """Yield samples with their places."""
    for row in rows:
        yield replace(row, place=places.get(row.key))


def choose_method(run: Run, methods: list[str], wanted: str | None) -> str:
    """Return the method of the maps. Raise UserError if the run does not have it."""
    if wanted is None:
        return DEFAULT_METHOD if DEFAULT_METHOD in methods else methods[0]
    if wanted not in methods:
        what = f"holds maps of {', '.join(methods)}, not of {wanted}"
        raise UserError(str(run.folder), what, "Choose one of these methods.", "method")
    return wanted


def first_of(value: Any) -> Any:
    """Return the first item of a list; None if it is empty. Return any other value unchanged."""
    return (value[0] if value else None) if isinstance(value, list) else value
