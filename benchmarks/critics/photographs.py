"""Randomized weights, other classes and backward convergence for EfficientNet-Lite0 and foolbox's photographs."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.convergence import load_model_and_crops
from benchmarks.critics.measures import backward_convergence, singular_ratio
from patterns import Explainer, Network, Observer, choose, solve
from patterns.attribution.baselines import sobel
from patterns.estimation.estimators import required_sums
from patterns.evaluation import cascade, cosine, heat, randomize, spearman, ssim, trained_operators
from ray_jobs.data.packing import pack
from ray_jobs.data.shard_reader import ReaderConfig, ShardReader

SIZE = 160  # pixels
CROPS, BATCH = 120, 20
OTHERS = 4  # other classes per photograph
CONVERGED = 10  # photographs through whose gates random output gradients are propagated
NORMALS = "normal weights"
ESTIMATORS = "two-component", "linear"
BASELINES = "random map", "Sobel edges", "|x|"
PATTERNED = tuple(f"{method}:{e}" for method in ("patternnet", "patternattribution") for e in ESTIMATORS)
PLAIN = "gradient", "gradient-x-input", "guided-backprop"
METHODS = PLAIN + PATTERNED
Weights = dict[str, Tensor]  # by operator
Patterns = dict[str, Weights]  # by estimator
# Three tests that the literature calls the sanity check; they differ in what is randomized.
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
        """Fit the patterns of a network on the crops."""
        observer = Observer(network, lambda op: required_sums(op, ESTIMATORS))
        for batch in self.crops.split(BATCH):
            observer.update(batch)
        moments = observer.moments()
        solutions = {n: solve(op, moments[n], ESTIMATORS).patterns for n, op in network.operators.items()}
        chosen = {estimator: choose(network, solutions, estimator) for estimator in ESTIMATORS}
        return {each: {n: a for n, a in patterns.items() if a is not None} for each, patterns in chosen.items()}

    def maps(self, network: Network, methods: Iterable[str], patterns: Patterns) -> dict[str, Tensor]:
        """Return maps of the photographs for the classes that the trained network predicts."""
        return Explainer(network, None, list(methods), estimators=patterns)(self.photographs, self.targets).maps


def load_setting(folder: Path) -> Setting:
    """Load the model and the photographs, and draw crops."""
    torch.manual_seed(0)
    loaded, crops = load_model_and_crops(folder, SIZE)
    (shard,) = pack(folder / "photographs", folder / "whole")
    batches = ShardReader(str(shard), ReaderConfig(loaded.preprocessing, BATCH, loaded.dtype))
    photographs = torch.cat([batch.images for batch in batches])
    with torch.inference_mode():
        targets = loaded.network.module(photographs).argmax(1)
    return Setting(loaded.network, photographs, targets, crops.draw(CROPS))


def baseline_maps(photographs: Tensor) -> dict[str, Tensor]:
    """Return maps that do not depend on a model."""
    noise = torch.randn(photographs.shape, generator=torch.Generator().manual_seed(0))
    return dict(zip(BASELINES, (noise, sobel(photographs), photographs)))


# --- randomized weights ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """The cascade down to a part of the network.

    Attributes:
        part: The part.
        similarity: SSIM and rank correlation with the map of the trained network, (N,), by variant and method.
        heats: The heat of some photographs, by variant and method.
    """

    part: str
    similarity: dict[tuple[str, str], tuple[Tensor, Tensor]]
    heats: dict[tuple[str, str], Tensor]


def part_of(operator: str) -> str:
    """Return the part that an operator belongs to: its block, such as `blocks.6`, or itself."""
    return ".".join(operator.split(".")[:2]) if operator.startswith("blocks.") else operator


def cascade_stages(network: Network, generator: torch.Generator) -> Iterator[tuple[str, Network]]:
    """Yield the network at the end of each part of the cascade."""
    last: tuple[str, Network] | None = None
    for name, other in cascade(network, generator):
        if last is not None and part_of(last[0]) != part_of(name):
            yield part_of(last[0]), last[1]
        last = name, other
    assert last is not None
    yield part_of(last[0]), last[1]


def compare_heats(maps: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return SSIM and rank correlation of the heats of two maps."""
    one, other = heat(maps), heat(others)
    return ssim(one, other), spearman(one, other)


