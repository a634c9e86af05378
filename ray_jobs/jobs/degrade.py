"""The degrade job: images, patch by patch taken away in the order of each method's map → how soon predictions fall."""

import math
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from patterns import UserError
from patterns.attribution import BASELINES, method_of, settings_of
from patterns.evaluation import REPLACEMENTS, area_over, degraded, patch_of, patch_sums, relevance_of, turns
from patterns.io import write_table
from ray_jobs.config import DegradeConfig, Preprocessing, Resources
from ray_jobs.data.samples import seed_of
from ray_jobs.data.shard_reader import Batch, ShardReader
from ray_jobs.engine.ray_session import connected
from ray_jobs.engine.shard_worker import BatchStream, ShardReport, ShardWorker, WorkerResources
from ray_jobs.figures.drawing import draw_degradation
from ray_jobs.io.object_store import published, read_table
from ray_jobs.jobs.explain.explain import Scales, explainer
from ray_jobs.jobs.per_shard_job import ShardTask, enough_used, shard_by_shard
from ray_jobs.models import loading
from ray_jobs.runs.lease import hold_lease, tidy
from ray_jobs.runs.run_folder import Run, write_refused
from ray_jobs.units import printable

SURE = 1.959964  # standard errors that a confidence band of 95 % reaches to each side

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


