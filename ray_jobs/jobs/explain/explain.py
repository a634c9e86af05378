"""The explain job: one shard of explanations for each input shard, complete or absent."""

import shutil
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from patterns.io import write_table
from ray_jobs.config import ExplainConfig, Resources
from ray_jobs.data.shard_reader import Batch
from ray_jobs.engine.shard_worker import BatchStream, ShardReport, compile_batches, require_gpu_for_mode
from ray_jobs.io.object_store import locate, publish, read_table
from ray_jobs.io.prefetch import POLL, WriteBehind
from ray_jobs.jobs.explain.map_statistics import COLUMNS, find_region, reduce_maps, summarize_maps
from ray_jobs.jobs.explain.target_worker import TargetWorker
from ray_jobs.jobs.explain.targets import Target, parse_target
from ray_jobs.jobs.job_session import JobSession, run_job
from ray_jobs.jobs.method_job import make_explainer, validate_methods, validate_settings
from ray_jobs.jobs.per_shard_job import FilesTask, validate_sample_count, write_shard_files
from ray_jobs.models.loading import TracedModel
from ray_jobs.runs.map_files import ExplainedBatch, estimate_bytes_per_sample, import_zarr, open_writers
from ray_jobs.runs.run_folder import Run
from ray_jobs.units import format_bytes

Steps = Generator[ShardReport | None, bool | None, None]  # of the work on a shard; see `ExplainWorker.write_shard`


def make_schema(config: ExplainConfig, target: Target) -> pa.Schema:
    """Return the columns of explanations.parquet: the model's outputs, and statistics of each method's map.

    If a sample has several maps, the statistics are those of the first, and target and score are lists.
    """
    several_targets, several_maps = len(target.picks) > 1, target.maps > 1
    return pa.schema(
        [
            ("shard", pa.string()),
            ("key", pa.string()),
            ("label", pa.int64()),
            ("prediction", pa.int64()),
            ("probability", pa.float32()),
            ("target", pa.list_(pa.int64()) if several_targets else pa.int64()),
            ("score", pa.list_(pa.float32()) if several_maps else pa.float32()),
            *((f"{method}_{name}", dtype) for method in config.methods for name, dtype in COLUMNS.items()),
        ]
    )


class ExplainWorker(TargetWorker[ExplainConfig]):
    """A worker that explains shards.

    Attributes:
        begun: The steps of the following shard, if batches of it are explained already.
    """

    begun: Steps | None = None

    def prepare(self) -> None:
        """Place the model on the device, and load its patterns."""
        self.prepare_target()
        network = self.target.end(self.model.network)
        self.explainer = make_explainer(self.config, self.model, network, self.scales)
        compile_batches(self.explainer, self.config.compile, self.config.batch_size, self.model.device)

    def work(self, task: FilesTask, following: FilesTask | None = None) -> Iterator[ShardReport]:
        """Explain a shard, and yield reports of the progress.

        While a thread completes and uploads its files, batches of the following shard are explained. The last report
        comes after the upload, so that the shard is not done before.
        """
        with closing(self.open_stream(task, following)) as stream, ThreadPoolExecutor(1) as uploader:
            steps, self.begun = self.begun or self.write_shard(task, stream), None
            latest = stream.report(0)
            while (report := next(steps)) is not None:
                latest = report
                if stream.report_due():
                    yield latest
            upload = uploader.submit(complete, steps)
            if self.following is not None and task.files.folder.local is None:
                for _ in self.explain_ahead(*self.following, upload):
                    if stream.report_due():
                        yield latest
            yield upload.result()

    def explain_ahead(self, task: FilesTask, stream: BatchStream, upload: Future[Any]) -> Iterator[None]:
        """Explain batches of the following shard as they are read, until the upload of the one before is done."""
        self.begun = self.write_shard(task, stream)
        try:
            while not upload.done():
                if not stream.prefetcher.ready:
                    wait([upload], POLL)
                elif next(self.begun) is None:
                    return
                else:
                    yield
        except Exception:  # the shard is read again as the next task, and then the error is raised
            self.close(wait=0)

    def write_shard(self, task: FilesTask, stream: BatchStream) -> Steps:
        """Explain a shard, and write its files.

        Threads decode the next batches and write the previous ones. The table of rows is written last, after the other
        files are complete.

        Yields:
            A report after each batch; then None until True is sent. This completes and uploads the files, and returns
            the last report.
        """
        rows: list[dict[str, Any]] = []
        files = task.files
        with (
            publish(files.folder) as folder,
            open_writers(folder, files, self.config.outputs, self.resources.encoders) as writers,
            WriteBehind() as behind,
        ):
            for batch in stream:
                explained = self.explain(batch)
                for writer in writers:
                    behind.submit(writer.write, explained)
                rows += [{"key": key, **row} for key, row in zip(explained.keys, explained.summaries)]
                yield stream.report(len(rows))
            while not (yield None):
                pass
            behind.flush()
        self.write_tables(task, stream, make_schema(self.config, self.target), rows)
        yield stream.report(len(rows))

    def close(self, wait: float | None = None) -> None:
        """Stop reading ahead, and discard the explanations of the following shard."""
        super().close(wait)
        if self.begun is not None:
            self.begun.close()
            self.begun = None

    def explain(self, batch: Batch) -> ExplainedBatch:
        """Return the maps of a batch as they are written, and the rows of its samples."""
        target = self.target
        images = batch.images.to(self.model.device, non_blocking=True)
        seeds = self.make_seeds(batch.keys)
        explanation = self.explainer(
            images, lambda scores: target.make_targets(scores, batch.labels, self.find_regions(batch, scores)), seeds
        )
        rows = self.describe_samples(batch, images, explanation)
        first = {m: maps[:, 0] if target.maps > 1 else maps for m, maps in explanation.maps.items()}
        regions = [
            find_region(mask, boxes, row["target"], *images.shape[2:])
            for mask, boxes, row in zip(batch.masks, batch.boxes, rows)
        ]
        statistics = zip(*(summarize_maps(method, maps, regions) for method, maps in first.items()))
        arrays, exponents = {}, {}
        for method, maps in explanation.maps.items():
            several = maps.dim() > 4
            flat = reduce_maps(maps.flatten(0, 1) if several else maps, self.config.reduction, self.config.size)
            array, exponent = to_float16(flat, explanation.exponents[method])
            shape = maps.shape[:2] if several else maps.shape[:1]
            arrays[method] = array.reshape(*shape, *array.shape[1:])
            exponents[method] = exponent.reshape(shape)
        summaries = [row | dict(chain.from_iterable(d.items() for d in each)) for row, each in zip(rows, statistics)]
        return ExplainedBatch(batch.keys, rows, summaries, arrays, exponents)


