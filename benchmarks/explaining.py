"""Explanations against a plain input gradient, against each other, and against what other libraries take for a map."""

import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import captum.attr
import torch
from torch import Tensor, nn
from torchvision.models import resnet50
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlusFlat

from benchmarks.timing import BATCH, SIZE, timed, vgg16_features, write_shards
from patterns import Explainer, trace
from ray_jobs import explain as job
from ray_jobs import models
from ray_jobs.config import ExplainConfig, FitConfig, ModelConfig, Resources
from ray_jobs.fit import fit
from ray_jobs.outputs import outputs
from ray_jobs.shards import ShardReader
from ray_jobs.sources import list_shards
from ray_jobs.worker import Behind, Share

FIVE = ("gradient", "deconvnet", "guided-backprop", "patternnet", "patternattribution")
HERE = Resources(workers=0)
Row = tuple[str, str, str, str]


def explaining(rounds: int) -> Iterator[Row]:
    """All rows about explanations."""
    warnings.filterwarnings("ignore")  # captum's about the hooks that it sets
    yield from passes(rounds)
    yield from whole_job(min(3, rounds))


def plain_gradient(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    def gradient() -> Tensor:
        inputs = images.clone().requires_grad_()
        scores = model(inputs)
        start = torch.zeros_like(scores).scatter_(1, scores.argmax(1, keepdim=True), 1.0)
        return torch.autograd.grad(scores, inputs, start)[0]

    return gradient


def passes(rounds: int) -> Iterator[Row]:
    """The inner loops."""
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    for name, model, most in (
        ("VGG-16", vgg16_features(), "≤ 1.05"),
        ("ResNet-50", resnet50().eval(), "≤ 1.15"),
    ):
        model.requires_grad_(False)
        network = trace(model, images[:2])
        patterns = {key: torch.randn_like(op.weight) for key, op in network.operators.items()}
        alone = {m: Explainer(network, patterns, [m]) for m in FIVE}
        together = Explainer(network, patterns, FIVE)
        targets = model(images).argmax(1)
        guided, relevance = captum.attr.GuidedBackprop(model), EpsilonPlusFlat()
        start = torch.zeros(BATCH, network.output_shape[0]).scatter_(1, targets[:, None], 1.0)

        def layer_wise(model: nn.Module = model, relevance: object = relevance, start: Tensor = start) -> None:
            with Gradient(model, relevance) as attributor:
                attributor(images.clone(), start)

        variants: dict[str, Callable[[], object]] = {
            "plain": plain_gradient(model, images),
            **{m: lambda e=e, t=targets: e(images, t) for m, e in alone.items()},  # type: ignore[misc]
            "together": lambda e=together, t=targets: e(images, t),  # type: ignore[misc]
            "captum": lambda g=guided, t=targets: g.attribute(images.clone(), t),  # type: ignore[misc]
            "layer-wise": layer_wise,
        }
        t = timed(rounds, variants)
        yield from [
            (f"{name}: PatternNet", "plain input gradient", t["patternnet"].ratio(t["plain"]), most),
            (f"{name}: PatternAttribution", "plain input gradient", t["patternattribution"].ratio(t["plain"]), most),
            (
                f"{name}: {', '.join(FIVE)}, one forward pass",
                "sum of the five alone",
                t["together"].ratio(sum((t[m] for m in FIVE[1:]), t[FIVE[0]])),
                "≤ 0.65",
            ),
            (
                f"{name}: PatternAttribution",
                "Guided BackProp of captum",
                t["patternattribution"].ratio(t["captum"]),
                "< 1",
            ),
            (
                f"{name}: PatternAttribution",
                "layer-wise LRP (zennit, ε, z⁺, flat)",
                t["patternattribution"].ratio(t["layer-wise"]),
                "< 1",
            ),
        ]


def whole_job(rounds: int) -> list[Row]:
    """The explain job's worker on JPEG shards, all outputs written, against its inner loop over tensors in memory."""
    with tempfile.TemporaryDirectory() as folder:
        shards = list_shards(write_shards(Path(folder)))
        model = ModelConfig("benchmarks.timing:vgg16_features")
        fit(FitConfig(model, shards[:1], f"{folder}/run", BATCH, ("default",), max_samples=BATCH), HERE)
        config = ExplainConfig(model, f"{folder}/run", shards, f"{folder}/run", BATCH, FIVE[-1:])
        digest = json.loads((Path(folder) / "run" / "manifest.json").read_text())["model"]["digest"]
        worker = job.ExplainWorker(
            config, digest, {}, Share(cpus=1)
        )  # so that a core is left for the threads that read and write
        worker.ready()
        loaded = models.load(model)
        (images, *_) = (b.images for b in ShardReader(shards[0], loaded.preprocessing, BATCH))
        out = iter(outputs(f"{folder}/out", shards).values())
        batches = sum(1 for _ in ShardReader(shards[0], loaded.preprocessing, BATCH))
        shard = (shards[0], next(out), None)

        def inner() -> None:
            for _ in range(batches):
                worker.explainer(images)

        def whole() -> None:
            for _ in worker.work(*shard):
                pass

        def in_line() -> None:
            behind, job.Behind = job.Behind, InLine  # type: ignore[misc]
            try:
                whole()
            finally:
                job.Behind = behind  # type: ignore[misc]

        t = timed(rounds, {"inner": inner, "whole": whole, "in line": in_line})
        base = "its inner loop in memory"
        what = "explain job, one thread of two cores, PatternAttribution, npy and png"
        return [
            (f"{what}: images/s", base, t["inner"].ratio(t["whole"]), "≥ 0.9"),
            ("the same, writing between batches", base, t["inner"].ratio(t["in line"]), ""),
        ]


class InLine(Behind):
    """Does things at once."""

    def do(self, work: Callable[..., None], *arguments: object) -> None:
        work(*arguments)
