"""EfficientNet-Lite0 and foolbox's photographs of ImageNet: weights drawn anew, other classes, the way back."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.convergence import prepared
from benchmarks.critics.measures import (
    backward_convergence,
    cascade,
    cosine,
    heat,
    learned,
    randomised,
    singular_ratio,
    spearman,
    ssim,
)
from patterns import Explainer, Network, Observer, choose, solve
from patterns.attribution.baselines import sobel
from patterns.estimation.estimators import wanted
from ray_jobs.data.packing import pack
from ray_jobs.data.shard_reader import ShardReader

SIZE = 160  # pixels
CROPS, BATCH = 120, 20
OTHERS = 4  # classes beside the predicted one
CONVERGED = 10  # photographs whose gates random starts go back through
NORMALS = "normal weights"
ESTIMATORS = "default", "linear"
BASELINES = "random map", "Sobel edges", "|x|"
PATTERNED = tuple(f"{method}:{e}" for method in ("patternnet", "patternattribution") for e in ESTIMATORS)
PLAIN = "gradient", "gradient-x-input", "guided-backprop"
METHODS = PLAIN + PATTERNED
Weights = dict[str, Tensor]  # by operator
Patterns = dict[str, Weights]  # by estimator
# What is drawn anew, and what is left as it was: the literature does all three and calls each the sanity check.
CARRIED, BACKWARD, REFITTED = "patterns carried over", "backward weights only", "patterns refitted"
VARIANTS = {
    CARRIED: METHODS,
    BACKWARD: tuple(name for name in METHODS if name.startswith("patternattribution")),
    REFITTED: PATTERNED,
}


@dataclass(frozen=True)
class Setting:
    """A network, the photographs (N, 3, SIZE, SIZE), the classes it predicts, and crops to fit patterns on."""

    network: Network
    photographs: Tensor
    targets: Tensor
    crops: Tensor

    def patterns(self, network: Network) -> Patterns:
        """Of a network over the crops."""
        observer = Observer(network, lambda op: wanted(op, ESTIMATORS))
        for batch in self.crops.split(BATCH):
            observer.update(batch)
        moments = observer.moments()
        solutions = {n: solve(op, moments[n], ESTIMATORS).patterns for n, op in network.operators.items()}
        return {estimator: choose(network, solutions, estimator) for estimator in ESTIMATORS}

    def maps(self, network: Network, methods: Iterable[str], patterns: Patterns) -> dict[str, Tensor]:
        """Of the photographs, for the classes that the trained network predicts."""
        return Explainer(network, None, list(methods), estimators=patterns)(self.photographs, self.targets).maps


def setting(folder: Path) -> Setting:
    torch.manual_seed(0)
    loaded, crops = prepared(folder, SIZE)
    (shard,) = pack(folder / "photographs", folder / "whole")
    batches = ShardReader(str(shard), loaded.preprocessing, BATCH, loaded.dtype)
    photographs = torch.cat([batch.images for batch in batches])
    with torch.inference_mode():
        targets = loaded.network.module(photographs).argmax(1)
    return Setting(loaded.network, photographs, targets, crops.draw(CROPS))


def baselines(photographs: Tensor) -> dict[str, Tensor]:
    """Maps that know nothing of any model."""
    noise = torch.randn(photographs.shape, generator=torch.Generator().manual_seed(0))
    return dict(zip(BASELINES, (noise, sobel(photographs), photographs)))


# --- weights drawn anew ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """The cascade down to a part of the network. likeness: by variant and method, SSIM and rank correlation (N,) with
    the map of the trained network. heats: of some photographs.
    """

    part: str
    likeness: dict[tuple[str, str], tuple[Tensor, Tensor]]
    heats: dict[tuple[str, str], Tensor]


def part(operator: str) -> str:
    """`blocks.6` for all operators of that block; else the operator."""
    return ".".join(operator.split(".")[:2]) if operator.startswith("blocks.") else operator


def stages(network: Network, generator: torch.Generator) -> Iterator[tuple[str, Network]]:
    """The cascade, at the end of each part."""
    last: tuple[str, Network] | None = None
    for name, other in cascade(network, generator):
        if last is not None and part(last[0]) != part(name):
            yield part(last[0]), last[1]
        last = name, other
    assert last is not None
    yield part(last[0]), last[1]


def alike(maps: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM and rank correlation of two maps' heats."""
    one, other = heat(maps), heat(others)
    return ssim(one, other), spearman(one, other)


def randomisation(it: Setting, patterns: Patterns, shown: list[int]) -> tuple[dict[str, Tensor], list[Stage]]:
    """The maps of the trained network, and the stages of the cascade in all three variants."""
    before = it.maps(it.network, METHODS, patterns)
    found = []
    for name, network in stages(it.network, torch.Generator().manual_seed(0)):
        after = {
            CARRIED: it.maps(network, VARIANTS[CARRIED], patterns),
            BACKWARD: backward_only(it, network, patterns),
            REFITTED: it.maps(network, VARIANTS[REFITTED], it.patterns(network)),
        }
        pairs = {(variant, method): maps for variant, some in after.items() for method, maps in some.items()}
        likeness = {key: alike(before[key[1]], maps) for key, maps in pairs.items()}
        found.append(Stage(name, likeness, {key: heat(maps)[shown] for key, maps in pairs.items()}))
        print(f"randomised down to {name}", flush=True)
    return before, found


