"""What docs/linear.md measures: each function is a cell of it, shown there as it stands here."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.linear.model import PAPER, LinearModel, degrees, fitted, network, trained
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


def plane(angle: float, samples: int, seed: int = 0) -> Plane:
    """The paper's data, with the distractor at this angle to the signal, in degrees."""
    model = PAPER.rotated(angle - 45)
    x, y = model.sample(samples, torch.Generator().manual_seed(seed))
    linear = trained(x, y)
    return Plane(model, x, y, linear.weight.detach(), fitted(network(linear), x, ESTIMATORS))


@dataclass(frozen=True)
class Turning:
    """Directions in the plane, in degrees from a_s, by the distractor's."""

    samples: int
    angles: list[float]
    weight: list[float]
    pattern: list[float]

    def standard_error(self, angle: float) -> float:
        """Of the pattern's direction: what cov[ε, y]/var[y] adds of a_d, across the signal."""
        return math.degrees(math.sqrt(2 * 3 / self.samples) * math.sin(math.radians(angle)))

    def largest_deviation(self) -> float:
        """Of the pattern from a_s."""
        return max(map(abs, self.pattern))

    def standard_deviates(self) -> float:
        """Root mean square of the pattern's deviations in standard errors: 1 if they are sampling alone."""
        terms = [(found / self.standard_error(angle)) ** 2 for found, angle in zip(self.pattern, self.angles)]
        return math.sqrt(sum(terms) / len(terms))


def turning(samples: int) -> Turning:
    """Turn the distractor from 5° to 175° to the signal, with new data at each angle."""
    angles = [float(angle) for angle in range(5, 180, 5)]
    planes = [plane(angle, samples, seed) for seed, angle in enumerate(angles)]
    weights = [direction(p.weight) for p in planes]
    return Turning(samples, angles, weights, [direction(p.patterns["linear"]) for p in planes])


def direction(vector: Tensor) -> float:
    """Degrees from a_s = (1, 0), counter-clockwise."""
    return math.degrees(math.atan2(float(vector[0, 1]), float(vector[0, 0])))


def convergence(sizes: list[int], repeats: int) -> Tensor:
    """|a - a_s| of the paper's data, for each number of samples and each of several draws of them."""
    generator = torch.Generator().manual_seed(0)
    traced = network(trained(*PAPER.sample(100, generator)))

    def error(samples: int) -> float:
        x, _ = PAPER.sample(samples, generator)
        return float((fitted(traced, x, ["linear"])["linear"] - PAPER.signal.T).norm())

    return torch.tensor([[error(samples) for _ in range(repeats)] for samples in sizes])


def slope(sizes: list[int], errors: Tensor) -> float:
    """Of log root mean square error against log samples."""
    n, e = torch.tensor(sizes).log(), errors.square().mean(1).sqrt().log()
    return float(((n - n.mean()) * (e - e.mean())).sum() / (n - n.mean()).square().sum())


def rectified(mean: float, samples: int) -> dict[str, float]:
    """Degrees from a_s to the patterns of a ReLU neuron on the paper's data, by estimator; `mean` is that of ε."""
    model = LinearModel(PAPER.signal, PAPER.distractor, mean=mean)
    x, y = model.sample(samples, torch.Generator().manual_seed(0))
    found = fitted(network(trained(x, y), nn.ReLU()), x, ["linear", "two-component", "two-component-own-mean"])
    return {name: degrees(pattern, model.signal) for name, pattern in found.items()}


def pictures() -> LinearModel:
    """16×16 images: a blurred digit as the signal; brightness, gratings and pixel noise as distractors."""
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
    """A few images by their parts, all (n, 256), every method's map of them, and the output that it explains."""

    x: Tensor
    signal: Tensor
    distractor: Tensor
    y: Tensor
    output: Tensor
    maps: dict[str, Tensor]
    weight: Tensor
    pattern: Tensor


def side_by_side(model: LinearModel, y: Tensor, seed: int = 1) -> Panel:
    """Train a layer and fit its pattern on 4096 images, then explain new ones with this much signal."""
    x, amounts = model.sample(4096, torch.Generator().manual_seed(0))
    linear = trained(x, amounts)
    traced = network(linear)
    pattern = fitted(traced, x, ["linear"])["linear"]

    noise = torch.randn(len(y), model.distractor.shape[1], generator=torch.Generator().manual_seed(seed)).double()
    images = model.observe(y[:, None], noise)
    explained = Explainer(traced, {"0": pattern}, list(METHODS))(images)
    signal = model.observe(y[:, None], 0 * noise)
    output, weight = explained.scores[:, 0], linear.weight.detach()
    return Panel(images, signal, images - signal, y, output, explained.maps, weight, pattern)


def likeness(maps: Tensor, truth: Tensor) -> float:
    """Mean |cosine| of each image's map and truth."""
    return float(F.cosine_similarity(maps, truth).abs().mean())
