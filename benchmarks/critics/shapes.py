"""Generated images with a known ground truth: suppressors, a constant shift, and the randomization test of Quantus.

The images follow XAI-TRIS (Clark et al. 2023, arXiv 2306.12816): 8×8 pixels with a T and an L of four pixels at fixed
positions, on a background of correlated pixels, so that pixels next to a shape help to subtract the background in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.critics.measures import earth_movers_accuracy
from patterns import Explainer, Network, accumulate, choose, solve, trace
from patterns.attribution.baselines import sobel
from patterns.evaluation import absorb_shift, cascade, heat, spearman
from ray_jobs.jobs.explain.map_statistics import summarize_maps

SIDE = 8
SMOOTH = 1.5  # pixels, of the background's Gaussian
PIXEL_NOISE = 0.1
SCENARIOS = {"linear": 0.35, "multiplicative": 0.85, "XOR": 0.6}  # the shapes' strength
TRAINED, TESTED, EXPLAINED, SEEDS = 6000, 1000, 24, 3
SHIFT = 3.0  # times the images' standard deviation
DRAWS = 5  # cascades that are compared with one of Quantus
EPOCHS, BATCH = 25, 64
ESTIMATORS = ("two-component", "linear", "multivariate", "two-component-own-mean")
METHODS = (
    "gradient", "gradient-x-input", "guided-backprop", "integrated-gradients", "smoothgrad",
    "patternnet:two-component", "patternnet:linear", "patternnet:multivariate",
    "patternattribution:two-component", "patternattribution:linear", "patternattribution:two-component-own-mean",
    "patternattribution:multivariate",
)  # fmt: skip
BASELINES = ("random map", "Sobel edges", "|x|")
SHIFTED = (
    "gradient", "gradient-x-input", "integrated-gradients",
    *(f"{method}:{e}" for method in ("patternnet", "patternattribution") for e in ESTIMATORS),
)  # fmt: skip
Patterns = dict[str, dict[str, Tensor]]  # by estimator, by operator


def draw_shape(rows: str, top: int, left: int) -> Tensor:
    """Draw a shape of ones in an image of zeros."""
    image = torch.zeros(SIDE, SIDE, dtype=torch.float64)
    for y, row in enumerate(rows.split()):
        for x, pixel in enumerate(row):
            image[top + y, left + x] = float(pixel == "#")
    return image


T, L = draw_shape("#. ## #.", 1, 1), draw_shape("#. #. ##", 4, 5)
MASK = (T + L) > 0  # the pixels in which the classes differ: a missing shape is as informative as a present one


def draw_background(count: int, generator: torch.Generator) -> Tensor:
    """Draw smoothed normal noise with variance 1 at each pixel, shape (count, SIDE, SIDE)."""
    positions = torch.arange(SIDE, dtype=torch.float64)
    smooth = torch.exp(-((positions[:, None] - positions) ** 2) / (2 * SMOOTH**2))
    smooth = smooth / smooth.norm(dim=1, keepdim=True)
    return smooth @ torch.randn(count, SIDE, SIDE, generator=generator, dtype=torch.float64) @ smooth.T


def draw_images(scenario: str, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw images, float64 (count, 1, SIDE, SIDE), and their classes (count,)."""
    strength, noise = SCENARIOS[scenario], draw_background(count, generator)
    labels = torch.randint(2, (count,), generator=generator)
    one = labels[:, None, None].double()
    if scenario == "linear":  # a T or an L on top
        x = strength * (T * (1 - one) + L * one) + (1 - strength) * noise
    elif scenario == "multiplicative":  # a T or an L in which the background is faint
        x = (1 - strength * (T * (1 - one) + L * one)) * noise
    else:  # both shapes, with the same sign in one class and opposite signs in the other
        sign = 1 - 2 * torch.randint(2, (count, 1, 1), generator=generator).double()
        x = strength * sign * (T + (1 - 2 * one) * L) + (1 - strength) * noise
    x = x + PIXEL_NOISE * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x[:, None], labels


def make_perceptron() -> nn.Module:
    """Return an MLP with two hidden layers."""
    layers = nn.Linear(SIDE * SIDE, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)
    return nn.Sequential(nn.Flatten(), *layers)


