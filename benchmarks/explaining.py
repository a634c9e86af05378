"""Explanations against a plain input gradient, against each other, and against what other libraries take for a map."""

import tempfile
import warnings
from collections.abc import Callable, Iterator
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
from ray_jobs.config import ExplainConfig, FitConfig, ModelConfig, Resources
from ray_jobs.data.shard_reader import ReaderConfig, ShardReader
from ray_jobs.data.shard_specs import list_shards
from ray_jobs.engine.shard_worker import WorkerResources
from ray_jobs.io.prefetch import WriteBehind
from ray_jobs.jobs.explain import explain as job
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.jobs.per_shard_job import FilesTask
from ray_jobs.models import loading
from ray_jobs.runs.map_files import list_shard_files

FIVE = ("gradient", "deconvnet", "guided-backprop", "patternnet", "patternattribution")
HERE = Resources(workers=0)
MOST = {"VGG-16": "≤ 1.02", "ResNet-50": "≤ 1.15"}


def plain_gradient(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    def gradient() -> Tensor:
        inputs = images.clone().requires_grad_()
        scores = model(inputs)
        start = torch.zeros_like(scores).scatter_(1, scores.argmax(1, keepdim=True), 1.0)
        return torch.autograd.grad(scores, inputs, start)[0]

    return gradient


def layer_wise(model: nn.Module, images: Tensor, targets: Tensor) -> None:
    def start(scores: Tensor) -> Tensor:
        return torch.zeros_like(scores).scatter_(1, targets[:, None], 1.0)

    with Gradient(model, EpsilonPlusFlat()) as attributor:
        attributor(images.clone(), start)


def passes(bench: Bench) -> Iterator[Row]:
    """The inner loops."""
    warnings.filterwarnings("ignore")  # captum's about the hooks that it sets
    for name, model, images in bench.models():
        network = trace(model, images[:2])
        patterns = patterns_for(network)
        alone = {m: Explainer(network, patterns, [m]) for m in FIVE}
        together = Explainer(network, patterns, FIVE)
        targets = model(images).argmax(1)
        guided = captum.attr.GuidedBackprop(model)

        ours: dict[str, Variant] = {m: partial(e, images, targets) for m, e in alone.items()}
        plain = plain_gradient(model, images)
        t = bench.timed({"plain": plain, **ours, "together": partial(together, images, targets)})
        for method in ("patternnet", "patternattribution"):
            yield bench.row(f"{name}: {method}", t[method], "plain input gradient", t["plain"], MOST.get(name, ""))
        five = f"{name}: {', '.join(FIVE)}, one forward pass"
        yield bench.row(five, t["together"], "sum of the five alone", sum_of([t[m] for m in FIVE]), "≤ 0.65")
        others: dict[str, Variant] = {
            "ours": ours["patternattribution"],
            "Guided BackProp of captum": partial(guided.attribute, images, targets),
            "layer-wise LRP (zennit, ε, z⁺, flat)": partial(layer_wise, model, images, targets),
        }
        t = bench.timed(others, measured=False)  # hooks and modes of dispatch do not go together
        for other in list(others)[1:]:
            yield bench.row(f"{name}: patternattribution", t["ours"], other, t[other], "< 1")


def patterns_for(network: Network) -> dict[str, Tensor]:
    """Random numbers, which cost what patterns do."""
    return {key: torch.randn_like(op.weight) for key, op in network.operators.items()}


def sum_of(timed: list[Timed]) -> Timed:
    """One after the other."""
    return sum(timed[1:], timed[0])


def whole_job(bench: Bench) -> Iterator[Row]:
    """The explain job's worker on JPEG shards, all outputs written, against its inner loop over tensors in memory."""
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
        # So that a core is left for the threads that read and write.
        loaded = loading.load(model)
        worker = job.ExplainWorker(config, loaded.digests, {}, WorkerResources(cpus=1))
        worker.prepare()
        (images, *_) = (b.images for b in ShardReader(shards[0], ReaderConfig(loaded.preprocessing, JOB_BATCH)))
        out = iter(list_shard_files(f"{folder}/out", shards).values())
        batches = sum(1 for _ in ShardReader(shards[0], ReaderConfig(loaded.preprocessing, JOB_BATCH)))
        task = FilesTask(shards[0], files=next(out))

        def inner() -> None:
            for _ in range(batches):
                worker.explainer(images)

        def whole() -> None:
            for _ in worker.work(task):
                pass

        def in_line() -> None:
            with patch.object(job, "WriteBehind", InLine):
                whole()

        t = bench.timed({"inner": inner, "whole": whole, "in line": in_line}, min(3, bench.rounds), measured=False)
        base = "its inner loop in memory"
        what = "explain job, one thread of two cores, PatternAttribution, npy and png"
        yield bench.row(f"{what}: images/s", t["inner"], base, t["whole"], "≥ 0.95")
        yield bench.row("the same, writing between batches", t["inner"], base, t["in line"])


class InLine(WriteBehind):
    """Does things at once."""

    def do(self, work: Callable[..., None], *arguments: object) -> None:
        work(*arguments)
