"""The worker of the atlas: it writes a row for each sample of a shard, from a pass or from stored maps of `explain`."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import torch

from patterns import UserError
from patterns.attribution import Channels, list_last_of_resolutions
from patterns.io import temporary_path
from ray_jobs.config import AtlasConfig
from ray_jobs.data.samples import RejectedSample
from ray_jobs.data.shard_reader import Batch
from ray_jobs.engine.shard_worker import ShardReport, compile_batches
from ray_jobs.io.object_store import publish
from ray_jobs.jobs.atlas.rows import (
    RowShape,
    RowWriter,
    activation_column,
    make_table,
    mass_column,
    pool_maps,
    relevance_column,
    to_half,
    to_shares,
)
from ray_jobs.jobs.explain.target_worker import TargetWorker
from ray_jobs.jobs.explain.targets import parse_target
from ray_jobs.jobs.method_job import make_explainer
from ray_jobs.jobs.per_shard_job import FilesTask
from ray_jobs.models.loading import TracedModel
from ray_jobs.units import make_printable


def choose_operators(config: AtlasConfig, model: TracedModel) -> tuple[str, ...]:
    """Return the operators whose channels are recorded.

    Raises:
        UserError: If the model has no such operator.
    """
    known = model.network.operators
    if unknown := [name for name in config.operators if name not in known]:
        what = f"the model has no operator {unknown[0]!r}"
        raise UserError("", what, "See `patternnet plan` for their names.", "operators")
    return config.operators or list_last_of_resolutions(model.network)


def measure_rows(config: AtlasConfig, model: TracedModel) -> RowShape:
    """Return the sizes of the rows.

    Raises:
        UserError: If the model does not take images, or an operator does not exist.
    """
    network = model.network
    model.require_images("An atlas")
    side = min(config.pooled, *network.input_shape[1:])
    operators = choose_operators(config, model)
    last = list(network.operators.values())[-1]
    channels = {name: network.operators[name].neurons for name in operators}
    return RowShape(side, channels, last.input_shapes[0][last.sample_axis])


def validate_target(config: AtlasConfig, model: TracedModel) -> None:
    """Raise UserError if the target is not a single map of a class for each sample."""
    target = parse_target(config.target, model.network, config.classes, config.vector)
    if target.maps > 1 or target.operator is not None or target.region is not None or target.embeds:
        remedy = "Choose predicted, second, label, contrast, a class, A-vs-B or A-vs-others."
        raise UserError(config.target, "an atlas needs one map of a class for each sample", remedy, "target")


class AtlasWorker(TargetWorker[AtlasConfig]):
    """A worker that explains shards and keeps a row for each sample."""

    def prepare(self) -> None:
        """Place the model on the device, and load its patterns."""
        self.prepare_target()
        self.shape, (self.method,) = measure_rows(self.config, self.model), self.config.methods
        network, operators = self.model.network, tuple(self.shape.channels)
        self.explainer = make_explainer(self.config, self.model, network, self.scales, channels=operators)
        compile_batches(self.explainer, self.config.compile, self.config.batch_size, self.model.device)

    def work(self, task: FilesTask, following: FilesTask | None = None) -> Iterator[ShardReport]:
        """Write the rows of a shard, and yield reports of the progress. The file of rows gets its name last."""
        files, count = task.files, 0
        rejected: list[RejectedSample] = []
        with (
            closing(self.open_stream(task, following)) as stream,
            publish(files.folder) as folder,
            temporary_path(folder / files.rows) as path,
        ):
            with closing(RowWriter(path, self.shape)) as writer:
                for batch in stream:
                    count += self.write_batch(task, batch, count, writer, rejected)
                    if stream.report_due():
                        yield stream.report(count, len(rejected))
            self.publish_rejected(task, [*stream.reader.rejected, *rejected])
        yield stream.report(count, len(rejected))

    def write_batch(
        self, task: FilesTask, batch: Batch, first: int, writer: RowWriter, rejected: list[RejectedSample]
    ) -> int:
        """Write the rows of a batch and return their number; samples whose map is not finite are rejected."""
        images = batch.images.to(self.model.device, non_blocking=True)
        explanation = self.explainer(
            images, lambda scores: self.target.make_targets(scores, batch.labels), self.make_seeds(batch.keys)
        )
        assert explanation.channels is not None
        pooled = pool_maps(explanation.maps[self.method], self.shape.side)
        maps, mass = to_shares(pooled)
        exponent = explanation.exponents[self.method]
        lists = {"map": maps, "map_mass": np.ldexp(mass, exponent)}
        lists |= describe_channels(explanation.channels, self.method)
        rows: list[dict[str, Any]] = self.describe_samples(batch, images, explanation)
        losses = cross_entropy(explanation.scores.float(), batch.labels)
        finite = np.isfinite(mass)
        kept = np.flatnonzero(finite)
        for number in np.flatnonzero(~finite):
            rejected.append(RejectedSample(task.shard, batch.keys[number], "model", "its map is not finite"))
        shard = make_printable(task.shard)
        chosen = [
            {"shard": shard, "key": batch.keys[k], "position": first + n, "loss": losses[k], "class": rows[k]["target"]}
            | rows[k]
            for n, k in enumerate(kept)
        ]
        writer.write(make_table(self.shape, chosen, {name: values[kept] for name, values in lists.items()}))
        return len(kept)


def describe_channels(channels: Channels, method: str) -> dict[str, np.ndarray]:
    """Return the columns of the channels, and the embedding."""
    found = {"embedding": to_half(channels.embedding)}
    for name, relevance in channels.relevance[method].items():
        found[relevance_column(name)], found[mass_column(name)] = to_shares(relevance)
        found[activation_column(name)] = to_half(channels.activation[name])
    return found


def cross_entropy(scores: torch.Tensor, labels: list[int | None]) -> list[float | None]:
    """Return the cross entropy of each sample's label; None without a label among the classes."""
    if scores.dim() != 2 or scores.shape[1] < 2:
        return [None] * len(labels)
    known = [label is not None and 0 <= label < scores.shape[1] for label in labels]
    classes = torch.tensor([label if ok else 0 for label, ok in zip(labels, known)], device=scores.device)
    losses = torch.nn.functional.cross_entropy(scores, classes, reduction="none").tolist()
    return [loss if ok else None for loss, ok in zip(losses, known)]
