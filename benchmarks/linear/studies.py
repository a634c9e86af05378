"""The measurements of docs/linear.md, which shows the source of some of these functions."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.linear.model import PAPER, LinearModel, angle_between, fit_patterns, make_network, train_layer
from patterns import METHODS, Explainer

ESTIMATORS = ["linear", "multivariate", "filter"]

DIGIT = """
    . . . . . . . . . . . . . . . .
    . . . . . . . . . . . . . . . .
    . . . . . # # # # # . . . . . .
    . . . . # # # # # # # . . . . .
    . . . . # # . . . # # # . . . .
    . . . . . . . . . . # # . . . .
    . . . . . . . . . # # # . . . .
    . . . . . . # # # # # . . . . .
    . . . . . . # # # # # . . . . .
    . . . . . . . . . # # # . . . .
    . . . . . . . . . . # # . . . .
    . . . . # # . . . # # # . . . .
    . . . . # # # # # # # . . . . .
    . . . . . # # # # # . . . . . .
    . . . . . . . . . . . . . . . .
    . . . . . . . . . . . . . . . .
"""


@dataclass(frozen=True)
class Plane:
    """Data with the distractor at an angle to the signal, the weight trained on them, and their patterns."""

    model: LinearModel
    x: Tensor
    y: Tensor
    weight: Tensor
    patterns: dict[str, Tensor]


def measure_plane(angle: float, samples: int, seed: int = 0) -> Plane:
    """Train and fit on the paper's data with the distractor at this angle to the signal, in degrees."""
    model = PAPER.rotated(angle - 45)
    x, y = model.sample(samples, torch.Generator().manual_seed(seed))
    linear = train_layer(x, y)
    return Plane(model, x, y, linear.weight.detach(), fit_patterns(make_network(linear), x, ESTIMATORS))


@dataclass(frozen=True)
class Turning:
    """Directions of weight and pattern in degrees from a_s, for each angle of the distractor."""

    samples: int
    angles: list[float]
    weight: list[float]
    pattern: list[float]

    def standard_error(self, angle: float) -> float:
        """Return the standard error of the pattern's direction, from the sampling error of cov[ε, y] / var[y]."""
        return math.degrees(math.sqrt(2 * 3 / self.samples) * math.sin(math.radians(angle)))

    def largest_deviation(self) -> float:
        """Return the largest angle between the pattern and a_s."""
        return max(map(abs, self.pattern))

    def standard_deviates(self) -> float:
        """Return the root mean square of the pattern's angles in standard errors; 1 for sampling errors only."""
        terms = [(found / self.standard_error(angle)) ** 2 for found, angle in zip(self.pattern, self.angles)]
        return math.sqrt(sum(terms) / len(terms))


def turn_distractor(samples: int) -> Turning:
    """Turn the distractor from 5° to 175° against the signal, with new data at each angle."""
    angles = [float(angle) for angle in range(5, 180, 5)]
    planes = [measure_plane(angle, samples, seed) for seed, angle in enumerate(angles)]
    weights = [angle_of(p.weight) for p in planes]
    return Turning(samples, angles, weights, [angle_of(p.patterns["linear"]) for p in planes])


def angle_of(vector: Tensor) -> float:
    """Return the angle of a vector in degrees from a_s = (1, 0), counterclockwise."""
    return math.degrees(math.atan2(float(vector[0, 1]), float(vector[0, 0])))


def measure_convergence(sizes: list[int], repeats: int) -> Tensor:
    """Return |a - a_s| for the paper's data, for each number of samples and each of several draws."""
    generator = torch.Generator().manual_seed(0)
    traced = make_network(train_layer(*PAPER.sample(100, generator)))

    def error(samples: int) -> float:
        x, _ = PAPER.sample(samples, generator)
        return float((fit_patterns(traced, x, ["linear"])["linear"] - PAPER.signal.T).norm())

    return torch.tensor([[error(samples) for _ in range(repeats)] for samples in sizes])


def fit_slope(sizes: list[int], errors: Tensor) -> float:
    """Return the slope of log root mean square error against log samples."""
    n, e = torch.tensor(sizes).log(), errors.square().mean(1).sqrt().log()
    return float(((n - n.mean()) * (e - e.mean())).sum() / (n - n.mean()).square().sum())


def measure_gated(activation: nn.Module, mean: float, samples: int) -> dict[str, float]:
    """Return the angles in degrees of weight and patterns to a_s, for a neuron with an activation; ε has this mean."""
    model = LinearModel(PAPER.signal, PAPER.distractor, mean=mean)
    x, y = model.sample(samples, torch.Generator().manual_seed(0))
    layer = train_layer(x, y)
    found = fit_patterns(make_network(layer, activation), x, ["linear", "two-component", "two-component-own-mean"])
    return {name: angle_between(v, model.signal) for name, v in {"weight": layer.weight.detach(), **found}.items()}


def make_images() -> LinearModel:
    """Return a model of 16×16 images: the signal is a blurred digit, distractors are brightness, gratings and noise."""
    strokes = torch.tensor([[float(c == "#") for c in row.split()] for row in DIGIT.split("\n") if row.strip()])
    binomial = torch.tensor([1.0, 2.0, 1.0]) / 4
    digit = F.conv2d(strokes[None, None], binomial[:, None] * binomial[None, None, None], padding=1).double()
    position = torch.arange(16, dtype=torch.float64) * (2 * math.pi / 16)
    gratings = [torch.ones(16, 16, dtype=torch.float64)]
    for down in range(4):
        for across in range(-3, 4):
            if (down, across) > (0, 0) and math.hypot(down, across) <= 3:
                phase = down * position[:, None] + across * position
                gratings += [phase.cos(), phase.sin()]
    pixels = 0.1 * torch.eye(256, dtype=torch.float64)
    return LinearModel(digit.reshape(256, 1), torch.cat([0.2 * torch.stack(gratings).flatten(1).T, pixels], 1))


@dataclass(frozen=True)
class Panel:
    """Images, their signal and distractor, all (n, 256), the maps of all methods, and the explained output."""

    x: Tensor
    signal: Tensor
    distractor: Tensor
    y: Tensor
    output: Tensor
    maps: dict[str, Tensor]
    weight: Tensor
    pattern: Tensor


def explain_images(model: LinearModel, y: Tensor, seed: int = 1) -> Panel:
    """Train a layer and fit its pattern on 4096 images, then explain new images with these amounts y of signal."""
    x, amounts = model.sample(4096, torch.Generator().manual_seed(0))
    linear = train_layer(x, amounts)
    traced = make_network(linear)
    pattern = fit_patterns(traced, x, ["linear"])["linear"]

    noise = torch.randn(len(y), model.distractor.shape[1], generator=torch.Generator().manual_seed(seed)).double()
    images = model.observe(y[:, None], noise)
    explained = Explainer(traced, {"0": pattern}, list(METHODS))(images)
    signal = model.observe(y[:, None], 0 * noise)
    output, weight = explained.scores[:, 0], linear.weight.detach()
    return Panel(images, signal, images - signal, y, output, explained.maps, weight, pattern)


def mean_cosine(maps: Tensor, truth: Tensor) -> float:
    """Return the mean |cosine| between maps and the truth."""
    return float(F.cosine_similarity(maps, truth).abs().mean())