def make_cnn() -> nn.Module:
    """Return a CNN with two convolutions."""
    features = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    head = nn.Flatten(), nn.Linear(16 * (SIDE // 2) ** 2, 32), nn.ReLU(), nn.Linear(32, 2)
    return nn.Sequential(*features, *head)


MODELS = {"MLP": make_perceptron, "CNN": make_cnn}


@dataclass(frozen=True)
class Trained:
    """A trained model: its network, its training images, its accuracy, and correctly classified test images."""

    scenario: str
    model: nn.Module
    network: Network
    training_images: Tensor
    accuracy: float
    images: Tensor
    labels: Tensor

    def patterns(self, network: Network, images: Tensor) -> Patterns:
        """Fit the patterns of a network on some images; return them by estimator."""
        moments = accumulate(network, images.split(1000))
        solutions = {n: solve(op, moments[n], ESTIMATORS).patterns for n, op in network.operators.items()}
        chosen = {estimator: choose(network, solutions, estimator) for estimator in ESTIMATORS}
        return {each: {n: a for n, a in patterns.items() if a is not None} for each, patterns in chosen.items()}


def train(scenario: str, architecture: str, seed: int) -> Trained:
    """Train a model by Adam with a cosine schedule, and convert it to float64."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    x, labels = draw_images(scenario, TRAINED, generator)
    model, inputs = MODELS[architecture](), x.float()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for batch in torch.randperm(TRAINED, generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()
        schedule.step()
    model.double().eval().requires_grad_(False)
    test_images, truth = draw_images(scenario, TESTED, generator)
    correct = model(test_images).argmax(1) == truth
    accuracy = float(correct.double().mean())
    return Trained(scenario, model, trace(model, x[:2]), x, accuracy, test_images[correct], truth[correct])


# --- suppressors ----------------------------------------------------------------------------------


def explain(trained: Trained, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the maps of each method and baseline, shape (N, 1, SIDE, SIDE)."""
    patterns = trained.patterns(trained.network, trained.training_images)
    explainer = Explainer(trained.network, None, METHODS, estimators=patterns)
    maps = explainer(images, labels, seeds=range(len(images))).maps
    return {**maps, **baseline_maps(images)}


def baseline_maps(images: Tensor) -> dict[str, Tensor]:
    """Return maps that do not depend on a model."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return dict(zip(BASELINES, (noise, sobel(images), images)))


def score_maps(name: str, maps: Tensor) -> dict[str, Tensor]:
    """Return the scores of maps against the mask, (N,) each; mass and pointing game as in the tables of the jobs."""
    method = "signal:identity" if name in BASELINES else name.partition(":")[0]
    rows = summarize_maps(method, maps, [MASK.bool()] * len(maps))
    return {
        "earth mover's accuracy": earth_movers_accuracy(heat(maps), MASK),
        "mass inside": torch.tensor([float(str(row[f"{method}_inside"])) for row in rows]),
        "pointing game": torch.tensor([float(bool(row[f"{method}_hit"])) for row in rows]),
    }


# --- a constant shift -----------------------------------------------------------------------------


def measure_shift(trained: Trained) -> dict[str, tuple[float, float]]:
    """Measure how much maps change when a constant image is added to all inputs and the first bias absorbs it.

    Returns:
        The largest |difference| divided by the largest |value|, the maximum over some images, by method: with the
        patterns of the original network, and with patterns fitted on the shifted images.
    """
    network, images, labels = trained.network, trained.images[:EXPLAINED], trained.labels[:EXPLAINED]
    noise = torch.randn(network.input_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shift = SHIFT * trained.training_images.std() * noise
    moved = absorb_shift(network, shift)
    carried = trained.patterns(network, trained.training_images)
    refitted = trained.patterns(moved, trained.training_images + shift)

    def maps(of: Network, patterns: Patterns, x: Tensor) -> dict[str, Tensor]:
        return {**Explainer(of, None, SHIFTED, estimators=patterns)(x, labels).maps, **baseline_maps(x)}

    before = maps(network, carried, images)
    after = [maps(moved, patterns, images + shift) for patterns in (carried, refitted)]

    def error(name: str, found: Mapping[str, Tensor]) -> float:
        size = before[name].abs().amax((1, 2, 3))
        return float(((found[name] - before[name]).abs().amax((1, 2, 3)) / size).max())

    return {name: (error(name, after[0]), error(name, after[1])) for name in before}


# --- the randomization test of Quantus ----------------------------------------------------------


def compare_with_quantus(trained: Trained, method: str, estimator: str) -> tuple[float, float]:
    """Run the cascading randomization of a CNN with its patterns carried over, by Quantus and by `cascade`.

    Quantus initializes layers as torch does. `cascade` draws normals with the moments of the trained weights, here
    several times; this can close all gates, so maps of zeros are left out.

    Returns:
        The mean rank correlation of maps at the end of the cascade, by Quantus and by `cascade`.
    """
    from quantus.metrics.randomisation.mprt import MPRT

    patterns = trained.patterns(trained.network, trained.training_images)[estimator]
    images, labels = trained.images[:EXPLAINED].float(), trained.labels[:EXPLAINED]

    def explain_func(model: nn.Module, inputs: object, targets: object, **_: object) -> object:
        network = trace(model, torch.as_tensor(inputs)[:2])
        explainer = Explainer(network, patterns, [method])
        return explainer(torch.as_tensor(inputs), torch.as_tensor(targets)).maps[method].numpy()

    metric = MPRT(disable_warnings=True, return_last_correlation=True)
    model = MODELS["CNN"]()
    model.load_state_dict(trained.model.state_dict())
    theirs = metric(
        model=model.eval(),
        x_batch=images.numpy(),
        y_batch=labels.numpy(),
        explain_func=explain_func,
        channel_first=True,
    )
    before = heat(Explainer(trained.network, patterns, [method])(images.double(), labels).maps[method])
    ours = []
    for seed in range(DRAWS):
        *_, (_, last) = cascade(trained.network, torch.Generator().manual_seed(seed))
        after = heat(Explainer(last, patterns, [method])(images.double(), labels).maps[method])
        alive = after.amax((1, 2)) > 0
        ours.append(spearman(before[alive], after[alive]))
    return float(torch.tensor(theirs).mean()), float(torch.cat(ours).mean())
