"""The explain job: one shard of explanations for each input shard, wholly there or not there."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from upath import UPath
from webdataset import TarWriter

from patterns import METHODS, Explainer, UserError, choose
from patterns.explain import Explanation
from patterns.storage import aside_of, write_table
from ray_jobs import models
from ray_jobs.config import ExplainConfig, Resources, equal_share
from ray_jobs.driver import Beat, driving, tidy
from ray_jobs.files import located, names, published, read_table
from ray_jobs.job import ShardJob
from ray_jobs.pictures import picture, png
from ray_jobs.run import Run, load_patterns, refused_in, write_refused
from ray_jobs.samples import SampleError
from ray_jobs.session import connected
from ray_jobs.shards import Batch, ShardReader
from ray_jobs.sources import output_names
from ray_jobs.worker import Place, ShardReport, Share, Timed

TARGETS = ("predicted", "label")
Scales = dict[str, list[int]]  # the potential of each method's pass: see `Explainer.scales`


@dataclass(frozen=True)
class Outputs:
    """Where a shard's explanations go: the shard itself, which is written last, and its table's rows."""

    folder: UPath
    name: str

    @property
    def tar(self) -> str:
        """The explanations, written last."""
        return f"{self.name}.tar"

    @property
    def rows(self) -> str:
        """Their rows of explanations.parquet."""
        return f"{self.name}.parquet"

    @property
    def refused(self) -> str:
        """The samples that could not be used."""
        return f"{self.name}.refused.parquet"


def outputs(config: ExplainConfig) -> dict[str, Outputs]:
    """The output files of each input shard: its own name, with as many folders as tell the shards apart."""
    folder = located(config.out) / "explanations"
    paths = {shard: folder / name for shard, name in output_names(config.shards).items()}
    return {shard: Outputs(path.parent, path.name) for shard, path in paths.items()}


def schema(config: ExplainConfig) -> pa.Schema:
    """The columns of explanations.parquet: for each method, the share of |map| in the central quarter of the area."""
    return pa.schema(
        [
            ("shard", pa.string()),
            ("key", pa.string()),
            ("label", pa.int64()),
            ("prediction", pa.int64()),
            ("probability", pa.float32()),
            ("target", pa.int64()),
            ("score", pa.float32()),
            *((f"{method}_centre", pa.float32()) for method in config.methods),
        ]
    )


class ExplainWorker:
    """Holds the model and its patterns, and nothing that a lost worker would take along."""

    def __init__(self, config: ExplainConfig, weights: str, scales: Scales, share: Share = Share()) -> None:  # noqa: B008 - frozen
        self.config, self.weights, self.scales, self.share = config, weights, scales, share

    def place(self) -> Place:
        """Where this worker runs."""
        return self.share.place()

    def ready(self) -> None:
        """Load the model and its patterns."""
        self.loaded = self.share.load(self.config.model, self.weights)
        self.explainer = explainer(self.config, self.loaded, self.scales)

    def work(self, shard: str, out: Outputs, most: int | None) -> Iterator[ShardReport]:
        """Explain a shard, or its first samples, telling now and then how far it is.

        Rows are written first, the shard of explanations last, each aside and renamed.
        """
        rows: list[dict[str, Any]] = []
        reader = self.reader(shard, most)
        batches: Timed[Batch] = Timed(reader)
        with published(out.folder) as folder, aside_of(folder / out.tar) as aside:
            with open(aside, "wb") as file:
                # No time of writing, so that the same explanations are the same bytes.
                tar = TarWriter(file, encoder=False, mtime=0)
                for batch in batches:
                    for files, row in self.explain(batch):
                        tar.write(files)
                        rows.append({"shard": shard, **row})
                    if batches.due():
                        yield ShardReport(len(rows), len(reader.refused), batches.count, batches.waited)
                tar.close()
            with published(out.folder) as tables:
                write_table(tables / out.rows, schema(self.config), [pa.Table.from_pylist(rows, schema(self.config))])
                write_refused(tables / out.refused, reader.refused)
        yield ShardReport(len(rows), len(reader.refused), batches.count, batches.waited)

    def reader(self, shard: str, most: int | None) -> ShardReader:
        config, loaded = self.config, self.loaded
        (classes,) = loaded.network.output_shape

        def has_target(label: int | None) -> None:
            if config.target == "label" and (label is None or not 0 <= label < classes):
                raise SampleError(f"the label {label} is none of the model's {classes} classes")

        return ShardReader(shard, loaded.preprocessing, config.batch_size, loaded.dtype, most, has_target)

    def explain(self, batch: Batch) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """For each sample: the files of its explanation, and its row of the table."""
        targets = None
        if self.config.target == "label":
            targets = torch.tensor(batch.labels, device=self.loaded.device)
        explanation = self.explainer(batch.images.to(self.loaded.device, non_blocking=True), targets)
        described = rows_of(batch, explanation)
        scaled = {m: to_float16(maps, explanation.exponents[m]) for m, maps in explanation.maps.items()}
        centres = {method: centre_share(maps) for method, maps in explanation.maps.items()}
        for number, (key, row) in enumerate(zip(batch.keys, described)):
            exponents = {method: int(exponent[number]) for method, (_, exponent) in scaled.items()}
            files: dict[str, Any] = {"__key__": key, "json": json.dumps(row | {"exponents": exponents}).encode()}
            for method, (arrays, _) in scaled.items():
                buffer = io.BytesIO()
                np.save(buffer, arrays[number], allow_pickle=False)
                files[f"{method}.npy"] = buffer.getvalue()
                files[f"{method}.png"] = png(picture(method, arrays[number]))
            yield files, {"key": key, **row, **{f"{m}_centre": float(c[number]) for m, c in centres.items()}}


class ExplainJob(ShardJob):
    """The driver's side: where the explanations of each shard go, and of how many samples they are."""

    def __init__(
        self, beat: Beat, config: ExplainConfig, outs: dict[str, Outputs], left: list[str], resources: Resources
    ) -> None:
        shares = (equal_share(config.max_samples, number, len(outs)) for number in range(len(outs)))
        self.told = {shard: (shard, out, most) for (shard, out), most in zip(outs.items(), shares)}
        super().__init__("explain", beat, config.shards, left, resources, max_loss=None)

    def task(self, item: str) -> tuple[str, Outputs, int | None]:
        return self.told[item]