def measure_randomization(it: Setting, patterns: Patterns, shown: list[int]) -> tuple[dict[str, Tensor], list[Stage]]:
    """Return the maps of the trained network, and the stages of the cascade in all three variants."""
    before = it.maps(it.network, METHODS, patterns)
    found = []
    for name, network in cascade_stages(it.network, torch.Generator().manual_seed(0)):
        after = {
            CARRIED: it.maps(network, VARIANTS[CARRIED], patterns),
            BACKWARD: explain_with_backward_weights(it, network, patterns),
            REFITTED: it.maps(network, VARIANTS[REFITTED], it.patterns(network)),
        }
        pairs = {(variant, method): maps for variant, some in after.items() for method, maps in some.items()}
        similarity = {key: compare_heats(before[key[1]], maps) for key, maps in pairs.items()}
        found.append(Stage(name, similarity, {key: heat(maps)[shown] for key, maps in pairs.items()}))
        print(f"randomized down to {name}", flush=True)
    return before, found


def explain_with_backward_weights(it: Setting, redrawn: Network, patterns: Patterns) -> dict[str, Tensor]:
    """Return PatternAttribution with the w of w⊙a from the randomized network, and all else from the trained one.

    PatternNet uses its patterns as the backward weights, so here it is given w⊙a.
    """
    operators = redrawn.operators
    products = {e: {n: operators[n].weight * a for n, a in of.items()} for e, of in patterns.items()}
    maps = it.maps(it.network, [f"patternnet:{e}" for e in ESTIMATORS], products)
    return {name.replace("patternnet", "patternattribution"): m for name, m in maps.items()}


def compare_with_baselines(
    before: Mapping[str, Tensor], photographs: Tensor
) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Compare the maps of each method with each baseline, and with its own maps of other photographs."""
    others = baseline_maps(photographs)
    return {
        method: {name: compare_heats(maps, other) for name, other in others.items()}
        | {"another photograph's map": compare_heats(maps, maps.roll(1, 0))}
        for method, maps in before.items()
    }


# --- other classes --------------------------------------------------------------------------------


def compare_classes(it: Setting, patterns: Patterns) -> dict[str, dict[str, Tensor]]:
    """Compare the maps of the predicted class with those of other, random classes; scores of shape (N · OTHERS,)."""
    classes = it.network.output_shape[0]
    generator = torch.Generator().manual_seed(0)
    steps = torch.stack([torch.randperm(classes - 1, generator=generator)[:OTHERS] + 1 for _ in it.targets])
    targets = torch.cat([it.targets[:, None], (it.targets[:, None] + steps) % classes], 1)
    maps: dict[str, list[Tensor]] = {}
    for images, classes_of_batch in zip(it.photographs.split(5), targets.split(5)):
        explained = Explainer(it.network, None, METHODS, estimators=patterns)(images, classes_of_batch)
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


# --- backward pass ----------------------------------------------------------------------------------


def measure_backward_convergence(it: Setting, patterns: Patterns) -> dict[str, dict[str, Tensor]]:
    """Return the absolute cosine of two random output gradients at each operator's input, by method."""
    network = it.network
    redrawn = randomize(network, trained_operators(network), torch.Generator().manual_seed(1))
    of_normals = {"": {n: op.weight for n, op in redrawn.operators.items()}}  # used as patterns
    passes = {name: (name, patterns) for name in ("gradient", "deconvnet", "guided-backprop", *PATTERNED)}
    found = {}
    for label, (name, weights) in {**passes, NORMALS: ("patternnet", of_normals)}.items():
        explainer = Explainer(network, weights.get(""), [name], estimators=weights)
        way = backward_convergence(explainer, it.photographs[:CONVERGED], torch.Generator().manual_seed(0))
        found[label] = {operator: values.abs() for operator, values in way.items()}
    return found


def singular_ratios(network: Network, patterns: Patterns) -> dict[str, dict[str, float]]:
    """Return σ₁/σ₂ of w, a, w⊙a and normal numbers, for all but depthwise convolutions, additions and pooling."""
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
    """Return the negative share of the mass of w⊙a, for all operators except additions and pooling."""
    products = [network.operators[n].weight * patterns[n] for n in trained_operators(network)]
    return [float(-p.clamp(max=0).sum() / p.abs().sum()) for p in products]
