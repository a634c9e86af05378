"""The evaluate job: several measures of the maps of several methods → one table with standard errors."""

import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from patterns import Explainer, Network, UserError
from patterns.attribution import BASELINES
from patterns.io import write_table
from ray_jobs.config import EvaluateConfig, Resources
from ray_jobs.engine.shard_worker import ShardReport
from ray_jobs.figures.drawing import draw_evaluation
from ray_jobs.io.object_store import publish, read_table
from ray_jobs.jobs.degrade import validate_model
from ray_jobs.jobs.evaluation_measures import MEASURES, Context, Explained, Measure, Result
from ray_jobs.jobs.job_session import JobSession, run_job
from ray_jobs.jobs.method_job import (
    MethodWorker,
    add_baselines,
    choose_patterns,
    make_explainer,
    validate_methods,
    validate_settings,
)
from ray_jobs.jobs.per_shard_job import FilesTask, validate_sample_count, write_shard_files
from ray_jobs.jobs.refitting import refit
from ray_jobs.models.loading import TracedModel
from ray_jobs.runs.run_folder import Run

REFITTED = "refitted"  # folder of the patterns of the network with random weights
TIMED = 3  # repetitions, of which the fastest counts
ROWS = pa.schema(
    [
        ("shard", pa.string()),
        ("measure", pa.string()),
        ("method", pa.string()),
        ("key", pa.string()),
        ("value", pa.float64()),
    ]
)
SUMMARY = pa.schema(
    [
        ("measure", pa.string()),
        ("method", pa.string()),
        ("mean", pa.float64()),
        ("error", pa.float64()),
        ("samples", pa.int64()),
    ]
)


class EvaluateWorker(MethodWorker[EvaluateConfig]):
    """A worker that measures the maps of shards."""

    def prepare(self) -> None:
        """Place the model on the device, load its patterns, and prepare the measures."""
        self.place_model()
        self.explainer = self.explain_network(self.model.network)
        self.context = Context(self.config, self.model, self.explainer, self.explain_network, self.make_seeds)
        self.measures: dict[str, Measure] = {name: MEASURES[name].make(self.context) for name in self.config.measures}

    def explain_network(self, network: Network, refitted: bool = False) -> Explainer:
        """Return the explainer of the network or of one with random weights, with refitted patterns if asked."""
        folder = str(Run(self.config.out).folder / REFITTED) if refitted else None
        return make_explainer(self.config, self.model, network, self.scales, folder)

    def work(self, task: FilesTask, following: FilesTask | None = None) -> Iterator[ShardReport]:
        """Measure the maps of a shard, and yield reports of the progress."""
        rows: list[dict[str, Any]] = []
        samples = 0

        def add(name: str, found: Result) -> None:
            rows.append({"measure": name, "method": found.method, "key": found.key, "value": found.value})

        with closing(self.open_stream(task, following)) as stream:
            for batch in stream:
                images = batch.images.to(self.model.device, non_blocking=True)
                explanation = self.context.explain(self.explainer, images, batch.keys)
                for name, measure in self.measures.items():
                    for found in measure.add(Explained(batch, images, explanation)):
                        if found is not None:
                            add(name, found)
                        elif stream.report_due():
                            yield stream.report(samples)
                samples += len(batch.keys)
        for name, measure in self.measures.items():
            for result in measure.finish():
                add(name, result)
        self.write_tables(task, stream, ROWS, rows)
        yield stream.report(samples)


def validate(config: EvaluateConfig, model: TracedModel) -> EvaluateConfig:
    """Return the config with the measures that the network allows.

    Raises:
        UserError: If the model predicts no classes, or allows none of the measures.
    """
    validate_model(config, model)
    allowed = tuple(name for name in config.measures if find_obstacle(name, model.network) is None)
    if not allowed:
        what = f"{config.measures[0]} cannot be measured: {find_obstacle(config.measures[0], model.network)}"
        raise UserError("", what, f"Choose from {', '.join(MEASURES)}.", "measures")
    return replace(config, measures=allowed)


def find_obstacle(measure: str, network: Network) -> str | None:
    """Return why a network cannot be measured; None if it can."""
    return MEASURES[measure].obstacle(network)


def describe_measure(measure: str) -> dict[str, Any]:
    """Return a measure's title and direction, for the manifest."""
    return {"title": MEASURES[measure].title, "higher_is_better": MEASURES[measure].higher_is_better}


def evaluate(config: EvaluateConfig, resources: Resources = Resources()) -> Run:  # noqa: B008 - frozen
    """Measure the maps of shards by each method and the baselines, or resume a job that ended early; see `run_job`."""
    config = add_baselines(config)
    validate_settings(config)
    return run_job("evaluate", config, resources, evaluate_shards)