def explainer(config: ExplainConfig, loaded: models.Loaded, scales: Scales) -> Explainer:
    """The methods of a config over the patterns of its run; scales: those calibrated before, by method."""
    chosen = None
    if any(METHODS[m].needs_patterns for m in config.methods if m in METHODS):
        chosen = choose(loaded.network, load_patterns(config.patterns, loaded.digest), config.estimator)
    return Explainer(loaded.network, chosen, config.methods, scales=scales)


def rows_of(batch: Batch, explanation: Explanation) -> list[dict[str, Any]]:
    """What the model says of each sample of a batch."""
    scores = explanation.scores.float().cpu()
    probability, prediction = scores.softmax(1).max(1)
    targets = explanation.targets.cpu()
    score = scores.gather(1, targets[:, None])[:, 0]
    return [
        {"label": label, "prediction": p, "probability": q, "target": t, "score": s}
        for label, p, q, t, s in zip(
            batch.labels, prediction.tolist(), probability.tolist(), targets.tolist(), score.tolist()
        )
    ]


def to_float16(maps: Tensor, exponent: int) -> tuple[np.ndarray, list[int]]:
    """Explanations map · 2^exponent (N, …) as float16 arrays, the largest in [½, 1), and each one's exponent.

    A power of two for each sample keeps what float16's narrow range would lose, and is exact.
    """
    exponents = torch.frexp(maps.abs().flatten(1).amax(1)).exponent
    scaled = torch.ldexp(maps, -exponents.view(-1, *[1] * (maps.dim() - 1)))
    return scaled.half().cpu().numpy(), (exponents + exponent).tolist()


def centre_share(maps: Tensor) -> Tensor:
    """The share of |map| in the middle half of height and width, shape (N,); 0 for a map of zeros."""
    mass = maps.abs().sum(1)
    height, width = mass.shape[-2:]
    centre = mass[:, height // 4 : height - height // 4, width // 4 : width - width // 4]
    total = mass.flatten(1).sum(1)
    return torch.where(total > 0, centre.flatten(1).sum(1) / torch.where(total > 0, total, 1.0), 0.0)


def explain(config: ExplainConfig, resources: Resources = Resources()) -> Run:  # noqa: B008 - frozen
    """Explain every sample of some shards, or go on with a job that ended early.

    UserError where the configuration or the data are wrong, StoppedShortError where a signal came.
    """
    if config.target not in TARGETS:
        raise UserError("--target", f"no target {config.target!r}", f"Choose from {', '.join(TARGETS)}.")
    loaded = models.load(config.model)
    run = Run(config.out)
    section = run.section("explain", config, loaded)
    # Before anything is written, so that wrong patterns are told; once for all workers and resumptions.
    scales = explainer(config, loaded, section.get("scales", {})).scales
    if section["status"] == "complete" and not section["missing"]:
        tidy(run)
        return run
    with driving(run, "explain") as beat, connected(resources):
        section |= {"scales": scales}
        run.record("explain", section, loaded)
        outs = outputs(config)
        there = {folder: set(names(folder)) for folder in {out.folder for out in outs.values()}}
        left = [s for s, out in outs.items() if out.tar not in there[out.folder]]
        job = ExplainJob(beat, config, outs, left, resources)
        job.run(ExplainWorker, config, loaded.digest, scales)
        done = [out for shard, out in outs.items() if shard not in job.missing]
        refused = [row for out in done for row in refused_in(out.folder / out.refused)]
        run.quarantine("explain", refused)
        samples = 0

        def tables() -> Iterator[pa.Table]:
            nonlocal samples
            for out in done:
                table = read_table(out.folder / out.rows)
                samples += len(table)
                yield table

        with published(run.folder) as folder:
            write_table(folder / "explanations.parquet", schema(config), tables())
        counted = {"shards": len(done), "missing": job.missing, "samples": samples, "refused": len(refused)}
        run.record("explain", section | {"status": "complete", **counted}, loaded)
    return run
