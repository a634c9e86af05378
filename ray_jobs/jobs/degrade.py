"""The degrade job: replace an image's patches in the order of a method's map → how fast the prediction falls.

To add a metric, write its formula in `patterns.evaluation.degradation`, and add a field to `Degraded` and a column to
`ROWS`.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from patterns import Explanation, UserError
from patterns.evaluation import (
    REPLACEMENTS,
    area_over_curve,
    compute_relevance,
    degrade_stepwise,
)
from patterns.io import write_table
from ray_jobs.config import DegradeConfig, Preprocessing, Resources
from ray_jobs.data.shard_reader import Batch
from ray_jobs.engine.shard_worker import BatchStream, ShardReport
from ray_jobs.figures.drawing import draw_degradation
from ray_jobs.io.object_store import publish, read_table
from ray_jobs.jobs.job_session import JobSession, run_job
from ray_jobs.jobs.method_job import MethodWorker, add_baselines, make_explainer, validate_methods, validate_settings
from ray_jobs.jobs.per_shard_job import FilesTask, validate_sample_count, write_shard_files
from ray_jobs.models.loading import TracedModel
from ray_jobs.runs.run_folder import Run

BAND_ERRORS = 1.959964  # standard errors from the mean to each end of a confidence band of 95 %

ROWS = pa.schema(
    [
        ("shard", pa.string()),
        ("key", pa.string()),
        ("label", pa.int64()),
        ("prediction", pa.int64()),
        ("method", pa.string()),
        ("area", pa.float32()),
        ("curve", pa.list_(pa.float32())),
    ]
)
CURVES = pa.schema(
    [
        ("method", pa.string()),
        ("step", pa.int32()),
        ("mean", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Degraded:
    """The degradation of a batch by the maps of one method.

    Attributes:
        method: The method.
        curves: The probability of the prediction after each step, float32 (N, steps + 1).
        areas: The area over each curve, float64 (N,).
    """

    method: str
    curves: Tensor
    areas: Tensor


class DegradeWorker(MethodWorker[DegradeConfig]):
    """A worker that degrades the images of shards."""

    def prepare(self) -> None:
        """Place the model on the device, and load its patterns."""
        self.place_model()
        self.explainer = make_explainer(self.config, self.model, self.model.network, self.scales)

    def work(self, task: FilesTask, following: FilesTask | None = None) -> Iterator[ShardReport]:
        """Degrade the images of a shard, and yield reports of the progress."""
        rows: list[dict[str, Any]] = []
        samples = 0
        with closing(self.open_stream(task, following)) as stream:
            for batch in stream:
                for found in self.degrade(batch, stream):
                    if found is None:
                        yield stream.report(samples)
                    else:
                        rows += found
                samples += len(batch.keys)
        self.write_tables(task, stream, ROWS, rows)
        yield stream.report(samples)

    def degrade(self, batch: Batch, stream: BatchStream) -> Iterator[list[dict[str, Any]] | None]:
        """Yield the rows of a batch for each method, and None each time a report of the progress is due."""
        images = batch.images.to(self.model.device, non_blocking=True)
        explanation = self.explainer(images, None, self.make_seeds(batch.keys))
        for found in compute_curves(self.model, self.config, images, explanation):
            if found is None:
                if stream.report_due():
                    yield None
                continue
            columns = {
                "key": batch.keys,
                "label": batch.labels,
                "prediction": explanation.scores.argmax(1).tolist(),
                "method": [found.method] * len(batch.keys),
                "area": found.areas.tolist(),
                "curve": found.curves.tolist(),
            }
            yield [dict(zip(columns, row)) for row in zip(*columns.values())]


@torch.inference_mode()
def compute_curves(
    model: TracedModel, config: DegradeConfig, images: Tensor, explanation: Explanation
) -> Iterator[Degraded | None]:
    """Degrade images in the order of each method's maps.

    Args:
        model: The model.
        config: The patches and steps.
        images: Shape (N, C, H, W).
        explanation: Their maps for the predicted classes.

    Yields:
        The degradation by each method, and before it None after every few steps.
    """
    probability, prediction = explanation.scores.float().softmax(1).max(1)
    replacement = REPLACEMENTS[config.replacement](images, config.patch, make_black(model.preprocessing))
    group = max(1, config.batch_size // len(images))
    for method, maps in explanation.maps.items():
        relevance = compute_relevance(method, maps)
        curve = [probability[:, None]]
        for degraded in degrade_stepwise(
            images, replacement, relevance, config.patch, config.steps, group, config.least_first
        ):
            scores = model.network.module(degraded.flatten(0, 1)).float().softmax(1).unflatten(0, degraded.shape[:2])
            curve.append(scores.take_along_dim(prediction[:, None, None], 2)[..., 0])
            yield None
        curves = torch.cat(curve, 1)
        yield Degraded(method, curves, area_over_curve(curves.double()))


def make_black(preprocessing: Preprocessing) -> Tensor:
    """Return a black pixel in the model's input, (C, 1, 1)."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return -mean / std


