"""The study of docs/smooth.md: `python -m benchmarks.smooth [--write docs]`.

Three networks are trained on Fashion-MNIST with each of three seeds. PatternAttribution with each preset is compared
with CP-LRP (`gradient-x-input`), Integrated Gradients and AttnLRP with the γ rule, whose two γ are searched on a grid,
by the area over the degradation curve and the grid pointing game, on test images.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.pages import Cell, Table, make_parser, mean_and_error, save_results
from benchmarks.smooth.attnlrp import rules
from benchmarks.smooth.networks import EPOCHS, NETWORKS, PRODUCTS, TOKENS, separate_tokens
from patterns import Explainer, Network, accumulate, choose, contrast, solve, trace
from patterns.attribution.methods import METHODS
from patterns.evaluation import (
    area_over_curve,
    compute_relevance,
    degrade_stepwise,
    draw_quadruples,
    make_grids,
    pointing_shares,
)
from patterns.operators.operator import Addition
from patterns.tracing.scales import ScaleRules
from ray_jobs.engine.shard_worker import keep_freed_memory
from ray_jobs.studies.datasets import read_digits, to_inputs
from ray_jobs.studies.reproduce import make_epoch
from ray_jobs.studies.small_cnn import train

FASHION = Path("/usr/share/datasets/fashion-mnist")
TRAINED, FITTED, TESTED = 60_000, 2_000, 100
SEEDS = (0, 1, 2)
PATCH, STEPS = 4, 49
GAMMAS = list(product((0.1, 0.25, 100.0), (0.0, 0.01, 0.05, 0.1, 1.0)))  # convolutions, linear: as in LXT's ViT example
ESTIMATORS = "linear,two-component,two-component-own-mean"
PRESETS = ("paper", "linear", "own-mean", "class-specific")
SOFT = "patternattribution-soft-products"  # the factor of a product is a soft gate
OURS = tuple(f"patternattribution:{name}" for name in PRESETS)
# Presets that are also measured with the pattern w / wᵀw of additions, (½, ½) for a sum of two. The pattern (1, 1)
# gives the same map times a power of two, because every path through these networks meets all of their additions.
EQUAL = {preset: f"{preset}, additions in equal parts" for preset in ("own-mean", "class-specific")}
APART = "patternattribution:own-mean, tokens apart"  # class and patch tokens have patterns of their own
OTHERS = "gradient-x-input", "integrated-gradients"
BEST = "AttnLRP, best γ"
ACCURACIES = {"network": "", "seed": "", "accuracy": "{:.3f}", "negative scores in grids": "{:.2f}"}
MEASURES = "degradation", "pointing", "pointing, contrast"

Maps = Mapping[str, Tensor]  # relevance (N, H, W) by method


@dataclass(frozen=True)
class Subject:
    """A trained network.

    Attributes:
        model: The module.
        network: The traced network.
        accuracy: The share of 10,000 test images that it classifies correctly.
        methods: The methods that are measured.
        explainer: Makes the maps of the methods of `patterns`.
        apart: Makes those with patterns of the class token and of patch tokens apart. None: they are not measured.
        top_shares: By addition, the share of Σ‖y‖² that the tokens with the largest norms hold.
    """

    model: nn.Module
    network: Network
    accuracy: float
    methods: Sequence[str]
    explainer: Explainer
    apart: Explainer | None
    top_shares: dict[str, float]


def read_data(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the images and labels of the training and test data."""
    return {"train": read_digits(folder, "train", TRAINED), "test": read_digits(folder, "t10k")}


def name_methods(network: str) -> list[str]:
    """Return the names of all methods that are measured on a network."""
    equal = [f"patternattribution:{name}" for name in EQUAL.values()]
    soft = [f"{SOFT}:{preset}" for preset in PRESETS] if network in PRODUCTS else []
    apart = [APART] if network in TOKENS else []
    return [*OTHERS, *OURS, *equal, *soft, *apart, *(name_gammas(*gammas) for gammas in GAMMAS)]


def name_gammas(convolution: float, linear: float) -> str:
    """Return the name of AttnLRP with a γ of convolutions and one of linear layers."""
    return f"AttnLRP {convolution:g} {linear:g}"


def prepare(
    name: str, seed: int, data: Mapping[str, tuple[np.ndarray, np.ndarray]], out: Path, methods: Sequence[str]
) -> Subject:
    """Return a network, trained or with the weights of an earlier call, and its patterns for some methods."""
    file = out / f"{name}-{seed}.safetensors"
    if not file.exists():
        batches = partial(make_epoch, *data["train"], torch.Generator().manual_seed(seed))
        trained = train(batches, seed, EPOCHS[name], partial(print, f"{name} {seed}", flush=True), NETWORKS[name])
        save_file(trained.state_dict(), file)
    model = NETWORKS[name]()
    model.load_state_dict(load_file(file))
    model.eval().requires_grad_(False)
    images, labels = data["test"]
    with torch.inference_mode():
        scores = torch.cat([model(part) for part in to_inputs(images).split(500)])
    accuracy = float((scores.argmax(1) == torch.from_numpy(labels.astype(np.int64))).float().mean())
    soft = replace(METHODS["patternattribution"].backward, scales=ScaleRules("pass", "multiply"))  # type: ignore[type-var]
    METHODS[SOFT] = replace(METHODS["patternattribution"], backward=soft)
    fitted = to_inputs(data["train"][0][:FITTED])
    network = trace(model, fitted[:2])
    explainer, top_shares = fit(network, fitted, [m for m in methods if m != APART and not m.startswith("AttnLRP")])
    apart = None
    if APART in methods:
        apart, _ = fit(trace(separate_tokens(model), fitted[:2]), fitted, ["patternattribution:own-mean"])
    return Subject(model, network, accuracy, methods, explainer, apart, top_shares)


