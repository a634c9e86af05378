"""Signals and attributions of channels of conv5_3 (Kindermans et al. 2018, Figures 5 and 6)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from benchmarks.paper.photographs import denormalize, load_whole
from patterns import Explainer, Moments, Network, choose, solve
from patterns.attribution.rendering import RenderedExplanation, render_map
from ray_jobs.config import Preprocessing

METHODS = "gradient", "deconvnet", "guided-backprop", "patternnet", "patternattribution"
ESTIMATORS = "filter", "linear", "two-component"
SIGNALS = tuple(f"patternnet:{estimator}" for estimator in ESTIMATORS)
ATTRIBUTIONS = tuple(f"patternattribution:{estimator}" for estimator in ESTIMATORS)
# Not those of mate-backgrounds, because their license is the GPL.
SHOWN = (
    "imagenet_14_129", "imagenet_15_99", "butterfly", "imagenet_07_609", "imagenet_10_541", "scenetext06",
    "imagenet_01_559", "imagenet_11_630",
)  # fmt: skip
SAMPLE = "imagenet_15_99"  # the photograph that is shown for every estimator
Patterns = dict[str, dict[str, Tensor]]  # by estimator and operator


def fit_patterns(network: Network, moments: Mapping[str, Moments]) -> Patterns:
    """Return the patterns of each estimator; those of the two-component estimator are its a₊."""
    solved = {name: solve(op, moments[name], ESTIMATORS).patterns for name, op in network.operators.items()}
    chosen = {estimator: choose(network, solved, estimator) for estimator in ESTIMATORS}
    return {estimator: {n: a for n, a in of.items() if a is not None} for estimator, of in chosen.items()}


def select_shown(paths: Sequence[Path]) -> list[Path]:
    """Return the photographs for the figures: those of SHOWN, or the first eight if there are none of them."""
    by_name = {path.stem: path for path in paths}
    return [by_name[name] for name in SHOWN if name in by_name] or list(paths[: len(SHOWN)])


def explain_photographs(
    network: Network, patterns: Patterns, paths: Sequence[Path], preprocessing: Preprocessing, methods: Sequence[str]
) -> list[RenderedExplanation]:
    """Explain for each photograph the channel with the largest sum over all positions, by each method.

    Args:
        network: The network that ends at conv5_3.
        patterns: By estimator.
        paths: The photographs.
        preprocessing: From photographs to inputs.
        methods: Methods; the two-component estimator is that of methods which name none.
    """
    explainer = Explainer(network, patterns["two-component"], methods, estimators=patterns)
    found = []
    for path in paths:
        inputs = load_whole(path, preprocessing)[None]
        maps = explainer(inputs, find_strongest_channel).maps
        with torch.inference_mode():
            channel = int(find_strongest_channel(network.module(inputs))[0])
        picture = to_pil_image(denormalize(inputs[0], preprocessing))
        rendered = {method: render_map(method, maps[method][0].numpy()) for method in methods}
        found.append(RenderedExplanation(picture, f"channel {channel}", rendered))
    return found


def find_strongest_channel(activations: Tensor) -> Tensor:
    """Return the channel with the largest sum over all positions, shape (N,), for activations (N, K, H, W)."""
    return activations.sum((2, 3)).argmax(1)
