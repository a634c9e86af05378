"""Images of which it is known what made them: suppressors, a constant shift, and an independent randomisation test.

After XAI-TRIS (Clark et al. 2023, arXiv 2306.12816): 8×8 pixels, a T and an L of four pixels at fixed places, on a
background whose pixels vary together, so that those beside a shape tell what to subtract in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.critics.measures import cascade, earth_movers_accuracy, heat, shifted, spearman
from patterns import Explainer, Network, accumulate, choose, solve, trace
from patterns.attribution.baselines import sobel
from ray_jobs.jobs.explain.map_statistics import summaries

SIDE = 8
SMOOTH = 1.5  # pixels, of the background's Gaussian
PIXEL_NOISE = 0.1
SCENARIOS = {"linear": 0.35, "multiplicative": 0.85, "XOR": 0.6}  # the shapes' strength
TRAINED, TESTED, EXPLAINED, SEEDS = 6000, 1000, 24, 3
SHIFT = 3.0  # times the images' standard deviation
DRAWS = 5  # of a cascade, beside another library's
EPOCHS, BATCH = 25, 64
ESTIMATORS = ("default", "linear", "multivariate", "two-component-own-mean")
JUDGED = (
    "gradient", "gradient-x-input", "guided-backprop", "integrated-gradients", "smoothgrad",
    "patternnet:default", "patternnet:linear", "patternnet:multivariate",
    "patternattribution:default", "patternattribution:linear", "patternattribution:two-component-own-mean",
    "patternattribution:multivariate",
)  # fmt: skip
BASELINES = ("random map", "Sobel edges", "|x|")
SHIFTED = (
    "gradient", "gradient-x-input", "integrated-gradients",
    *(f"{method}:{e}" for method in ("patternnet", "patternattribution") for e in ESTIMATORS),
)  # fmt: skip
Patterns = dict[str, dict[str, Tensor]]  # by estimator, by operator


def shape(rows: str, top: int, left: int) -> Tensor:
    """A shape of 0 and 1 in an image."""
    image = torch.zeros(SIDE, SIDE, dtype=torch.float64)
    for y, row in enumerate(rows.split()):
        for x, pixel in enumerate(row):
            image[top + y, left + x] = float(pixel == "#")
    return image


T, L = shape("#. ## #.", 1, 1), shape("#. #. ##", 4, 5)
MASK = (T + L) > 0  # where the classes differ: a shape that is missing tells as much as one that is there


def background(count: int, generator: torch.Generator) -> Tensor:
    """Normal noise, smoothed, variance 1 at each pixel: (count, SIDE, SIDE)."""
    places = torch.arange(SIDE, dtype=torch.float64)
    smooth = torch.exp(-((places[:, None] - places) ** 2) / (2 * SMOOTH**2))
    smooth = smooth / smooth.norm(dim=1, keepdim=True)
    return smooth @ torch.randn(count, SIDE, SIDE, generator=generator, dtype=torch.float64) @ smooth.T


def drawn(scenario: str, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (count, 1, SIDE, SIDE), float64, and their classes (count,)."""
    strength, noise = SCENARIOS[scenario], background(count, generator)
    labels = torch.randint(2, (count,), generator=generator)
    one = labels[:, None, None].double()
    if scenario == "linear":  # a T or an L on top
        x = strength * (T * (1 - one) + L * one) + (1 - strength) * noise
    elif scenario == "multiplicative":  # a T or an L in which the background is faint
        x = (1 - strength * (T * (1 - one) + L * one)) * noise
    else:  # both, of one sign in one class, of opposite signs in the other
        sign = 1 - 2 * torch.randint(2, (count, 1, 1), generator=generator).double()
        x = strength * sign * (T + (1 - 2 * one) * L) + (1 - strength) * noise
    x = x + PIXEL_NOISE * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x[:, None], labels


def perceptron() -> nn.Module:
    layers = nn.Linear(SIDE * SIDE, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)
    return nn.Sequential(nn.Flatten(), *layers)