def fit(network: Network, images: Tensor, methods: Sequence[str]) -> tuple[Explainer, dict[str, float]]:
    """Return an explainer with fitted patterns of each preset, and the share of the top tokens of each addition."""
    moments = accumulate(network, images.split(100))
    solutions = {name: solve(op, moments[name], ESTIMATORS) for name, op in network.operators.items()}
    solved = {name: solution.patterns for name, solution in solutions.items()}
    presets = {preset: choose(network, solved, preset) for preset in PRESETS}
    for preset, name in EQUAL.items():
        presets[name] = {**presets[preset], **share_equally(network)}
    top_shares = {n: solution.top_share for n, solution in solutions.items() if solution.top_share is not None}
    return Explainer(network, None, methods, estimators=presets), top_shares


def share_equally(network: Network) -> dict[str, Tensor]:
    """Return patterns of a network's additions that give each term of a sum the same share."""
    additions = {n: op.weight for n, op in network.operators.items() if isinstance(op.operator_type, Addition)}
    return {name: weight / weight.square().sum(1, keepdim=True) for name, weight in additions.items()}


def explain(subject: Subject, images: Tensor, target: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return the relevance of each pixel for a weighted sum of the scores, (N, 28, 28), by method.

    Args:
        subject: The network.
        images: The images.
        target: Returns the weights of the scores.
    """
    maps = subject.explainer(images, target).maps
    found = {method: compute_relevance(method, each) for method, each in maps.items()}
    if subject.apart is not None:
        (method, each), *_ = subject.apart(images, target).maps.items()
        found[APART] = compute_relevance(method, each)
    for convolution, linear in GAMMAS:
        if name_gammas(convolution, linear) not in subject.methods:
            continue
        with rules(constant_factors=True, attention=True, convolution=convolution, linear=linear):
            x = images.clone().requires_grad_()
            scores = subject.model(x)
            (gradient,) = torch.autograd.grad((scores * target(scores.detach())).sum(), x)
        found[name_gammas(convolution, linear)] = (images * gradient).sum(1).nan_to_num()
    return found


def select(scores: Tensor, classes: Tensor) -> Tensor:
    """Return the weights of the scores that select a class of each image."""
    return F.one_hot(classes, scores.shape[1]).to(scores)


def degrade(subject: Subject, images: Tensor, maps: Maps) -> dict[str, list[float]]:
    """Return the area over the degradation curve of each image by method; patches become black."""
    with torch.inference_mode():
        probability, prediction = subject.model(images).softmax(1).max(1)
        found, black = {}, torch.full_like(images, -1.0)
        for method, relevance in maps.items():
            curve = [probability[:, None]]
            for degraded in degrade_stepwise(images, black, relevance, PATCH, STEPS):
                scores = subject.model(degraded.flatten(0, 1)).softmax(1).unflatten(0, degraded.shape[:2])
                curve.append(scores.take_along_dim(prediction[:, None, None], 2)[..., 0])
            found[method] = area_over_curve(torch.cat(curve, 1).double()).tolist()
    return found


def point(
    subject: Subject, images: Tensor, labels: Tensor, start: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, list[float]]:
    """Return the share of positive relevance in the right quarter, for each quarter of each grid, by method.

    Args:
        subject: The network.
        images: Images of which grids are made.
        labels: Their classes.
        start: Returns the weights of the scores for some scores and classes.
    """
    small = F.interpolate(images, scale_factor=0.5, mode="bilinear", antialias=True)
    found: dict[str, list[float]] = {}
    for four in draw_quadruples(labels, len(images) // 2):
        grid = make_grids(small[four][None]).expand(4, -1, -1, -1)
        maps = explain(subject, grid, lambda scores, classes=labels[four]: start(scores, classes))  # type: ignore[misc]
        for method, relevance in maps.items():
            found.setdefault(method, []).extend(pointing_shares(relevance, torch.arange(4)).tolist())
    return found


def share_of_negative_scores(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """Return how often a class's score in a grid is negative, so that PatternAttribution divides a negative number."""
    inputs, classes = select_right(model, images, labels)
    small = F.interpolate(inputs, scale_factor=0.5, mode="bilinear", antialias=True)
    quadruples = draw_quadruples(classes, len(inputs) // 2)
    with torch.inference_mode():
        scores = model(make_grids(small[quadruples])).gather(1, classes[quadruples])
    return float((scores < 0).float().mean())


def select_right(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the first TESTED images that a network classifies correctly, as its inputs, and their classes."""
    inputs, classes = to_inputs(images), torch.from_numpy(labels.astype(np.int64))
    with torch.inference_mode():
        right = (model(inputs).argmax(1) == classes).nonzero()[:TESTED, 0]
    return inputs[right], classes[right]


def measure(subject: Subject, images: np.ndarray, labels: np.ndarray) -> dict[str, dict[str, list[float]]]:
    """Return the values of each measure and method on images that the network classifies correctly."""
    inputs, classes = select_right(subject.model, images, labels)
    maps: dict[str, list[Tensor]] = {}
    for part, chosen in zip(inputs.split(25), classes.split(25)):
        for method, relevance in explain(subject, part, partial(select, classes=chosen)).items():
            maps.setdefault(method, []).append(relevance)
    whole = {method: torch.cat(parts) for method, parts in maps.items()}
    return {
        "degradation": degrade(subject, inputs, whole),
        "pointing": point(subject, inputs, classes, select),
        "pointing, contrast": point(subject, inputs, classes, contrast),
    }


def study(name: str, seed: int, data: Mapping[str, tuple[np.ndarray, np.ndarray]], out: Path) -> dict[str, Any]:
    """Return the accuracy, the values and the outliers of a network.

    Methods whose values are in an earlier call's file are not measured again.
    """
    file = out / f"{name}-{seed}.json"
    found: dict[str, Any] = {"measured": {measure: {} for measure in MEASURES}}
    if file.exists():
        found = json.loads(file.read_text())
    known = found["measured"][MEASURES[0]]
    if missing := [method for method in name_methods(name) if method not in known]:
        subject = prepare(name, seed, data, out, missing)
        images, labels = data["test"]
        found |= {
            "accuracy": subject.accuracy,
            "negative": share_of_negative_scores(subject.model, images[:500], labels[:500]),
            "outliers": subject.top_shares,
        }
        for measured, values in measure(subject, images[:500], labels[:500]).items():
            found["measured"][measured] |= values
        file.write_text(json.dumps(found))
    return found


def summarize(runs: Sequence[Mapping[str, Mapping[str, list[float]]]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Return the mean over the seeds with its standard error, by measure and method.

    The best γ is chosen for each measure by the mean over the seeds, on the same images: an upper limit.
    """
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name in runs[0]:
        means = {method: [float(np.mean(run[name][method])) for run in runs] for method in runs[0][name]}
        grid = {method: values for method, values in means.items() if method.startswith("AttnLRP")}
        best = max(grid, key=lambda method: float(np.mean(grid[method])))
        worst = min(grid, key=lambda method: float(np.mean(grid[method])))
        kept = {method: values for method, values in means.items() if method not in grid}
        kept |= {f"{BEST}": grid[best], "AttnLRP, worst γ": grid[worst]}
        found[name] = {method: mean_and_error(values) for method, values in kept.items()}
        print(f"  {name}: best γ {best}, worst {worst}", flush=True)
    return found


def tabulate(found: Mapping[str, Mapping[str, Mapping[str, tuple[float, float]]]]) -> Table:
    """Return a row for each method, with the measures of each network."""
    methods = list(dict.fromkeys(m for by_measure in found.values() for m in by_measure["degradation"]))
    columns = {f"{network}: {name} ↑": "{:.3f} ± {:.3f}" for network in found for name in MEASURES}
    rows: list[list[Cell]] = []
    for method in methods:
        cells: list[Cell] = [method]
        for by_measure in found.values():
            cells += [by_measure[name].get(method, "–") for name in MEASURES]
        rows.append(cells)
    return Table({"method": "", **columns}, rows)


def main() -> None:
    """Run the study, and print the tables or write them to the docs."""
    parser = make_parser("benchmarks.smooth", __doc__)
    parser.add_argument("--fashion", type=Path, default=FASHION, help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--out", type=Path, help="folder of weights and values, which are used if they are there")
    parser.add_argument("--networks", nargs="+", default=[*NETWORKS], choices=[*NETWORKS])
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    args = parser.parse_args()
    keep_freed_memory()
    data = read_data(args.fashion)
    accuracies: list[list[Cell]] = []
    outliers: list[list[Cell]] = []
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        for name in args.networks:
            runs = []
            for seed in args.seeds:
                one = study(name, seed, data, out)
                print(f"{name}, seed {seed}: accuracy {one['accuracy']:.3f}", flush=True)
                accuracies.append([name, str(seed), one["accuracy"], one["negative"]])
                if seed == args.seeds[0]:
                    outliers += [[name, operator, share] for operator, share in one["outliers"].items()]
                runs.append(one["measured"])
            found[name] = summarize(runs)
    tables = {
        "smooth": tabulate(found),
        "smooth-accuracies": Table(ACCURACIES, accuracies),
        "smooth-outliers": Table({"network": "", "addition": "", "share of Σy²": "{:.3f}"}, outliers),
    }
    for name, table in tables.items():
        print(table.render(), end="\n\n")
        if args.write:
            save_results(args.write, name, table)


if __name__ == "__main__":
    main()