def evaluate_shards(session: JobSession, config: EvaluateConfig, resources: Resources) -> None:
    """Measure the maps of shards, and write the mean of each measure and method."""
    run, model = session.run, session.loaded.traced
    measured = validate(config, model)
    recorded = validate_methods(config, model, model.network, session.section)
    obstacles = {name: found for name in config.measures if (found := find_obstacle(name, model.network))}
    described = {name: describe_measure(name) for name in config.measures}
    with session.work(resources, **recorded, measures=described, not_measured=obstacles):
        message = f"{len(config.methods)} methods, {len(measured.measures)} measures"
        message += "".join(f"; {name} cannot be measured: {reason}" for name, reason in obstacles.items())
        if any(MEASURES[name].refitted for name in measured.measures):
            refit(config, model, session.selection, run.folder / REFITTED)
        arguments = EvaluateWorker, model, recorded["scales"]
        done = write_shard_files(session, measured, resources, "evaluation", message, *arguments)
        tables = [read_table(files.folder / files.rows) for files in done]
        summary = summarize(tables)
        with publish(run.folder) as folder:
            write_table(folder / "evaluation.parquet", ROWS, tables)
            write_table(folder / "evaluation-summary.parquet", SUMMARY, [summary])
            titles = {name: (row.title, row.higher_is_better) for name, row in MEASURES.items()}
            draw_evaluation(folder / "evaluation.png", summary, titles)
        samples = len({(row["shard"], row["key"]) for table in tables for row in table.to_pylist()})
        validate_sample_count(session, samples, resources)
        without = {*measured.measures} - {*summary["measure"].to_pylist()}
        missing = {name: MEASURES[name].missing for name in measured.measures if name in without}
        session.section["not_measured"] = obstacles | missing
        session.section |= {"samples": samples, "times": measure_times(config, model, recorded["scales"])}


def summarize(tables: Iterable[pa.Table]) -> pa.Table:
    """Return the mean of each measure and method with its standard error, in the schema SUMMARY.

    A sample with several values, such as one that is part of several grids, counts once, with their mean.
    """
    values: dict[tuple[str, str], dict[tuple[str, str], list[float]]] = {}
    for table in tables:
        for row in table.to_pylist():
            of_samples = values.setdefault((row["measure"], row["method"]), {})
            of_samples.setdefault((row["shard"], row["key"]), []).append(row["value"])
    rows = []
    for (measure, method), of_samples in values.items():
        means = np.array([np.mean(found) for found in of_samples.values()])
        error = float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else None
        rows.append((measure, method, float(means.mean()), error, len(means)))
    rows.sort(key=lambda row: (list(MEASURES).index(row[0]), row[1] in BASELINES))
    return pa.table(list(map(list, zip(*rows))) if rows else [[]] * len(SUMMARY), schema=SUMMARY)


def measure_times(config: EvaluateConfig, model: TracedModel, scales: dict[str, list[int]]) -> dict[str, float]:
    """Return the time of a map by each method, in units of the time of a gradient, on this machine."""
    images = torch.zeros((1, *model.network.input_shape)).to(model.network.like)
    chosen, estimators = choose_patterns(config, model, model.network)

    def seconds(method: str) -> float:
        settings = {name: value for name, value in config.settings if name.startswith(f"{method}.")}
        explainer = Explainer(model.network, chosen, [method], scales, estimators, settings)
        times = []
        for _ in range(TIMED):
            begun = time.perf_counter()
            explainer(images)
            times.append(time.perf_counter() - begun)
        return min(times)

    gradient = seconds("gradient")
    return {method: round(seconds(method) / gradient, 2) for method in config.methods}


def format_summary(run: Run) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a finished job's table: methods, measures, and the time of a map."""
    summary = read_table(run.folder / "evaluation-summary.parquet").to_pylist()
    times: dict[str, float] = run.manifest()["evaluate"]["times"]
    measures = list(dict.fromkeys(row["measure"] for row in summary))
    cells = {(row["method"], row["measure"]): format_value(row["mean"], row["error"]) for row in summary}
    header = ["method", *(f"{name} {'↑' if MEASURES[name].higher_is_better else '↓'}" for name in measures), "time"]
    rows = [[m, *(cells.get((m, each), "–") for each in measures), f"{times[m]:.1f}×"] for m in times]
    return header, rows


def format_value(mean: float, error: float | None) -> str:
    """Format a mean with its standard error."""
    return f"{mean:.3f}" if error is None else f"{mean:.3f} ± {error:.3f}"