def backward_only(it: Setting, redrawn: Network, patterns: Patterns) -> dict[str, Tensor]:
    """PatternAttribution with the w of w⊙a from the redrawn network and all else, the forward pass too, as trained.

    A signal's pass takes any weights as they are, so it takes w⊙a.
    """
    operators = redrawn.operators
    products = {e: {n: operators[n].weight * a for n, a in of.items()} for e, of in patterns.items()}
    maps = it.maps(it.network, [f"patternnet:{e}" for e in ESTIMATORS], products)
    return {name.replace("patternnet", "patternattribution"): m for name, m in maps.items()}


def baseline_likeness(before: Mapping[str, Tensor], photographs: Tensor) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """How like each method's maps are to each baseline, and to its own maps of other photographs."""
    others = baselines(photographs)
    return {
        method: {name: alike(maps, other) for name, other in others.items()}
        | {"another photograph's map": alike(maps, maps.roll(1, 0))}
        for method, maps in before.items()
    }


# --- another class --------------------------------------------------------------------------------


def other_classes(it: Setting, patterns: Patterns) -> dict[str, dict[str, Tensor]]:
    """How like the maps of the predicted class and of other classes, drawn at random, are: (N · OTHERS,) each."""
    classes = it.network.output_shape[0]
    generator = torch.Generator().manual_seed(0)
    steps = torch.stack([torch.randperm(classes - 1, generator=generator)[:OTHERS] + 1 for _ in it.targets])
    targets = torch.cat([it.targets[:, None], (it.targets[:, None] + steps) % classes], 1)
    maps: dict[str, list[Tensor]] = {}
    for images, wanted_ in zip(it.photographs.split(5), targets.split(5)):
        explained = Explainer(it.network, None, METHODS, estimators=patterns)(images, wanted_)
        for name, several in explained.maps.items():
            maps.setdefault(name, []).append(several)
    found = {}
    for name, parts in maps.items():
        both = torch.cat(parts)
        pairs = [(both[:, 0], both[:, k]) for k in range(1, OTHERS + 1)]
        found[name] = {
            "SSIM": torch.cat([ssim(heat(a), heat(b)) for a, b in pairs]),
            "rank correlation": torch.cat([spearman(heat(a), heat(b)) for a, b in pairs]),
            "absolute cosine": torch.cat([cosine(a, b).abs() for a, b in pairs]),
        }
    return found


# --- the way back ---------------------------------------------------------------------------------


def ways_back(it: Setting, patterns: Patterns) -> dict[str, dict[str, Tensor]]:
    """By method, the absolute cosine of two random starts at each operator's input: see `backward_convergence`."""
    network = it.network
    redrawn = randomised(network, learned(network), torch.Generator().manual_seed(1))
    of_normals = {"": {n: op.weight for n, op in redrawn.operators.items()}}  # a signal's pass takes them as they are
    passes = {name: (name, patterns) for name in ("gradient", "deconvnet", "guided-backprop", *PATTERNED)}
    found = {}
    for label, (name, weights) in {**passes, NORMALS: ("patternnet", of_normals)}.items():
        explainer = Explainer(network, weights.get(""), [name], estimators=weights)
        way = backward_convergence(explainer, it.photographs[:CONVERGED], torch.Generator().manual_seed(0))
        found[label] = {operator: values.abs() for operator, values in way.items()}
    return found


def ratios(network: Network, patterns: Patterns) -> dict[str, dict[str, float]]:
    """σ₁/σ₂ of each operator that is no depthwise convolution, sum or pooling: of w, a, w⊙a and of normal numbers."""
    found: dict[str, dict[str, float]] = {"normal numbers": {}, "w": {}}
    for name, op in network.operators.items():
        if op.groups == op.neurons:
            continue
        noise = torch.randn(op.weight.shape, generator=torch.Generator().manual_seed(0))
        found["w"][name], found["normal numbers"][name] = singular_ratio(op, op.weight), singular_ratio(op, noise)
        for estimator, of in patterns.items():
            for label, weight in ((f"a, {estimator}", of[name]), (f"w⊙a, {estimator}", op.weight * of[name])):
                found.setdefault(label, {})[name] = singular_ratio(op, weight)
    return found


def negative_shares(network: Network, patterns: Weights) -> list[float]:
    """Of each operator but sums and pooling, the share of w⊙a's mass that is below 0."""
    products = [network.operators[n].weight * patterns[n] for n in learned(network)]
    return [float(-p.clamp(max=0).sum() / p.abs().sum()) for p in products]
