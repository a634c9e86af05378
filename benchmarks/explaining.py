"""Explanations compared with a plain input gradient, with each other, and with the maps of other libraries."""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import captum.attr
import torch
from torch import Tensor, nn
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlusFlat

from benchmarks.timing import JOB_BATCH, Bench, Row, Timed, Variant, write_shards
from patterns import Explainer, Network, trace
from ray_jobs.config import AtlasConfig, ExplainConfig, FitConfig, ModelConfig, Resources
from ray_jobs.data.shard_reader import ReaderConfig, ShardReader
from ray_jobs.data.shard_specs import list_shards
from ray_jobs.engine.shard_worker import WorkerResources
from ray_jobs.io.prefetch import WriteBehind
from ray_jobs.jobs.atlas.worker import AtlasWorker
from ray_jobs.jobs.explain import explain as job
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.jobs.per_shard_job import FilesTask
from ray_jobs.models import loading
from ray_jobs.runs.map_files import list_shard_files

FIVE = ("gradient", "deconvnet", "guided-backprop", "patternnet", "patternattribution")
HERE = Resources(workers=0)
TARGETS = {"VGG-16": "≤ 1.02", "ResNet-50": "≤ 1.15"}


def plain_gradient(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """Return a function that computes the input gradient of the predicted classes."""

    def gradient() -> Tensor:
        inputs = images.clone().requires_grad_()
        scores = model(inputs)
        one_hot = torch.zeros_like(scores).scatter_(1, scores.argmax(1, keepdim=True), 1.0)
        return torch.autograd.grad(scores, inputs, one_hot)[0]

    return gradient


def run_zennit(model: nn.Module, images: Tensor, targets: Tensor) -> None:
    """Run layer-wise relevance propagation with zennit on the model."""

    def one_hot(scores: Tensor) -> Tensor:
        return torch.zeros_like(scores).scatter_(1, targets[:, None], 1.0)

    with Gradient(model, EpsilonPlusFlat()) as attributor:
        attributor(images.clone(), one_hot)


def measure_passes(bench: Bench) -> Iterator[Row]:
    """Measure the inner loops."""
    warnings.filterwarnings("ignore")  # captum warns about the hooks that it sets
    for name, model, images in bench.models():
        network = trace(model, images[:2])
        patterns = random_patterns(network)
        alone = {m: Explainer(network, patterns, [m]) for m in FIVE}
        together = Explainer(network, patterns, FIVE)
        targets = model(images).argmax(1)
        guided = captum.attr.GuidedBackprop(model)

        ours: dict[str, Variant] = {m: partial(e, images, targets) for m, e in alone.items()}
        plain = plain_gradient(model, images)
        t = bench.timed({"plain": plain, **ours, "together": partial(together, images, targets)})
        for method in ("patternnet", "patternattribution"):
            yield bench.row(f"{name}: {method}", t[method], "plain input gradient", t["plain"], TARGETS.get(name, ""))
        five = f"{name}: {', '.join(FIVE)}, one forward pass"
        yield bench.row(five, t["together"], "sum of the five alone", add_times([t[m] for m in FIVE]), "≤ 0.65")
        others: dict[str, Variant] = {
            "ours": ours["patternattribution"],
            "Guided BackProp of captum": partial(guided.attribute, images, targets),
            "layer-wise LRP (zennit, ε, z⁺, flat)": partial(run_zennit, model, images, targets),
        }
        t = bench.timed(others, measured=False)  # torch's dispatch modes, which count the cost, do not work with hooks
        for other in list(others)[1:]:
            yield bench.row(f"{name}: patternattribution", t["ours"], other, t[other], "< 1")


def random_patterns(network: Network) -> dict[str, Tensor]:
    """Return random patterns; the time does not depend on their values."""
    return {key: torch.randn_like(op.weight) for key, op in network.operators.items()}


def add_times(timed: list[Timed]) -> Timed:
    """Return the time of several variants run one after the other."""
    return sum(timed[1:], timed[0])


def measure_job(bench: Bench) -> Iterator[Row]:
    """Measure the explain job's worker on JPEG shards with all outputs, compared with its inner loop in memory."""
    with tempfile.TemporaryDirectory() as folder:
        shards = list_shards(write_shards(Path(folder)))
        model = ModelConfig(spec="benchmarks.timing:vgg16_features")
        fit(
            FitConfig(
                model=model,
                shards=shards[:1],
                out=f"{folder}/run",
                batch_size=JOB_BATCH,
                estimators=("default",),
                max_samples=JOB_BATCH,
            ),
            HERE,
        )
        config = ExplainConfig(
            model=model,
            patterns=f"{folder}/run",
            shards=shards,
            out=f"{folder}/run",
            batch_size=JOB_BATCH,
            methods=FIVE[-1:],
        )
        # One core of two stays free for the threads that read and write.
        loaded = loading.load(model)
        worker = job.ExplainWorker(config, loaded.traced, {}, WorkerResources(cpus=1))
        worker.prepare()
        (images, *_) = (b.images for b in ShardReader(shards[0], ReaderConfig(loaded.preprocessing, JOB_BATCH)))
        out = iter(list_shard_files(f"{folder}/out", shards).values())
        batches = sum(1 for _ in ShardReader(shards[0], ReaderConfig(loaded.preprocessing, JOB_BATCH)))
        task = FilesTask(shards[0], files=next(out))

        def inner() -> None:
            for _ in range(batches):
                worker.explainer(images)

        def in_line() -> None:
            with patch.object(job, "WriteBehind", Immediate):
                run_task(worker, task)

        t = bench.timed(
            {"inner": inner, "whole": partial(run_task, worker, task), "in line": in_line},
            min(3, bench.rounds),
            measured=False,
        )
        base = "its inner loop in memory"
        what = "explain job, one thread of two cores, PatternAttribution, npy and png"
        yield bench.row(f"{what}: images/s", t["inner"], base, t["whole"], "≥ 0.95")
        yield bench.row("the same, writing between batches", t["inner"], base, t["in line"])
        described = AtlasConfig(
            model=model, patterns=config.patterns, shards=shards, out=config.out, batch_size=JOB_BATCH
        )
        bare = job.ExplainWorker(replace(config), loaded.traced, {}, WorkerResources(cpus=1))
        object.__setattr__(bare.config, "outputs", ())  # which the command line does not offer
        atlas = AtlasWorker(described, loaded.traced, {}, WorkerResources(cpus=1))
        runs: dict[str, Variant] = {}
        for name, each in (("explain", bare), ("atlas", atlas)):
            each.prepare()
            files = list_shard_files(f"{folder}/{name}", shards)[shards[0]]
            runs[name] = partial(run_task, each, FilesTask(shards[0], files=files))
        t = bench.timed(runs, measured=False)
        what = "atlas job, one thread of two cores, PatternAttribution: images/s"
        yield bench.row(what, t["explain"], "the explain job without maps", t["atlas"], "≥ 0.9")


def run_task(worker: job.ExplainWorker | AtlasWorker, task: FilesTask) -> None:
    """Work on a shard to its end."""
    for _ in worker.work(task):
        pass


class Immediate(WriteBehind):
    """Writes at once instead of in a thread."""

    def submit(self, work: Callable[..., None], *arguments: object) -> None:
        """Run the work now."""
        work(*arguments)
