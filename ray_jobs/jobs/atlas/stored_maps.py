"""Rows from the stored maps of `explain`, without a pass: columns that need one are absent or null."""

from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from patterns import UserError
from patterns.io import temporary_path
from ray_jobs.config import AtlasConfig
from ray_jobs.data.samples import RejectedSample
from ray_jobs.engine.shard_worker import ShardReport
from ray_jobs.io.object_store import publish, read_table
from ray_jobs.jobs.atlas.rows import RowShape, RowWriter, make_table, pool_maps, to_shares
from ray_jobs.jobs.method_job import MethodWorker
from ray_jobs.jobs.per_shard_job import FilesTask
from ray_jobs.models.loading import TracedModel
from ray_jobs.runs.map_files import list_shard_files
from ray_jobs.runs.run_folder import Run, read_rejected
from ray_jobs.runs.stored_maps import BATCH, describe_other_maps, read_maps, require_arrays
from ray_jobs.units import make_printable

COPIED = ("key", "label", "prediction", "probability", "score")


def read_section(config: AtlasConfig) -> dict[str, Any]:
    """Return the section of the explain whose maps are used. Raise UserError if it has not finished."""
    assert config.explanations is not None
    return Run(config.explanations).require_job("explain", "Run `patternnet explain` to the end first.")


def require_explanations(config: AtlasConfig, atlas: Mapping[str, Any]) -> None:
    """Raise UserError if the maps of the explain cannot be used for an atlas.

    Args:
        config: The atlas.
        atlas: Its section of the manifest, with the estimators of its method.
    """
    assert config.explanations is not None
    section = read_section(config)
    options = section["options"]
    (method,) = config.methods
    if method not in options["methods"]:
        what = f"holds maps of {', '.join(options['methods'])}, not of {method}"
        raise UserError(config.explanations, what, "Choose one of these methods.", "methods")
    require_arrays(config.explanations, options["outputs"])
    if options["target"] != config.target:
        what = f"its maps explain {options['target']!r}, not {config.target!r}"
        raise UserError(config.explanations, what, f"Pass --target {options['target']}.", "target")
    if missing := [shard for shard in config.shards if shard not in options["shards"]]:
        raise UserError(missing[0], f"was not explained by {config.explanations}", "Leave it out of --shards.")
    if difference := describe_other_maps(section, atlas, method):
        remedy = "Pass the options of these explanations, or leave out `explanations`."
        raise UserError(config.explanations, f"its maps were made with {difference}", remedy, "explanations")


def measure_stored_rows(config: AtlasConfig, model: TracedModel) -> RowShape:
    """Return the sizes of rows from stored maps.

    Raises:
        UserError: If the explain has not finished, or the model does not take images.
    """
    options = read_section(config)["options"]
    model.require_images("An atlas")
    sides = [options["size"]] if options["size"] else model.network.input_shape[1:]
    return RowShape(min(config.pooled, *sides), {})


class StoredMapsWorker(MethodWorker[AtlasConfig]):
    """A worker that makes rows of the stored maps of shards."""

    def prepare(self) -> None:
        """Find the files of the explanations."""
        options = read_section(self.config)["options"]
        self.shape = measure_stored_rows(self.config, self.model)
        self.explained = list_shard_files(str(self.config.explanations), tuple(options["shards"]))
        self.outputs, (self.method,) = options["outputs"], self.config.methods

    def work(self, task: FilesTask, following: FilesTask | None = None) -> Iterator[ShardReport]:
        """Write the rows of a shard."""
        files, source = task.files, self.explained[task.shard]
        rows = {row["key"]: row for row in read_table(source.folder / source.rows).to_pylist()}
        keys = [key for key in list(rows)[: task.max_samples] if task.uses(key)]
        unusable = read_rejected(source.folder / source.rejected)
        rejected = [each for each in unusable if task.uses(each.key)]
        missing: list[str] = []
        if task.max_samples is None or len(rows) + len(unusable) < task.max_samples:
            missing = sorted((task.only or frozenset()) - rows.keys() - {each.key for each in unusable})
        rejected += [RejectedSample(task.shard, key, "read", "it was not explained") for key in missing]
        with publish(files.folder) as folder, temporary_path(folder / files.rows) as path:
            with closing(RowWriter(path, self.shape)) as writer:
                pending: list[tuple[str, np.ndarray, int]] = []
                count = 0
                for key, array, exponent in read_maps(source, self.method, self.outputs, set(keys)):
                    pending.append((key, array, exponent))
                    if len(pending) == BATCH:
                        writer.write(self.make_rows(task, rows, pending, count))
                        count, pending = count + len(pending), []
                if pending:
                    writer.write(self.make_rows(task, rows, pending, count))
            self.publish_rejected(task, rejected)
        yield ShardReport(len(keys), len(rejected))

    def make_rows(
        self, task: FilesTask, rows: Mapping[str, Any], maps: list[tuple[str, np.ndarray, int]], first: int
    ) -> pa.Table:
        """Return the rows of some samples."""
        stacked = torch.stack([torch.from_numpy(array.astype(np.float32)) for _, array, _ in maps])
        shares, mass = to_shares(pool_maps(stacked, self.shape.side))
        exponents = np.array([exponent for _, _, exponent in maps])
        scalars = [
            {name: rows[key][name] for name in COPIED}
            | {"shard": make_printable(task.shard), "position": first + n, "class": rows[key]["target"]}
            for n, (key, _, _) in enumerate(maps)
        ]
        return make_table(self.shape, scalars, {"map": shares, "map_mass": np.ldexp(mass, exponents)})