class DegradeWorker(ShardWorker[ShardTask]):
    """Holds the model and its patterns, and nothing that a lost worker would take along."""

    def __init__(
        self,
        config: DegradeConfig,
        weights: loading.ModelDigests,
        scales: Scales,
        share: WorkerResources = WorkerResources(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(share)
        self.config, self.weights, self.scales = config, weights, scales

    def ready(self) -> None:
        """Load the model and its patterns."""
        self.loaded = self.share.load(self.config.model, self.weights)
        self.explainer = explainer(self.config, self.loaded, None, self.scales)

    def reader(self, task: ShardTask) -> ShardReader:
        loaded, size = self.loaded, self.config.batch_size
        return ShardReader(task.shard, loaded.preprocessing, size, loaded.dtype, task.most, threads=self.share.decoders)

    def work(self, task: ShardTask, following: ShardTask | None = None) -> Iterator[ShardReport]:
        """Degrade the images of a shard, or its first samples, telling now and then how far it is."""
        rows: list[dict[str, Any]] = []
        out, samples = task.out, 0
        with closing(self.stream(task, following)) as stream:
            for batch in stream:
                for found in self.degrade(batch, stream):
                    if found is None:
                        yield stream.report(samples)
                    else:
                        rows += [{"shard": printable(task.shard), **row} for row in found]
                samples += len(batch.keys)
        with published(out.folder) as folder:
            write_refused(folder / out.refused, stream.reader.refused)
        with published(out.folder) as folder:
            write_table(folder / out.rows, ROWS, [pa.Table.from_pylist(rows, ROWS)])
        yield stream.report(samples)

    def degrade(self, batch: Batch, stream: BatchStream) -> Iterator[list[dict[str, Any]] | None]:
        """The rows of a batch, method by method; None now and then between, when it is time to tell."""
        config = self.config
        images = batch.images.to(self.loaded.device, non_blocking=True)
        explanation = self.explainer(images, None, [seed_of(f"{config.seed}/{key}") for key in batch.keys])
        probability, prediction = explanation.scores.float().softmax(1).max(1)
        replaced = REPLACEMENTS[config.replacement](images, config.patch, black(self.loaded.preprocessing))
        where = patch_of(images.shape[2], images.shape[3], config.patch).to(images.device)
        for method, maps in explanation.maps.items():
            turn = turns(patch_sums(relevance_of(method, maps), config.patch), config.least_first)[:, where]
            curve = [probability[:, None]]
            for steps in torch.arange(1, config.steps + 1).split(max(1, config.batch_size // len(images))):
                curve.append(self.probabilities(degraded(images, replaced, turn, steps.to(images.device)), prediction))
                if stream.due():
                    yield None
            curves = torch.cat(curve, 1)
            columns = {
                "key": batch.keys,
                "label": batch.labels,
                "prediction": prediction.tolist(),
                "method": [method] * len(batch.keys),
                "area": area_over(curves.double()).tolist(),
                "curve": curves.tolist(),
            }
            yield [dict(zip(columns, row)) for row in zip(*columns.values())]

    @torch.inference_mode()
    def probabilities(self, images: Tensor, classes: Tensor) -> Tensor:
        """Of images (N, S, C, H, W), the probability of one class for each of N: float32 (N, S)."""
        scores = self.loaded.network.module(images.flatten(0, 1)).float()
        return scores.softmax(1).unflatten(0, images.shape[:2]).take_along_dim(classes[:, None, None], 2)[..., 0]


def black(preprocessing: Preprocessing) -> Tensor:
    """A black pixel as the model takes it, (C, 1, 1)."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return -mean / std


def checked(config: DegradeConfig) -> DegradeConfig:
    """The same with the baselines among the methods. UserError for a method or replacement that there is not."""
    if config.replacement not in REPLACEMENTS:
        what = f"no replacement {config.replacement!r}"
        raise UserError("--replacement", what, f"Choose from {', '.join(REPLACEMENTS)}.")
    methods = tuple(dict.fromkeys((*config.methods, *BASELINES)))
    settings_of({name: method_of(name) for name in methods}, dict(config.settings))
    return replace(config, methods=methods)


def fits(config: DegradeConfig, loaded: loading.Loaded) -> None:
    """UserError where images have fewer patches than are to be replaced, or the model gives no classes."""
    if len(loaded.network.output_shape) != 1 or loaded.network.output_shape == (1,):
        what = f"the model gives outputs of shape {loaded.network.output_shape}, not a score for each class"
        raise UserError("--model", what, "Degrade images for a model whose output is (N, classes).")
    size = loaded.preprocessing.image_size
    patches = math.ceil(size / config.patch) ** 2
    if config.steps > patches:
        what = f"images of {size}×{size} pixels have {patches} patches of {config.patch}×{config.patch}"
        raise UserError(f"--steps {config.steps}", what, "Give fewer steps or a smaller --patch-size.")


def degrade(config: DegradeConfig, resources: Resources = Resources()) -> Run:  # noqa: B008 - frozen
    """Degrade every image of some shards by each method, or go on with a job that ended early.

    UserError where the configuration or the data are wrong, StoppedShortError where a signal came.
    """
    config = checked(config)
    loaded, run = loading.load(config.model), Run(config.out)
    section = run.section("degrade", config, loaded)
    if section["status"] == "complete" and not section["missing"]:
        tidy(run)
        return run
    fits(config, loaded)
    made = explainer(config, loaded, None, section.get("scales", {}))
    with hold_lease(run, "degrade") as beat, connected(resources):
        section |= {"scales": made.scales, "settings": made.settings}
        run.record("degrade", section, loaded)
        passes = config.steps * len(config.methods)
        line = f"each image goes through the model {passes} times: {len(config.methods)} methods, {config.steps} steps"
        done, counted = shard_by_shard(
            "degrade", beat, config, resources, "degradation", line, DegradeWorker, loaded.digests, made.scales
        )
        means = {method: Mean(config.steps + 1) for method in config.methods}
        with published(run.folder) as folder:
            tables = (read_table(out.folder / out.rows) for out in done)
            write_table(folder / "degradation.parquet", ROWS, added(tables, means))
            samples = next(iter(means.values())).count
            enough_used(run, "degrade", samples, resources)
            curves = pa.concat_tables(mean.table(method) for method, mean in means.items())
            write_table(folder / "degradation-curves.parquet", CURVES, [curves])
            draw_degradation(folder / "degradation.png", curves)
        areas = {method: mean.area() for method, mean in means.items()}
        run.record("degrade", section | {"status": "complete", **counted, "samples": samples, "areas": areas}, loaded)
    return run


@dataclass
class Mean:
    """The mean of one method's curves and of the areas over them, and how sure they are."""

    length: int
    count: int = 0
    sums: np.ndarray = field(init=False)
    squares: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.sums, self.squares = np.zeros((2, self.length + 1))  # of each step, then of the area

    def add(self, curves: np.ndarray, areas: np.ndarray) -> None:
        """Add some samples' curves (n, length) and areas (n,)."""
        values = np.column_stack([curves, areas]).astype(np.float64)
        self.count += len(values)
        self.sums += values.sum(0)
        self.squares += (values**2).sum(0)

    def bands(self) -> tuple[np.ndarray, np.ndarray]:
        """The means, and how far their confidence bands of 95 % reach to each side; nan for a single sample."""
        mean = self.sums / self.count
        with np.errstate(divide="ignore", invalid="ignore"):
            variance = np.maximum(self.squares / self.count - mean**2, 0) * (self.count / np.float64(self.count - 1))
        return mean, SURE * np.sqrt(variance / self.count)

    def table(self, method: str) -> pa.Table:
        """The curve, in the schema CURVES."""
        mean, reach = (values[:-1] for values in self.bands())
        steps = np.arange(self.length, dtype=np.int32)
        return pa.table([[method] * self.length, steps, mean, mean - reach, mean + reach], schema=CURVES)

    def area(self) -> dict[str, float | None]:
        """The area over the curve and its band, whose ends are None for a single sample."""
        mean, reach = (float(values[-1]) for values in self.bands())
        low, high = (None, None) if math.isnan(reach) else (mean - reach, mean + reach)
        return {"area": mean, "low": low, "high": high}


def added(tables: Iterable[pa.Table], means: dict[str, Mean]) -> Iterator[pa.Table]:
    """The same tables, each added to the means of its methods."""
    for table in tables:
        for method, mean in means.items():
            own = table.filter(pa.compute.equal(table["method"], method))
            if len(own):
                mean.add(np.stack(own["curve"].to_numpy()), own["area"].to_numpy())
        yield table


def area_lines(run: Run) -> list[str]:
    """A finished job's areas in words, the largest first."""
    areas: dict[str, dict[str, float | None]] = run.manifest()["degrade"]["areas"]

    def words(method: str, found: dict[str, float | None]) -> str:
        band = "" if found["low"] is None else f" ({found['low']:.4f} to {found['high']:.4f})"
        return f"{method:>32}  area over the curve {found['area']:.4f}{band}"

    return [words(*item) for item in sorted(areas.items(), key=lambda item: -(item[1]["area"] or 0.0))]
