"""The concepts job: how the scores of classes change along the directions of a fit's concepts.

The sensitivity of a sample is the directional derivative v·Σ ∂f/∂z: f is the score of its class, z the output of an
operator before its gate, and the sum runs over positions. v = cov[h, t] / var[t] is how the mean output h moves if the
concept t grows by 1. So it is the change of the score, to first order, for such a step (Kim et al. 2018, TCAV,
arXiv 1711.11279, with the direction of Pahde et al. 2025).
"""

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from patterns import UserError
from patterns.io import write_table
from ray_jobs.config import ConceptsConfig, Resources
from ray_jobs.data.shard_reader import Batch
from ray_jobs.engine.shard_worker import ShardReport, WorkerResources
from ray_jobs.io.object_store import publish, read_table
from ray_jobs.jobs.explain.target_worker import TargetWorker
from ray_jobs.jobs.explain.targets import parse_target
from ray_jobs.jobs.job_session import JobSession, run_job
from ray_jobs.jobs.method_job import Scales, make_explainer, validate_methods
from ray_jobs.jobs.per_shard_job import FilesTask, validate_sample_count, write_shard_files
from ray_jobs.models.loading import TracedModel
from ray_jobs.runs.concept_table import read_directions
from ray_jobs.runs.run_folder import Run

Directions = dict[str, dict[str, np.ndarray]]  # by operator and concept
ROWS = pa.schema(
    [
        ("shard", pa.string()),
        ("key", pa.string()),
        ("class", pa.int64()),
        ("sensitivity", pa.list_(pa.float64())),  # operators in their order, and for each the concepts
    ]
)
SENSITIVITY = pa.schema(
    [
        ("class", pa.int64()),
        ("operator", pa.string()),
        ("concept", pa.string()),
        ("n", pa.int64()),
        ("mean", pa.float64()),
        ("standard_error", pa.float64()),
        ("positive", pa.float64()),
    ]
)


class ConceptsWorker(TargetWorker[ConceptsConfig]):
    """A worker that differentiates the scores of the samples of shards."""

    def __init__(
        self,
        config: ConceptsConfig,
        model: TracedModel,
        scales: Scales,
        directions: Directions,
        resources: WorkerResources = WorkerResources(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(config, model, scales, resources)
        self.directions = directions

    def prepare(self) -> None:
        """Place the model and the directions on the device."""
        self.prepare_target()
        network = self.model.network
        self.explainer = make_explainer(self.config, self.model, network, self.scales, channels=list(self.directions))
        stacked = {name: np.stack(list(rows.values())) for name, rows in self.directions.items()}
        self.placed = {name: torch.from_numpy(rows).to(self.model.device) for name, rows in stacked.items()}

    def work(self, task: FilesTask, following: FilesTask | None = None) -> Iterator[ShardReport]:
        """Write the sensitivities of a shard's samples, and yield reports of the progress."""
        rows: list[dict[str, Any]] = []
        with closing(self.open_stream(task, following)) as stream:
            for batch in stream:
                rows += self.differentiate(batch)
                if stream.report_due():
                    yield stream.report(len(rows))
        self.write_tables(task, stream, ROWS, rows)
        yield stream.report(len(rows))

    def differentiate(self, batch: Batch) -> list[dict[str, Any]]:
        """Return the rows of a batch."""
        images = batch.images.to(self.model.device, non_blocking=True)
        found = self.explainer(images, lambda scores: self.target.make_targets(scores, batch.labels))
        assert found.channels is not None
        gradients = found.channels.relevance["gradient"]
        values = [gradients[name].double() @ v.T for name, v in self.placed.items()]
        columns = zip(batch.keys, found.targets.tolist(), torch.cat(values, 1).tolist())
        return [{"key": key, "class": each, "sensitivity": row} for key, each, row in columns]


@dataclass
class ClassSums:
    """Sums over the samples of a class, each of shape (operators · concepts,).

    Attributes:
        n: Number of samples.
        total: Sum of the sensitivities.
        squares: Sum of their squares.
        positive: Number of samples with a positive sensitivity.
    """

    n: int
    total: np.ndarray
    squares: np.ndarray
    positive: np.ndarray

    def add(self, values: np.ndarray) -> None:
        """Add samples, shape (N, operators · concepts)."""
        self.n += len(values)
        self.total += values.sum(0)
        self.squares += np.square(values).sum(0)
        self.positive += (values > 0).sum(0)


def summarize(tables: Iterable[pa.Table], directions: Directions) -> tuple[pa.Table, int]:
    """Return mean, standard error and share of positive sensitivities by class, operator and concept; and the samples.

    Args:
        tables: The rows of the shards.
        directions: The directions by operator and concept.
    """
    names = [(operator, concept) for operator, rows in directions.items() for concept in rows]
    sums: dict[int, ClassSums] = {}
    for table in tables:
        classes = table["class"].to_numpy()
        values = np.array(table["sensitivity"].to_pylist(), dtype=np.float64).reshape(-1, len(names))
        for number in np.unique(classes).tolist():
            zeros = np.zeros(len(names))
            sums.setdefault(number, ClassSums(0, zeros, zeros.copy(), zeros.copy())).add(values[classes == number])
    rows = []
    for number, found in sorted(sums.items()):
        mean = found.total / found.n
        variance = np.maximum(found.squares / found.n - mean**2, 0) * found.n / max(found.n - 1, 1)
        error = np.sqrt(variance / found.n) if found.n > 1 else np.full(len(names), np.nan)
        for k, (operator, concept) in enumerate(names):
            rows.append((number, operator, concept, found.n, mean[k], error[k], found.positive[k] / found.n))
    table = pa.Table.from_pylist([dict(zip(SENSITIVITY.names, row)) for row in rows], SENSITIVITY)
    return table, sum(each.n for each in sums.values())


def validate_target(config: ConceptsConfig, model: TracedModel) -> None:
    """Raise UserError if the target is not one class for each sample."""
    target = parse_target(config.target, model.network, config.classes, config.vector)
    one_class = len(target.picks) == 1 and not (target.against_others or target.embeds)
    if not one_class or target.operator is not None or target.region is not None:
        remedy = "Choose predicted, label, or a class by number or name."
        raise UserError(config.target, "concepts need one class for each sample", remedy, "target")


def concepts(config: ConceptsConfig, resources: Resources = Resources()) -> Run:  # noqa: B008 - frozen
    """Measure how sensitive classes are to the concepts of a fit, or resume a job that ended early; see `run_job`."""
    work = partial(differentiate_shards, read_directions(config.patterns))
    return run_job("concepts", config, resources, work)


def differentiate_shards(
    directions: Directions, session: JobSession, config: ConceptsConfig, resources: Resources
) -> None:
    """Differentiate the scores of the samples of shards, and write the sensitivity of each class."""
    run, model = session.run, session.loaded.traced
    fitted = Run(config.patterns).manifest()["model"]
    model.require(fitted["digest"], fitted.get("constants"), config.patterns, "the fit of the concepts")
    validate_target(config, model)
    recorded = validate_methods(config, model, model.network, session.section)
    with session.work(resources, **recorded):
        count = len(next(iter(directions.values())))
        message = f"{count} concepts in {len(directions)} operators"
        arguments = ConceptsWorker, model, recorded["scales"], directions
        done = write_shard_files(session, config, resources, "sensitivity", message, *arguments)
        table, samples = summarize((read_table(files.folder / files.rows) for files in done), directions)
        with publish(run.folder) as folder:
            write_table(folder / "sensitivity.parquet", SENSITIVITY, [table])
        validate_sample_count(session, samples, resources)
        session.section["samples"] = samples
