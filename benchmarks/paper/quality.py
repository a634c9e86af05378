"""ρ of the signal estimators in every convolution of VGG-16 (Kindermans et al. 2018, Figure 3)."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.paper.photographs import draw_crops
from patterns import Moments, Network, Observer, PatchMoments, PatchObserver, solve
from patterns.estimation.signal_quality import group_by_estimator, rho, whiten
from ray_jobs.config import Preprocessing

ESTIMATORS = "random", "filter", "linear", "two-component"


@dataclass(frozen=True)
class Sizes:
    """How much data to use.

    Attributes:
        crops: Random crops of each photograph.
        positions: Spatial positions of each crop for patterns and for ρ.
        regressed_positions: Spatial positions of each crop for v.
        photographs: Photographs in all; None: all.
        inputs: Largest number of inputs of a neuron in the layers to judge.
    """

    crops: int = 3
    positions: int = 64
    regressed_positions: int = 128
    photographs: int | None = None
    inputs: int = 4608


@dataclass(frozen=True)
class Judged:
    """ρ of one operator.

    Attributes:
        rho: By estimator, shape (K,).
        same_set: By estimator, ρ on the set on which v was regressed, shape (K,): a lower bound without bias of v.
        samples: Patches on which v was regressed.
        inputs: Inputs of a neuron.
    """

    rho: Mapping[str, Tensor]
    same_set: Mapping[str, Tensor]
    samples: int
    inputs: int


def select_layers(network: Network, inputs: int) -> list[str]:
    """Return the operators whose neurons have at most this number of inputs."""
    return [name for name, op in network.operators.items() if op.inputs_per_neuron <= inputs]


def fit_moments(
    network: Network, paths: Sequence[Path], sizes: Sizes, preprocessing: Preprocessing
) -> dict[str, Moments]:
    """Return the moments of random crops for the patterns, by operator."""
    observer = Observer(network, positions=sizes.positions)
    observe(observer, paths, sizes, preprocessing)
    return observer.moments()


def gather_patches(
    network: Network, paths: Sequence[Path], positions: int, sizes: Sizes, preprocessing: Preprocessing
) -> dict[str, PatchMoments]:
    """Return the moments of random crops for ρ, by operator, of the layers to judge.

    The Gram matrices of all convolutions take 1.1 GB, so they are not copied, which `PatchObserver.moments` does.
    """
    observer = PatchObserver(network, select_layers(network, sizes.inputs), positions)
    observe(observer, paths, sizes, preprocessing)
    found: dict[str, dict[str, Tensor]] = {}
    for key, sums in observer.tensors().items():
        name, _, field = key.partition("/")
        found.setdefault(name, {})[field] = sums
    return {name: PatchMoments.from_tensors(sums) for name, sums in found.items()}


def observe(
    observer: Observer | PatchObserver, paths: Sequence[Path], sizes: Sizes, preprocessing: Preprocessing
) -> None:
    """Let an observer see random crops of photographs."""
    begun = time.monotonic()
    for crops in draw_crops(paths, sizes.crops, preprocessing):
        observer.update(crops)
    observer.flush()
    print(f"{len(paths)} photographs in {time.monotonic() - begun:.0f} s", flush=True)


def save_patches(moments: Mapping[str, PatchMoments], folder: Path) -> None:
    """Write moments to a folder, one file for each operator: two sets and their decomposition take 5 GB of memory."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, of in moments.items():
        torch.save(of.tensors(), folder / f"{name}.pt")


def load_patches(folder: Path, name: str) -> PatchMoments:
    """Return the moments of an operator from a folder of `save_patches`."""
    return PatchMoments.from_tensors(torch.load(folder / f"{name}.pt", weights_only=True))


def judge(
    network: Network, fitted: Mapping[str, Moments], regressed: Path, evaluated: Path, inputs: int
) -> Iterator[tuple[str, Judged]]:
    """Yield the quality of each operator's patterns.

    Args:
        network: The network.
        fitted: The moments for the patterns.
        regressed: The folder of the moments for v.
        evaluated: The folder of the moments for ρ.
        inputs: Largest number of inputs of a neuron in the layers to judge.
    """
    for name in select_layers(network, inputs):
        begun, operator = time.monotonic(), network.operators[name]
        b, c = load_patches(regressed, name), load_patches(evaluated, name)
        estimators = group_by_estimator(solve(operator, fitted[name], ESTIMATORS).patterns)
        whitening = whiten(b)
        measured = {e: rho(estimators[e], operator.weight, whitening, c) for e in ESTIMATORS}
        same_set = {e: rho(estimators[e], operator.weight, whitening, b) for e in ESTIMATORS}
        samples = int(b.moments.total.n[0])
        seconds, linear = time.monotonic() - begun, float(torch.nanmedian(measured["linear"]))
        print(f"{name}: {operator.inputs_per_neuron} inputs, linear {linear:.3f}, {seconds:.0f} s", flush=True)
        yield name, Judged(measured, same_set, samples, operator.inputs_per_neuron)
