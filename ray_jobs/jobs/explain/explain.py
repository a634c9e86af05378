"""The explain job: one shard of explanations for each input shard, wholly there or not there."""

import shutil
from collections.abc import Iterator
from contextlib import closing
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from patterns import Explainer, UserError, choose
from patterns.attribution import Explanation, method_of, settings_of
from patterns.io import write_table
from ray_jobs.config import ExplainConfig, MethodsConfig, Resources
from ray_jobs.data.samples import SampleError, seed_of
from ray_jobs.data.shard_reader import Batch, ShardReader
from ray_jobs.engine.ray_session import connected
from ray_jobs.engine.shard_worker import ShardReport, ShardWorker, WorkerResources, check_mode
from ray_jobs.io.object_store import located, published, read_table
from ray_jobs.io.prefetch import WriteBehind
from ray_jobs.jobs.explain.map_statistics import COLUMNS, REDUCTIONS, shaped, summaries
from ray_jobs.jobs.explain.targets import Target, target_of
from ray_jobs.jobs.per_shard_job import ShardTask, enough_used, shard_by_shard
from ray_jobs.models import loading
from ray_jobs.runs.lease import hold_lease, tidy
from ray_jobs.runs.map_files import OUTPUTS, Explained, bytes_per_sample, import_zarr, writers
from ray_jobs.runs.run_folder import Run, load_patterns, write_refused
from ray_jobs.units import format_bytes, printable

Scales = dict[str, list[int]]  # the potential of each method's pass: see `Explainer.scales`


def schema(config: ExplainConfig, target: Target) -> pa.Schema:
    """The columns of explanations.parquet: what the model says of a sample, and for each method its map's summary.

    Of several maps a sample, the first is summarised, and target and score are lists.
    """
    meant, scores = len(target.picks) > 1, target.maps > 1
    return pa.schema(
        [
            ("shard", pa.string()),
            ("key", pa.string()),
            ("label", pa.int64()),
            ("prediction", pa.int64()),
            ("probability", pa.float32()),
            ("target", pa.list_(pa.int64()) if meant else pa.int64()),
            ("score", pa.list_(pa.float32()) if scores else pa.float32()),
            *((f"{method}_{name}", kind) for method in config.methods for name, kind in COLUMNS.items()),
        ]
    )


