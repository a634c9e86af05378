"""Moments compared with a plain forward pass, and the fit job compared with its inner loop."""

import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.timing import (
    JOB_BATCH,
    JOB_IMAGES,
    JOB_SHARDS,
    SIZE,
    THREADS,
    Bench,
    Row,
    infer,
    median_and_quartiles,
    vgg16_features,
    write_shards,
)
from patterns import Gate, Network, Observer, Operator, PatchMoments, solve, trace
from patterns.estimation.estimators import required_sums
from patterns.estimation.signal_quality import cov_xx, quality
from patterns.moments.gram import PatchAccumulator
from patterns.moments.moments import RequiredSums
from patterns.moments.position_sampling import PositionSampler
from patterns.moments.sampled import BLOCK_LIMITS
from patterns.operators.operator import Convolution
from ray_jobs.config import FITTED, FitConfig, ModelConfig, Resources
from ray_jobs.data.shard_specs import list_shards
from ray_jobs.jobs.fit.fit import fit

POSITIONS = 16
D, K = 4608, 512  # inputs and neurons of VGG-16's largest convolutions

FITS = {
    "two-component's positive part (the default)": ("default",),
    "two-component": ("two-component",),
    "linear": ("linear",),
    "all estimators": FITTED,
}
TARGETS = {
    ("VGG-16", "two-component's positive part (the default)"): "≤ 3.2",
    ("VGG-16", "all estimators"): "≤ 4.5",
    ("VGG-16", "all estimators, 16 positions"): "≤ 1.15",
    ("ResNet-50", "all estimators, 16 positions"): "≤ 1.3",
    ("ViT-B/16", "all estimators, 16 positions"): "≤ 1.3",
    ("ConvNeXt-T", "all estimators, 16 positions"): "≤ 1.3",
}


def make_observer(network: Network, *choices: str, positions: int | None = None) -> Observer:
    """Return an observer for some estimators."""

    def wants(operator: Operator) -> RequiredSums:
        return required_sums(operator, choices)

    return Observer(network, wants, positions=positions)


def measure_passes(bench: Bench) -> Iterator[Row]:
    """Measure the inner loop: moments compared with a forward pass."""
    for name, model, images in bench.models():
        network = trace(model, images[:2])
        updates = {what: make_observer(network, *choices).update for what, choices in FITS.items()}
        ways = {what: partial(update, images) for what, update in updates.items()}
        t = bench.timed({"forward": partial(infer, model, images), **ways})
        yield bench.row(f"{name}: forward", t["forward"], "itself", t["forward"])
        for what in updates:
            yield bench.row(f"{name}: fit, {what}", t[what], "forward", t["forward"], TARGETS.get((name, what), ""))
        yield from measure_sampling(bench, name, model, network, images)


def measure_sampling(bench: Bench, name: str, model: nn.Module, network: Network, images: Tensor) -> Iterator[Row]:
    """Measure a fit of sampled positions over as many batches as are summed at once, including the summing.

    On a CPU its forward pass is channels-last, so it is also compared with that of a channels-last model.
    """
    update = make_observer(network, *FITTED, positions=POSITIONS).update
    batches = max(1, BLOCK_LIMITS[images.is_cuda][0] // (POSITIONS * len(images)))

    def repeated(work: Callable[[Tensor], object]) -> None:
        for _ in range(batches):
            work(images)

    forward, layout = partial(infer, model), "channels-last forward"
    ways: dict[str, Callable[[], object]] = {"forward": partial(repeated, forward), "fit": partial(repeated, update)}
    if not images.is_cuda:  # the layout of the weights spreads to the outputs of all convolutions
        ways[layout] = partial(repeated, partial(infer, deepcopy(model).to(memory_format=torch.channels_last)))
    t = bench.timed(ways, min(3, bench.rounds))
    what = f"all estimators, {POSITIONS} positions"
    yield bench.row(f"{name}: fit, {what}", t["fit"], "forward", t["forward"], TARGETS.get((name, what), ""))
    if layout in t:
        yield bench.row(f"{name}: fit, {what}", t["fit"], layout, t[layout])


def measure_quality(bench: Bench) -> Row:
    """Compare ρ of all neurons of VGG-16's largest convolution, three estimators, with one eigendecomposition."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(K, D // 9, 3, 3, generator=generator, dtype=torch.float64)
    convolution, gate = Convolution((1, 1), (0, 0), (1, 1)), Gate(0.0, float("inf"))
    operator = Operator("conv", convolution, weight, None, ((D // 9, 3, 3),), (K, 1, 1), "", gate)
    regressed, evaluated = (patch_moments(operator, generator) for _ in range(2))
    patterns = solve(operator, regressed.moments, ["filter", "linear", "two-component"]).patterns
    variants: dict[str, Callable[[], object]] = {
        "quality": lambda: quality(patterns, operator.weight, regressed, evaluated),
        "eigh": lambda: torch.linalg.eigh(cov_xx(regressed)),
    }
    t = bench.timed(variants, min(3, bench.rounds), measured=False)
    what = f"ρ, D = {D}, K = {K}, three estimators"
    return bench.row(what, t["quality"], "one symmetric eigendecomposition", t["eigh"], "≤ 3")


def patch_moments(operator: Operator, generator: torch.Generator) -> PatchMoments:
    """Return the moments of 2 D random patches, each an image of one position."""
    sampler = PositionSampler(1)
    accumulator = PatchAccumulator(operator, sampler)
    for _ in range(2):
        images = torch.randn(D, *operator.input_shapes[0], generator=generator, dtype=torch.float64) + 0.5
        sampler.start_pass(torch.arange(D))
        accumulator.update((images,), operator(images))
    return accumulator.moments()


def throughput(workers: int, threads: int, images: int = JOB_IMAGES) -> float:
    """Return the fit job's samples per second over shards of `images`, from the first start to the last commit."""
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder), images)
        spec = ModelConfig(spec="benchmarks.timing:vgg16_features")
        config = FitConfig(
            model=spec, shards=list_shards(shards), out=f"{folder}/run", batch_size=JOB_BATCH, estimators=("default",)
        )
        done = fit(config, Resources(workers=workers, cpus_per_worker=threads)).manifest()["fit"]
    return float(done["samples"] / done["seconds"])


def measure_job(bench: Bench) -> Iterator[Row]:
    """Compare the fit job with its inner loop, measured before and after, and two workers of one thread with one."""
    torch.set_num_threads(THREADS)
    network = trace(vgg16_features(), torch.zeros(2, 3, SIZE, SIZE))
    update = make_observer(network, "default").update
    batches = torch.randn(JOB_SHARDS * JOB_IMAGES // JOB_BATCH, JOB_BATCH, 3, SIZE, SIZE).unbind()
    update(batches[0])

    def inner() -> float:
        begun = time.perf_counter()
        for batch in batches:
            update(batch)
        return (time.perf_counter() - begun) / (len(batches) * JOB_BATCH)

    seconds, rates = [inner()], []
    for _ in range(min(3, bench.rounds)):
        rates.append(throughput(1, THREADS, 2 * JOB_IMAGES))  # long enough for a first commit
        seconds.append(inner())
    ratios = [rate * (before + after) / 2 for rate, before, after in zip(rates, seconds, seconds[1:])]
    yield Row(
        "fit job, one worker, JPEG shards: images/s", "its inner loop in memory", median_and_quartiles(ratios), "≥ 0.95"
    )
    two = throughput(2, 1) / throughput(1, 1)
    yield Row("fit job, two workers of one thread: images/s", "one such worker", f"{two:.2f}", "≥ 1.8")