def convolutional() -> nn.Module:
    seen = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    decided = nn.Flatten(), nn.Linear(16 * (SIDE // 2) ** 2, 32), nn.ReLU(), nn.Linear(32, 2)
    return nn.Sequential(*seen, *decided)


MODELS = {"MLP": perceptron, "CNN": convolutional}


@dataclass(frozen=True)
class Trained:
    """A model of a scenario: its network, what it was trained on, and test images that it gets right."""

    scenario: str
    model: nn.Module
    network: Network
    seen: Tensor
    accuracy: float
    images: Tensor
    labels: Tensor

    def patterns(self, network: Network, images: Tensor) -> Patterns:
        """Of a network over some images, by estimator."""
        moments = accumulate(network, images.split(1000))
        solutions = {n: solve(op, moments[n], ESTIMATORS).patterns for n, op in network.operators.items()}
        return {estimator: choose(network, solutions, estimator) for estimator in ESTIMATORS}


def train(scenario: str, kind: str, seed: int) -> Trained:
    """Train a model by Adam with a step that falls to 0 as a cosine; all that follows is in float64."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    x, labels = drawn(scenario, TRAINED, generator)
    model, fed = MODELS[kind](), x.float()
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, EPOCHS)
    for _ in range(EPOCHS):
        for batch in torch.randperm(TRAINED, generator=generator).split(BATCH):
            optimiser.zero_grad()
            F.cross_entropy(model(fed[batch]), labels[batch]).backward()
            optimiser.step()
        schedule.step()
    model.double().eval().requires_grad_(False)
    others, truth = drawn(scenario, TESTED, generator)
    right = model(others).argmax(1) == truth
    accuracy = float(right.double().mean())
    return Trained(scenario, model, trace(model, x[:2]), x, accuracy, others[right], truth[right])


# --- suppressors ----------------------------------------------------------------------------------


def explained(trained: Trained, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The map of each method and baseline, (N, 1, SIDE, SIDE)."""
    patterns = trained.patterns(trained.network, trained.seen)
    explainer = Explainer(trained.network, None, JUDGED, estimators=patterns)
    maps = explainer(images, labels, seeds=range(len(images))).maps
    return {**maps, **baselines(images)}


def baselines(images: Tensor) -> dict[str, Tensor]:
    """Maps that know nothing of any model."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return dict(zip(BASELINES, (noise, sobel(images), images)))


def judged(name: str, maps: Tensor) -> dict[str, Tensor]:
    """The scores of some maps against the mask, (N,) each: pointing game and mass as the jobs' tables have them."""
    boxes = [[(x, y, x + 1, y + 1) for y, x in MASK.nonzero().tolist()]] * len(maps)
    kind = "signal:identity" if name in BASELINES else name.partition(":")[0]
    rows = summaries(kind, maps, boxes)
    return {
        "earth mover's accuracy": earth_movers_accuracy(heat(maps), MASK),
        "mass inside": torch.tensor([float(str(row[f"{kind}_inside"])) for row in rows]),
        "pointing game": torch.tensor([float(bool(row[f"{kind}_hit"])) for row in rows]),
    }


# --- a constant shift -----------------------------------------------------------------------------


def shift_errors(trained: Trained) -> dict[str, tuple[float, float]]:
    """How far each method's maps move when a constant image is added to all inputs and the first bias absorbs it.

    The largest |difference| as a share of the largest |value|, the worst of some images: with the patterns of the
    network before, and with patterns fitted on the shifted images.
    """
    network, images, labels = trained.network, trained.images[:EXPLAINED], trained.labels[:EXPLAINED]
    noise = torch.randn(network.input_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shift = SHIFT * trained.seen.std() * noise
    moved = shifted(network, next(iter(network.operators)), shift)
    carried = trained.patterns(network, trained.seen)
    refitted = trained.patterns(moved, trained.seen + shift)

    def maps(of: Network, patterns: Patterns, x: Tensor) -> dict[str, Tensor]:
        return {**Explainer(of, None, SHIFTED, estimators=patterns)(x, labels).maps, **baselines(x)}

    before = maps(network, carried, images)
    after = [maps(moved, patterns, images + shift) for patterns in (carried, refitted)]

    def error(name: str, found: Mapping[str, Tensor]) -> float:
        size = before[name].abs().amax((1, 2, 3))
        return float(((found[name] - before[name]).abs().amax((1, 2, 3)) / size).max())

    return {name: (error(name, after[0]), error(name, after[1])) for name in before}


# --- another library's randomisation test ---------------------------------------------------------


def randomisation_twice(trained: Trained, method: str, estimator: str) -> tuple[float, float]:
    """The cascading randomisation of a CNN with its patterns carried over, by Quantus and by `measures`.

    Each gives the mean rank correlation of maps at its end. They draw differently: Quantus as torch initialises a
    layer, this project normals with the moments of what was there, here several times. That may shut all gates: maps
    of zeros are left out.
    """
    from quantus.metrics.randomisation.mprt import MPRT

    patterns = trained.patterns(trained.network, trained.seen)[estimator]
    images, labels = trained.images[:EXPLAINED].float(), trained.labels[:EXPLAINED]

    def explain(model: nn.Module, inputs: object, targets: object, **_: object) -> object:
        network = trace(model, torch.as_tensor(inputs)[:2])
        explainer = Explainer(network, patterns, [method])
        return explainer(torch.as_tensor(inputs), torch.as_tensor(targets)).maps[method].numpy()

    metric = MPRT(disable_warnings=True, return_last_correlation=True)
    model = MODELS["CNN"]()
    model.load_state_dict(trained.model.state_dict())
    theirs = metric(
        model=model.eval(), x_batch=images.numpy(), y_batch=labels.numpy(), explain_func=explain, channel_first=True
    )
    before = heat(Explainer(trained.network, patterns, [method])(images.double(), labels).maps[method])
    ours = []
    for seed in range(DRAWS):
        *_, (_, last) = cascade(trained.network, torch.Generator().manual_seed(seed))
        after = heat(Explainer(last, patterns, [method])(images.double(), labels).maps[method])
        alive = after.amax((1, 2)) > 0
        ours.append(spearman(before[alive], after[alive]))
    return float(torch.tensor(theirs).mean()), float(torch.cat(ours).mean())