def complete(steps: Steps) -> ShardReport:
    """Complete and upload the files of a shard whose batches are explained, and return the last report."""
    report = steps.send(True)
    assert report is not None
    return report


def to_float16(maps: Tensor, exponent: int) -> tuple[np.ndarray, np.ndarray]:
    """Convert maps to float16.

    A power of two for each sample keeps what float16's narrow range would lose, and is exact.

    Args:
        maps: The maps (N, …); the explanation is map · 2^exponent.
        exponent: The exponent of all maps.

    Returns:
        The maps as float16 (N, …), the largest value of each in [½, 1); and the exponent of each map, int (N,).
    """
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    exponents = torch.frexp(maps.abs().flatten(1).amax(1)).exponent
    scaled = torch.ldexp(maps, -exponents.view(-1, *[1] * (maps.dim() - 1)))
    return scaled.half().cpu().numpy(), (exponents + exponent).cpu().numpy()


def describe_cost(config: ExplainConfig, model: TracedModel, target: Target) -> str:
    """Return a line that says how much space the explanations take at most."""
    channels, *sides = model.preprocessing.input_shape
    shape = (channels if config.reduction == "none" else 1, *([config.size] * 2 if config.size else sides))
    several = (target.maps,) if target.maps > 1 else ()
    each = estimate_bytes_per_sample(dict.fromkeys(config.methods, (*several, *shape)), config.outputs)
    total = sum(each.values())
    by_output = ", ".join(f"{output} {format_bytes(size)}" for output, size in each.items())
    line = f"a sample takes at most {format_bytes(total)} ({by_output}), 1000 samples {format_bytes(1000 * total)}"
    if config.max_samples is not None:
        line += f", all {config.max_samples} at most {format_bytes(config.max_samples * total)}"
    folder = locate(config.out)
    if folder.local is not None:
        existing = next(path for path in (folder.local, *folder.local.parents) if path.exists())
        line += f"; {format_bytes(shutil.disk_usage(existing).free)} are free at {config.out}"
    return line


def validate(config: ExplainConfig, resources: Resources = Resources()) -> None:  # noqa: B008 - frozen
    """Raise UserError if a method, a setting or the package of an output does not exist, or compiling needs a GPU."""
    if "zarr" in config.outputs:
        import_zarr()
    validate_settings(config)
    require_gpu_for_mode(config.compile, resources)


def explain(config: ExplainConfig, resources: Resources = Resources()) -> Run:  # noqa: B008 - frozen
    """Explain every sample of some shards, or resume a job that ended early; see `run_job`."""
    validate(config, resources)
    return run_job("explain", config, resources, explain_shards)


def explain_shards(session: JobSession, config: ExplainConfig, resources: Resources) -> None:
    """Explain the samples of shards, and write their table."""
    run, model = session.run, session.loaded.traced
    target = parse_target(config.target, model.network, config.classes, config.vector)
    recorded = validate_methods(config, model, target.end(model.network), session.section)
    with session.work(resources, config.compile, **recorded):
        message = describe_cost(config, model, target)
        arguments = ExplainWorker, model, recorded["scales"]
        done = write_shard_files(session, config, resources, "explanations", message, *arguments)
        samples = 0

        def read_tables() -> Iterator[pa.Table]:
            nonlocal samples
            for files in done:
                table = read_table(files.folder / files.rows)
                samples += len(table)
                yield table

        with publish(run.folder) as folder:
            write_table(folder / "explanations.parquet", make_schema(config, target), read_tables())
        validate_sample_count(session, samples, resources)
        session.section["samples"] = samples