def validate_model(config: DegradeConfig, model: TracedModel) -> None:
    """Raise UserError if the model predicts no classes, or its images have fewer patches than steps."""
    if len(model.network.output_shape) != 1 or model.network.output_shape == (1,):
        what = f"the model's outputs have the shape {model.network.output_shape}, and are not a score for each class"
        raise UserError(config.model.spec, what, "Degrade images for a model whose output is (N, classes).", "model")
    size = model.preprocessing.image_size
    patches = math.ceil(size / config.patch) ** 2
    if config.steps > patches:
        shape = f"{config.patch}×{config.patch}"
        what = f"{config.steps} steps, but images of {size}×{size} pixels have {patches} patches of {shape}"
        raise UserError("", what, "Choose fewer `steps` or a smaller `patch`.", "steps")


def degrade(config: DegradeConfig, resources: Resources = Resources()) -> Run:  # noqa: B008 - frozen
    """Degrade images by each method and the baselines, or resume a job that ended early; see `run_job`."""
    config = add_baselines(config)
    validate_settings(config)
    return run_job("degrade", config, resources, degrade_shards)


def degrade_shards(session: JobSession, config: DegradeConfig, resources: Resources) -> None:
    """Degrade the images of shards, and write the curves of each method."""
    run, model = session.run, session.loaded.traced
    validate_model(config, model)
    recorded = validate_methods(config, model, model.network, session.section)
    with session.work(resources, **recorded):
        count = len(config.methods)
        message = (
            f"each image goes through the model {config.steps * count} times: {count} methods, {config.steps} steps"
        )
        arguments = DegradeWorker, model, recorded["scales"]
        done = write_shard_files(session, config, resources, "degradation", message, *arguments)
        means = {method: MeanCurve(config.steps + 1) for method in config.methods}
        with publish(run.folder) as folder:
            tables = (read_table(files.folder / files.rows) for files in done)
            write_table(folder / "degradation.parquet", ROWS, add_tables(tables, means))
            samples = next(iter(means.values())).count
            validate_sample_count(session, samples, resources)
            curves = pa.concat_tables(mean.table(method) for method, mean in means.items())
            write_table(folder / "degradation-curves.parquet", CURVES, [curves])
            draw_degradation(folder / "degradation.png", curves)
        session.section |= {"samples": samples, "areas": {method: mean.area() for method, mean in means.items()}}


@dataclass
class MeanCurve:
    """The mean of a method's curves and of the areas over them, with confidence bands.

    Attributes:
        length: The number of points of a curve.
        count: The number of curves.
        sums: The sums of each point and of the area, float64 (length + 1,).
        squares: The sums of squares, in the same order.
    """

    length: int
    count: int = 0
    sums: np.ndarray = field(init=False)
    squares: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        """Start with no curves."""
        self.sums, self.squares = np.zeros((2, self.length + 1))

    def add(self, curves: np.ndarray, areas: np.ndarray) -> None:
        """Add the curves (n, length) and areas (n,) of some samples."""
        values = np.column_stack([curves, areas]).astype(np.float64)
        self.count += len(values)
        self.sums += values.sum(0)
        self.squares += (values**2).sum(0)

    def bands(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the means, and half the widths of their confidence bands of 95 %; nan if there is a single sample."""
        mean = self.sums / self.count
        with np.errstate(divide="ignore", invalid="ignore"):
            variance = np.maximum(self.squares / self.count - mean**2, 0) * (self.count / np.float64(self.count - 1))
        return mean, BAND_ERRORS * np.sqrt(variance / self.count)

    def table(self, method: str) -> pa.Table:
        """Return the curve, in the schema CURVES."""
        mean, half = (values[:-1] for values in self.bands())
        steps = np.arange(self.length, dtype=np.int32)
        return pa.table([[method] * self.length, steps, mean, mean - half, mean + half], schema=CURVES)

    def area(self) -> dict[str, float | None]:
        """Return the area over the curve and its band, whose ends are None if there is a single sample."""
        mean, half = (float(values[-1]) for values in self.bands())
        low, high = (None, None) if math.isnan(half) else (mean - half, mean + half)
        return {"area": mean, "low": low, "high": high}


def add_tables(tables: Iterable[pa.Table], means: dict[str, MeanCurve]) -> Iterator[pa.Table]:
    """Yield tables of rows, after adding each to the means of its methods."""
    for table in tables:
        for method, mean in means.items():
            own = table.filter(pa.compute.equal(table["method"], method))
            if len(own):
                mean.add(np.stack(own["curve"].to_numpy()), own["area"].to_numpy())
        yield table


def format_areas(run: Run) -> list[str]:
    """Return a line for each method of a finished job, the largest area over the curve first."""
    areas: dict[str, dict[str, float | None]] = run.manifest()["degrade"]["areas"]

    def format_area(method: str, found: dict[str, float | None]) -> str:
        band = "" if found["low"] is None else f" ({found['low']:.4f} to {found['high']:.4f})"
        return f"{method:>32}  area over the curve {found['area']:.4f}{band}"

    return [format_area(*item) for item in sorted(areas.items(), key=lambda item: -(item[1]["area"] or 0.0))]
