"""The common part of the jobs with methods: a model, its patterns and methods, and files for each shard."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

import pyarrow as pa

from patterns import CHOICES, ESTIMATORS, Explainer, Network, UserError, choose
from patterns.attribution import BASELINES, parse_method, resolve_settings
from patterns.estimation import resolve_estimators
from patterns.io import write_table
from ray_jobs.config import MethodsConfig
from ray_jobs.data.samples import RejectedSample, derive_seed
from ray_jobs.engine.shard_worker import BatchStream, ShardWorker, WorkerResources, make_reader_config
from ray_jobs.io.object_store import publish
from ray_jobs.jobs.per_shard_job import FilesTask
from ray_jobs.models.loading import TracedModel
from ray_jobs.runs.run_folder import Run, list_solved, load_patterns, write_rejected
from ray_jobs.units import make_printable

Scales = dict[str, list[int]]  # the potential of each method's backward pass; see `Explainer.scales`
C = TypeVar("C", bound=MethodsConfig)


class MethodWorker(ShardWorker[FilesTask], Generic[C]):
    """A worker that holds the model and its patterns; nothing is lost with it."""

    def __init__(
        self,
        config: C,
        model: TracedModel,
        scales: Scales,
        resources: WorkerResources = WorkerResources(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(model, resources)
        self.config, self.scales = config, scales

    def place_model(self) -> None:
        """Place the model on the device."""
        self.model = self.resources.place(self.model)
        self.reader_config = make_reader_config(self.model, self.config.batch_size, self.resources.decoders)

    def make_seeds(self, keys: Sequence[str]) -> list[int]:
        """Return the seed of each sample."""
        return [derive_seed(f"{self.config.seed}/{key}") for key in keys]

    def publish_rejected(self, task: FilesTask, rejected: Iterable[RejectedSample]) -> None:
        """Write the table of a shard's rejected samples."""
        with publish(task.files.folder) as folder:
            write_rejected(folder / task.files.rejected, rejected)

    def write_tables(self, task: FilesTask, stream: BatchStream, schema: pa.Schema, rows: list[dict[str, Any]]) -> None:
        """Write the table of rejected samples, and last the rows, with which the shard is finished."""
        files = task.files
        self.publish_rejected(task, stream.reader.rejected)
        rows = [{"shard": make_printable(task.shard), **row} for row in rows]
        with publish(files.folder) as folder:
            write_table(folder / files.rows, schema, [pa.Table.from_pylist(rows, schema)])


def make_explainer(
    config: MethodsConfig,
    model: TracedModel,
    network: Network,
    scales: Scales,
    folder: str | None = None,
    channels: Collection[str] = (),
) -> Explainer:
    """Return the explainer of a config's methods, with the patterns of its run.

    Args:
        config: The methods.
        model: The model.
        network: The model's network, or one with the same operators or fewer.
        scales: The scales that an earlier explainer has calibrated, by method.
        folder: The folder of the patterns. None: the run's.
        channels: The operators whose channels are recorded.

    Raises:
        UserError: If the patterns are missing, or those of another model.
    """
    chosen, estimators = choose_patterns(config, model, network, folder)
    return Explainer(network, chosen, config.methods, scales, estimators, dict(config.settings), channels)


def choose_patterns(
    config: MethodsConfig, model: TracedModel, network: Network, folder: str | None = None
) -> tuple[Any, dict[str, Any]]:
    """Return the patterns of the methods that name no estimator (None if there are none), and those by estimator."""
    names = list_estimators(config)
    if not names:
        return None, {}
    patterns = load_patterns(folder or config.patterns, model.digest)
    Run(config.patterns).require_model(model)
    chosen = {name: choose(network, patterns, name or config.estimators) for name in names}
    return chosen.pop("", None), chosen


def list_estimators(config: MethodsConfig) -> list[str]:
    """Return the estimators that the methods with patterns name; "" for those of the config."""
    backward = (parse_method(name).backward for name in config.methods)
    return list(dict.fromkeys(b.estimator for b in backward if b is not None and b.needs_patterns))


def describe_estimators(config: MethodsConfig, network: Network) -> dict[str, dict[str, str]]:
    """Return the estimator of each operator for each method with patterns, for the manifest.

    Additions with outlier tokens have the pattern of `filter` in place of one from data.
    """
    if not list_estimators(config):
        return {}
    solved, found = list_solved(config.patterns), {}
    outliers = Run(config.patterns).manifest().get("fit", {}).get("outliers", ())
    for name in config.methods:
        backward = parse_method(name).backward
        if backward is not None and backward.needs_patterns:
            chosen = resolve_estimators(network, backward.estimator or config.estimators, solved)
            found[name] = {op: "filter" if op in outliers and uses_data(e) else e for op, e in chosen.items()}
    return found


def uses_data(estimator: str) -> bool:
    """Return whether an estimator's patterns depend on data; the name is one of `CHOICES`."""
    return any(ESTIMATORS[row].uses_data for rows in CHOICES[estimator] for row in rows)


def add_baselines(config: C) -> C:
    """Return a config with the methods that do not depend on the model in addition to its own."""
    return replace(config, methods=tuple(dict.fromkeys((*config.methods, *BASELINES))))


def validate_settings(config: MethodsConfig) -> dict[str, float]:
    """Return all settings of a config's methods.

    Raises:
        UserError: If a method or a setting does not exist, or a value is not allowed.
    """
    return resolve_settings({name: parse_method(name) for name in config.methods}, dict(config.settings))


def validate_methods(
    config: MethodsConfig, model: TracedModel, network: Network, section: Mapping[str, Any]
) -> dict[str, Any]:
    """Check on the driver that the workers can make the explainer, and calibrate its scales once for all workers.

    Args:
        config: The methods.
        model: The model.
        network: The model's network, or the one that ends at the explained operator.
        section: The job's section of the manifest, which an earlier driver may have written.

    Returns:
        The manifest's entries `scales`, `settings` and `estimators`.

    Raises:
        UserError: If the patterns are missing or those of another model, or the job was begun with other estimators.
    """
    settings, scales = validate_settings(config), section.get("scales", {})
    if scales:
        choose_patterns(config, model, network)
    else:
        scales = make_explainer(config, model, network, {}).scales
    estimators = describe_estimators(config, network)
    if section.get("estimators", estimators) != estimators:
        what = "this job was begun when the fit had the patterns of other estimators"
        raise UserError(config.out, what, "Choose another --out.")
    return {"scales": scales, "settings": settings, "estimators": estimators}
