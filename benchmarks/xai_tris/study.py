"""Maps of trained models and their scores."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.xai_tris.data import Samples, Split
from benchmarks.xai_tris.measures import earth_movers_accuracy, precision
from patterns import PRESETS, Explainer, Network, accumulate, choose, solve, trace
from patterns.estimation.presets import DEFAULT, expand_presets

METHODS = (
    "gradient", "gradient-x-input", "integrated-gradients", "smoothgrad", "guided-backprop", "deconvnet",
    *(f"{method}:{preset}" for method in ("patternnet", "patternattribution") for preset in PRESETS),
)  # fmt: skip
# Also explained with the difference of the scores as target; the first is the method that is compared with all others.
DIFFERENCES = f"patternattribution:{DEFAULT}", "integrated-gradients", "gradient"
PRESET_METHOD = DIFFERENCES[0]
BASELINES = {"random": "random map", "sobel": "Sobel edges", "signal:identity": "|x|"}
MEASURES = "earth mover's accuracy", "precision", "earth mover's accuracy, own", "precision, own"


def list_methods(architecture: str) -> list[str]:
    """Return the methods for a model; with the flat rule in its first layer, all maps of an MLP are constant."""
    return [*METHODS, *(["lrp-epsilon-plus-flat"] if architecture == "CNN" else [])]


@dataclass(frozen=True)
class Fitted:
    """A network and its patterns by preset and operator."""

    network: Network
    patterns: dict[str, dict[str, Tensor | None]]


def fit(model: nn.Module, split: Split) -> Fitted:
    """Fit the patterns of all presets on the training images."""
    images = split.training.images
    network = trace(model, images[:2])
    moments = accumulate(network, images.split(1000))
    names = sorted({c.rpartition("=")[2] for preset in PRESETS for c in expand_presets(preset, network)} - {"identity"})
    solutions = {name: solve(op, moments[name], names).patterns for name, op in network.operators.items()}
    return Fitted(network, {preset: choose(network, solutions, preset) for preset in PRESETS})


def explain(fitted: Fitted, samples: Samples, methods: Iterable[str], difference: bool = False) -> dict[str, Tensor]:
    """Return the relevance without sign of each method, shape (N, SIDE, SIDE).

    Args:
        fitted: The network and its patterns.
        samples: Samples that the network classifies correctly.
        methods: Names of methods.
        difference: Whether to explain the score of the predicted class less that of the other class, instead of the
            score of the predicted class.
    """
    explainer = Explainer(fitted.network, None, list(methods), estimators=fitted.patterns)
    one = nn.functional.one_hot(samples.labels, 2).to(samples.images)
    targets = 2 * one - 1 if difference else samples.labels
    maps = explainer(samples.images, targets, seeds=range(len(samples))).maps
    return {name: values[:, 0].abs() for name, values in maps.items()}


def score(heat: Tensor, samples: Samples) -> Tensor:
    """Return the mean of each measure of `MEASURES`, shape (4,)."""
    found = [earth_movers_accuracy(heat, samples.both), precision(heat, samples.both)]
    if torch.equal(samples.own, samples.both):
        found *= 2
    else:
        found += [earth_movers_accuracy(heat, samples.own), precision(heat, samples.own)]
    return torch.stack(found).mean(1)
