"""The effect of the choice of patterns on the maps: `python -m benchmarks.defaults [--write docs]`.

EfficientNet-Lite0 with its ImageNet weights is fitted on random crops of foolbox's photographs of ImageNet and explains
the photographs. The results are a figure of the maps, and the fall of the target's probability when the patches that a
map marks are replaced (the image degradation of Kindermans et al. 2018, §5, on 20 photographs).
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from zennit.image import get_cmap

from benchmarks.pages import Cell, Table, make_parser, save_results
from patterns import Explainer, Gate, Network, Observer, accumulate, choose, solve
from patterns.attribution.rendering import COLOR_MAP, center_values
from patterns.estimation.estimators import required_sums
from patterns.moments.moments import Moments
from patterns.operators.operator import Addition, Operator
from ray_jobs.config import ModelConfig
from ray_jobs.data.packing import pack
from ray_jobs.data.shard_reader import ReaderConfig, ShardReader
from ray_jobs.figures.drawing import save_figure
from ray_jobs.models import loading
from ray_jobs.models.loading import LoadedModel
from ray_jobs.studies.demo import CROPS, SPEC, prepare_photographs, prepare_weights

PATCH = 16
REPLACED = (0, 1, 2, 4, 8, 16, 32, 64)  # numbers of replaced patches, of 196
DRAWN = 6  # photographs in the figure
METHODS = ("patternnet", "patternattribution")
Patterns = dict[str, Tensor | None]


@dataclass(frozen=True)
class Variant:
    """A way to choose patterns: its name, a description, and the function from the moments to the patterns."""

    name: str
    description: str
    patterns: Callable[["Fitted"], Patterns]


@dataclass(frozen=True)
class Fitted:
    """A network, its moments, and the moments that it has if every operator without a gate gets that of a ReLU."""

    network: Network
    moments: dict[str, Moments]
    as_if_gated: dict[str, Moments]

    def solve(self, choice: str) -> Patterns:
        """Return the patterns of a choice."""
        solutions = {n: solve(op, self.moments[n], choice).patterns for n, op in self.network.operators.items()}
        return choose(self.network, solutions, choice)


def plain_additions(fitted: Fitted) -> Patterns:
    """Return the default, except that additions pass the whole signal to each of their inputs."""
    plain = {n: op.weight for n, op in fitted.network.operators.items() if isinstance(op.operator_type, Addition)}
    return fitted.solve("two-component") | plain


def all_gated(fitted: Fitted) -> Patterns:
    """Return the default, except that hidden operators without a gate use a₊ for z > 0."""
    patterns = fitted.solve("two-component")
    *hidden, _ = fitted.network.operators.values()
    for operator in hidden:
        if operator.gate is None and not isinstance(operator.operator_type, Addition):
            gated = with_gate(operator)
            patterns[operator.name] = solve(gated, fitted.as_if_gated[operator.name]).patterns["positive"]
    return patterns


VARIANTS = (
    Variant("default", "a₊ if a gate follows, else linear; additions are neurons", lambda f: f.solve("two-component")),
    Variant("linear", "linear everywhere", lambda f: f.solve("linear")),
    Variant("own mean", "a₊ with the gate's own mean of y", lambda f: f.solve("two-component-own-mean")),
    Variant("multivariate", "all neurons of an operator at once", lambda f: f.solve("multivariate")),
    Variant("plain additions", "the default, but an addition's pattern is (1, 1)", plain_additions),
    Variant("gated bottlenecks", "the default, but a₊ also if no gate follows", all_gated),
    Variant("filter", "w / wᵀw: no data", lambda f: f.solve("filter")),
)


def with_gate(operator: Operator) -> Operator:
    """Return the operator as if a ReLU followed it."""
    shapes = operator.input_shapes, operator.output_shape
    gate = operator.gate or Gate(0.0, float("inf"))
    return Operator(
        operator.name, operator.operator_type, operator.weight, operator.bias, *shapes, operator.source, gate
    )


def fit(loaded: LoadedModel, crops: Sequence[str]) -> Fitted:
    """Accumulate all moments of a model over some shards."""
    network = loaded.network
    moments = accumulate(network, images(loaded, crops))
    observer = Observer(replace(network, module=network.rewrite(with_gate)), lambda op: required_sums(op, "default"))
    for batch in images(loaded, crops):
        observer.update(batch)
    return Fitted(network, moments, observer.moments())


def images(loaded: LoadedModel, shards: Sequence[str]) -> Iterator[Tensor]:
    """Yield the batches of some shards."""
    for shard in shards:
        yield from (batch.images for batch in ShardReader(shard, ReaderConfig(loaded.preprocessing, 20, loaded.dtype)))


def remaining_probability(network: Network, photographs: Tensor, maps: Tensor) -> Tensor:
    """Return the target's probability with some patches replaced, as a share of the original, (N, len(REPLACED)).

    The patches with the largest sum of a map (N, C, H, W) are replaced first, by the mean of the photograph.
    """
    heat = F.avg_pool2d(maps.sum(1, keepdim=True), PATCH).flatten(1)
    order = heat.argsort(1, descending=True)
    side = photographs.shape[-1] // PATCH
    mean = photographs.mean((2, 3), keepdim=True)
    probabilities = []
    target = None
    for count in REPLACED:
        kept = torch.ones_like(heat).scatter_(1, order[:, :count], 0.0).view(-1, 1, side, side)
        kept = F.interpolate(kept, scale_factor=PATCH)
        with torch.inference_mode():
            scores = network.module(photographs * kept + mean * (1 - kept)).softmax(1)
        target = scores.argmax(1, keepdim=True) if target is None else target
        probabilities.append(scores.gather(1, target)[:, 0])
    found = torch.stack(probabilities, 1)
    return found / found[:, :1]


def map_images(photograph: Tensor, found: dict[str, Tensor]) -> list[np.ndarray]:
    """Return a photograph, and the signal and attribution of each variant, as RGB arrays (H, W, 3)."""
    pictures = [(photograph * 0.5 + 0.5).permute(1, 2, 0).numpy()]
    for name, values in found.items():
        array = values.numpy()
        if name.endswith("patternattribution"):
            pictures.append(get_cmap(COLOR_MAP)(center_values(array.sum(0)))[..., :3])
        else:
            pictures.append(center_values(array).transpose(1, 2, 0))
    return pictures


def draw(path: Path, rows: Sequence[Sequence[np.ndarray]]) -> None:
    """Draw a row for each photograph, with a signal and an attribution for each variant."""
    from matplotlib.figure import Figure

    titles = ["photograph", *(v.name for v in VARIANTS for _ in METHODS)]
    figure = Figure(figsize=(1.02 * len(titles), 1.02 * len(rows) + 0.4), dpi=110)
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    figure.subplots_adjust(
        left=0.005, right=0.995, top=1 - 0.35 / (len(rows) + 0.4), bottom=0.005, wspace=0.03, hspace=0.03
    )
    for line, pictures in zip(axes, rows):
        for axis, picture in zip(line, pictures):
            axis.imshow(picture.clip(0, 1))
            axis.axis("off")
    for number, (axis, title) in enumerate(zip(axes[0], titles)):
        suffix = "" if number == 0 else "\nsignal" if number % 2 else "\nattribution"
        axis.set_title(title + suffix, fontsize=6, pad=2)
    save_figure(path, figure)


PROBABILITIES = [f"{count} replaced" for count in REPLACED[1:]]
COLUMNS = {"patterns": ""} | dict.fromkeys(PROBABILITIES, "{:.2f}")
COLUMNS |= {"average": "{:.3f}", "difference to the default": "{:+.3f} ± {:.3f}"}


def main() -> None:
    """Measure, and write results and figure."""
    docs = make_parser("benchmarks.defaults", __doc__).parse_args().write
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        loaded = loading.load(ModelConfig(spec=SPEC, weights=str(prepare_weights(here / "weights.safetensors"))))
        originals = prepare_photographs(here / "photographs")
        crops, whole = pack(originals, here / "fit", crops=CROPS), pack(originals, here / "whole")
        fitted = fit(loaded, list(map(str, crops)))
        photographs = torch.cat(list(images(loaded, list(map(str, whole)))))
    found: dict[str, Tensor] = {}
    remaining: dict[str, Tensor] = {}
    exponents: dict[str, int] = {}
    for variant in VARIANTS:
        explanation = Explainer(fitted.network, variant.patterns(fitted), METHODS)(photographs)
        for method, maps in explanation.maps.items():
            found[f"{variant.name}/{method}"] = maps
        largest = float(explanation.maps["patternnet"].abs().max())
        exponents[variant.name] = int(np.frexp(largest)[1]) + explanation.exponents["patternnet"]
        attributions = explanation.maps["patternattribution"]
        remaining[variant.name] = remaining_probability(fitted.network, photographs, attributions)
    gradient = Explainer(fitted.network, None, ["gradient-x-input"])(photographs).maps["gradient-x-input"]
    remaining["gradient × input"] = remaining_probability(fitted.network, photographs, gradient)
    random = torch.rand(photographs.shape, generator=torch.Generator().manual_seed(0))
    remaining["random order"] = remaining_probability(fitted.network, photographs, random)
    titles = {v.name: f"**{v.name}**: {v.description}" for v in VARIANTS}
    rows: list[list[Cell]] = []
    for name, shares in remaining.items():
        averages = shares[:, 1:].mean(1)
        difference = averages - remaining["default"][:, 1:].mean(1)
        error = float(difference.std() / len(difference) ** 0.5)
        cell: Cell = "" if name == "default" else [float(difference.mean()), error]
        rows.append([titles.get(name, name), *shares.mean(0)[1:].tolist(), float(averages.mean()), cell])
    table = Table(COLUMNS, rows)
    magnitudes = Table(dict.fromkeys(exponents, "2^{}"), [list(exponents.values())])
    print(table.render(), magnitudes.render(), sep="\n\n")
    if docs:
        save_results(docs, "defaults", table, crops=CROPS * len(photographs), photographs=len(photographs))
        save_results(docs, "defaults-magnitudes", magnitudes)
        chosen = torch.linspace(0, len(photographs) - 1, DRAWN).long().tolist()
        draw(
            docs / "defaults.jpg",
            [map_images(photographs[i], {name: maps[i] for name, maps in found.items()}) for i in chosen],
        )


if __name__ == "__main__":
    main()