class ExplainWorker(ShardWorker[ShardTask]):
    """Holds the model and its patterns, and nothing that a lost worker would take along."""

    def __init__(
        self,
        config: ExplainConfig,
        weights: loading.ModelDigests,
        scales: Scales,
        share: WorkerResources = WorkerResources(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(share)
        self.config, self.weights, self.scales = config, weights, scales

    def ready(self) -> None:
        """Load the model and its patterns."""
        self.loaded = self.share.load(self.config.model, self.weights)
        self.target = target_of(self.config.target, self.loaded.network, self.config.classes)
        self.explainer = explainer(self.config, self.loaded, self.target.operator, self.scales)
        if self.config.compile is not None:
            self.explainer.compile(self.config.batch_size, self.config.compile)

    def work(self, task: ShardTask, following: ShardTask | None = None) -> Iterator[ShardReport]:
        """Explain a shard, or its first samples, telling now and then how far it is.

        Batches are decoded before and written after the one at work, in threads of their own. The table of rows is
        written last, after the other files are where they belong.
        """
        rows: list[dict[str, Any]] = []
        out, told = task.out, schema(self.config, self.target)
        with (
            closing(self.stream(task, following)) as stream,
            published(out.folder) as folder,
            writers(folder, out, self.config.outputs) as written,
            WriteBehind() as behind,
        ):
            for batch in stream:
                explained = self.explain(batch)
                for writer in written:
                    behind.do(writer.write, explained)
                described = zip(explained.keys, explained.summaries)
                rows += [{"shard": printable(task.shard), "key": key, **row} for key, row in described]
                if stream.due():
                    yield stream.report(len(rows))
            behind.done()
        with published(out.folder) as folder:
            write_refused(folder / out.refused, stream.reader.refused)
        with published(out.folder) as folder:
            write_table(folder / out.rows, told, [pa.Table.from_pylist(rows, told)])
        yield stream.report(len(rows))

    def reader(self, task: ShardTask) -> ShardReader:
        config, loaded = self.config, self.loaded
        (classes, *_) = loaded.network.output_shape

        def has_target(label: int | None) -> None:
            if self.target.needs_label and (label is None or not 0 <= label < classes):
                raise SampleError(f"the label {label} is none of the model's {classes} classes")

        return ShardReader(
            task.shard,
            loaded.preprocessing,
            config.batch_size,
            loaded.dtype,
            task.most,
            has_target,
            with_boxes=True,
            threads=self.share.decoders,
        )

    def explain(self, batch: Batch) -> Explained:
        """The maps of a batch as they are written, and what is said of each sample."""
        images = batch.images.to(self.loaded.device, non_blocking=True)
        seeds = [seed_of(f"{self.config.seed}/{key}") for key in batch.keys]
        explanation = self.explainer(images, lambda scores: self.target.targets(scores, batch.labels), seeds)
        rows = self.rows(batch, images, explanation)
        first = {m: maps[:, 0] if self.target.maps > 1 else maps for m, maps in explanation.maps.items()}
        described = zip(*(summaries(method, maps, batch.boxes) for method, maps in first.items()))
        arrays, exponents = {}, {}
        for method, maps in explanation.maps.items():
            several = maps.dim() > 4
            flat = shaped(maps.flatten(0, 1) if several else maps, self.config.reduction, self.config.size)
            array, exponent = to_float16(flat, explanation.exponents[method])
            shape = maps.shape[:2] if several else maps.shape[:1]
            arrays[method] = array.reshape(*shape, *array.shape[1:])
            exponents[method] = exponent.reshape(shape)
        told = [row | dict(chain.from_iterable(d.items() for d in columns)) for row, columns in zip(rows, described)]
        return Explained(batch.keys, rows, told, arrays, exponents)

    def rows(self, batch: Batch, images: Tensor, explanation: Explanation) -> list[dict[str, Any]]:
        """What the model says of each sample of a batch."""
        target, values = self.target, explanation.scores.float()
        scores = values
        if target.operator is not None:
            with torch.inference_mode():
                scores = self.loaded.network.module(images).float()
        prediction: list[int | None] = [None] * len(scores)
        probability: list[float | None] = [None] * len(scores)
        if scores.dim() == 2 and scores.shape[1] > 1:  # dense outputs, and one number for each sample, predict no class
            probability, prediction = (values.tolist() for values in scores.softmax(1).max(1))
        classes = target.classes(values, batch.labels)
        score = target.score(values, classes)
        columns = {
            "label": batch.labels,
            "prediction": prediction,
            "probability": probability,
            "target": classes.tolist() if len(target.picks) > 1 else classes[:, 0].tolist(),
            "score": score.tolist() if target.maps > 1 else score[:, 0].tolist(),
        }
        return [dict(zip(columns, row)) for row in zip(*columns.values())]


def explainer(config: MethodsConfig, loaded: loading.Loaded, operator: str | None, scales: Scales) -> Explainer:
    """The methods of a config over the patterns of its run, of the network to an operator, None: to its classes.

    scales: those calibrated before, by method.
    """
    network = loaded.network if operator is None else loaded.network.until(operator)
    passes = [b for name in config.methods if (b := method_of(name).backward) is not None and b.needs_patterns]
    chosen, estimators = None, {}
    if passes:
        patterns = load_patterns(config.patterns, loaded.digest)
        Run(config.patterns).require_model(loaded)
        if any(not b.estimator for b in passes):
            chosen = choose(network, patterns, config.estimator)
        estimators = {b.estimator: choose(network, patterns, b.estimator) for b in passes if b.estimator}
    return Explainer(network, chosen, config.methods, scales, estimators, dict(config.settings))


def to_float16(maps: Tensor, exponent: int) -> tuple[np.ndarray, np.ndarray]:
    """Explanations map · 2^exponent (N, …) as float16 arrays, the largest in [½, 1), and each one's exponent.

    A power of two for each sample keeps what float16's narrow range would lose, and is exact.
    """
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    exponents = torch.frexp(maps.abs().flatten(1).amax(1)).exponent
    scaled = torch.ldexp(maps, -exponents.view(-1, *[1] * (maps.dim() - 1)))
    return scaled.half().cpu().numpy(), (exponents + exponent).cpu().numpy()


def cost(config: ExplainConfig, loaded: loading.Loaded, target: Target) -> str:
    """What the explanations will take, in words."""
    channels, *sides = loaded.preprocessing.input_shape
    shape = (channels if config.reduction == "none" else 1, *([config.size] * 2 if config.size else sides))
    several = (target.maps,) if target.maps > 1 else ()
    each = bytes_per_sample(dict.fromkeys(config.methods, (*several, *shape)), config.outputs)
    total = sum(each.values())
    by_kind = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in each.items())
    line = f"a sample takes at most {format_bytes(total)} ({by_kind}), 1000 samples {format_bytes(1000 * total)}"
    if config.max_samples is not None:
        line += f", all {config.max_samples} at most {format_bytes(config.max_samples * total)}"
    folder = located(config.out)
    if folder.local is not None:
        there = next(p for p in (folder.local, *folder.local.parents) if p.exists())
        line += f"; {format_bytes(shutil.disk_usage(there).free)} are free at {config.out}"
    return line


def checked(config: ExplainConfig, resources: Resources = Resources()) -> None:  # noqa: B008 - frozen
    """UserError for outputs, reductions and settings that there are not, and for what cannot be compiled."""
    for kind in config.outputs or ("",):
        if kind not in OUTPUTS:
            raise UserError("--output", f"no output {kind!r}", f"Choose from {', '.join(OUTPUTS)}.")
    if config.reduction not in REDUCTIONS:
        what = f"no reduction {config.reduction!r}"
        raise UserError("--reduce-channels", what, f"Choose from {', '.join(REDUCTIONS)}.")
    if "zarr" in config.outputs:
        import_zarr()
    settings_of({name: method_of(name) for name in config.methods}, dict(config.settings))
    check_mode(config.compile, resources)


def explain(config: ExplainConfig, resources: Resources = Resources()) -> Run:  # noqa: B008 - frozen
    """Explain every sample of some shards, or go on with a job that ended early.

    UserError where the configuration or the data are wrong, StoppedShortError where a signal came.
    """
    checked(config, resources)
    loaded = loading.load(config.model)
    run = Run(config.out)
    section = run.section("explain", config, loaded)
    if section["status"] == "complete" and not section["missing"]:
        tidy(run)
        return run
    target = target_of(config.target, loaded.network, config.classes)
    # Before anything is written, so that wrong patterns are told; once for all workers and resumptions.
    made = explainer(config, loaded, target.operator, section.get("scales", {}))
    scales = made.scales
    with hold_lease(run, "explain") as beat, connected(resources):
        check_mode(config.compile, resources)
        section |= {"scales": scales, "settings": made.settings}
        run.record("explain", section, loaded)
        line = cost(config, loaded, target)
        done, counted = shard_by_shard(
            "explain", beat, config, resources, "explanations", line, ExplainWorker, loaded.digests, scales
        )
        samples = 0

        def tables() -> Iterator[pa.Table]:
            nonlocal samples
            for out in done:
                table = read_table(out.folder / out.rows)
                samples += len(table)
                yield table

        with published(run.folder) as folder:
            write_table(folder / "explanations.parquet", schema(config, target), tables())
        enough_used(run, "explain", samples, resources)
        run.record("explain", section | {"status": "complete", **counted, "samples": samples}, loaded)
    return run
