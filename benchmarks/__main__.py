"""Timings as ratios within one run: `python -m benchmarks [--write FILE]`.

Every variant is timed in turn, round after round, so that a slow moment of the machine meets them all.
"""

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.explaining import explaining
from benchmarks.timing import BATCH, JOB_IMAGES, JOB_SHARDS, SIZE, THREADS, timed, vgg16_features, write_shards
from patterns import Gate, Network, Observer, Operator, PatchMoments, solve, trace
from patterns.estimators import wanted
from patterns.moments import Wanted
from patterns.operators import Convolution
from patterns.patches import PatchAccumulator
from patterns.rho import cov_xx, quality
from ray_jobs.config import FITTED, FitConfig, ModelConfig, Resources
from ray_jobs.fit import fit
from ray_jobs.sources import list_shards
from ray_jobs.worker import keep_freed_memory

D, K = 4608, 512  # of VGG-16's largest convolutions


def observing(network: Network, *choices: str, positions: int | None = None) -> Callable[[Tensor], Tensor]:
    def wants(operator: Operator) -> Wanted:
        return wanted(operator, choices)

    return Observer(network, wants, positions=positions).update


def fitting(rounds: int) -> list[tuple[str, str, str, str]]:
    """The inner loop: statistics against a forward."""
    model = vgg16_features()
    network = trace(model, torch.zeros(2, 3, SIZE, SIZE))
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    sampled = observing(network, *FITTED, positions=16)
    both = observing(network, "default"), observing(network, *FITTED)

    def forward() -> Tensor:
        with torch.inference_mode():
            return model(images)

    t = timed(
        rounds,
        {
            "forward": forward,
            "default": lambda: both[0](images),
            "all": lambda: both[1](images),
            "sampled": lambda: sampled(images),
        },
    )
    return [
        ("fit, default (two-component's positive part)", "plain forward", t["default"].ratio(t["forward"]), "≤ 3.8"),
        ("fit, all estimators", "plain forward", t["all"].ratio(t["forward"]), "≤ 5.2"),
        ("fit, all estimators, 16 positions of each image", "plain forward", t["sampled"].ratio(t["forward"]), "≤ 1.2"),
    ]


def judging(rounds: int) -> tuple[str, str, str, str]:
    """ρ of all neurons of VGG-16's largest convolution, three estimators, against one eigendecomposition."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(K, D // 9, 3, 3, generator=generator, dtype=torch.float64)
    kind, gate = Convolution((1, 1), (0, 0), (1, 1)), Gate(0.0, float("inf"))
    operator = Operator("conv", kind, weight, None, ((D // 9, 3, 3),), (K, 1, 1), "", gate)
    sets = [patch_moments(operator, generator) for _ in range(2)]
    patterns = solve(operator, sets[0].moments, ["filter", "linear", "two-component"]).patterns
    t = timed(
        rounds,
        {
            "quality": lambda: quality(patterns, operator.weight, *sets),
            "eigh": lambda: torch.linalg.eigh(cov_xx(sets[0])),
        },
    )
    return (
        f"ρ, D = {D}, K = {K}, three estimators",
        "one symmetric eigendecomposition",
        t["quality"].ratio(t["eigh"]),
        "≤ 3",
    )


def patch_moments(operator: Operator, generator: torch.Generator) -> PatchMoments:
    """Moments of 2 D random patches, each an image of one position."""
    accumulator = PatchAccumulator(operator, 1)
    for _ in range(2):
        images = torch.randn(D, *operator.input_shapes[0], generator=generator, dtype=torch.float64) + 0.5
        accumulator.begin(torch.arange(D))
        accumulator.update((images,), operator(images))
    return accumulator.moments()


def throughput(workers: int, threads: int) -> float:
    """Samples a second of the fit job, from the first worker's start to the last commit."""
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder))
        spec = ModelConfig("benchmarks.timing:vgg16_features")
        config = FitConfig(spec, list_shards(shards), f"{folder}/run", BATCH, ("default",))
        done = fit(config, Resources(workers=workers, cpus_per_worker=threads)).manifest()["fit"]
    return float(done["samples"] / done["seconds"])


def two_workers() -> tuple[str, str, str, str]:
    """The fit job's throughput with two workers of one thread, against one such worker."""
    ratio = throughput(2, 1) / throughput(1, 1)
    return "fit job, two workers of one thread: images/s", "one such worker", f"{ratio:.2f}", "≥ 1.8"


def job() -> tuple[str, str, str, str]:
    """The fit job's throughput with one worker, against its inner loop over tensors in memory."""
    rate = throughput(1, THREADS)
    network = trace(vgg16_features(), torch.zeros(2, 3, SIZE, SIZE))
    update = observing(network, "default")
    batches = torch.randn(JOB_SHARDS * JOB_IMAGES // BATCH, BATCH, 3, SIZE, SIZE).unbind()
    update(batches[0])
    begun = time.perf_counter()
    for batch in batches:
        update(batch)
    inner = len(batches) * BATCH / (time.perf_counter() - begun)
    return "fit job, one worker, JPEG shards: images/s", "its inner loop in memory", f"{rate / inner:.2f}", "≥ 0.9"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    keep_freed_memory()  # as the workers do; for every variant alike
    rows = []
    for row in chain(
        fitting(options.rounds),
        (make() for make in (lambda: judging(min(3, options.rounds)), job, two_workers)),
        explaining(options.rounds),
    ):
        print(f"| {' | '.join(row)} |", flush=True)
        rows.append(row)
    text = f"""# Benchmarks

VGG-16's features where no other model is named, {SIZE}×{SIZE}, batches of {BATCH}, float32, {THREADS} threads where no
other number is named; median of {options.rounds} rounds and the middle half's spread, each a ratio within one round.
Made by `make bench`
(torch {torch.__version__.partition("+")[0]}, {platform.machine()}, CPU).

| what | against | ratio | wanted |
| --- | --- | --- | --- |
"""
    text += "".join(f"| {' | '.join(row)} |\n" for row in rows)
    if options.write:
        options.write.write_text(text)


if __name__ == "__main__":
    main()
