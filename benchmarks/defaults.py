"""What each choice of patterns does to the maps: `python -m benchmarks.defaults [--write docs/defaults.md]`.

EfficientNet-Lite0 with its ImageNet weights, patterns of random crops of foolbox's photographs of ImageNet, maps
of the photographs themselves: a figure, and how fast the target's probability falls when what a map points
to is taken away (the image degradation of Kindermans et al. 2018, §5, on 20 photographs).
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from zennit.image import get_cmap

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
from ray_jobs.models.loading import Loaded
from ray_jobs.studies.demo import CROPS, SPEC, prepare_photographs, prepare_weights

PATCH = 16
TAKEN = (0, 1, 2, 4, 8, 16, 32, 64)  # patches taken away, of 196
SHOWN = 6  # photographs in the figure
METHODS = ("patternnet", "patternattribution")
Patterns = dict[str, Tensor]


@dataclass(frozen=True)
class Variant:
    """A way to choose patterns: what it is called, and how they come from the moments."""

    name: str
    about: str
    patterns: Callable[["Fitted"], Patterns]


@dataclass(frozen=True)
class Fitted:
    """A network, its moments, and those it would have if every operator without a gate had a ReLU's."""

    network: Network
    moments: dict[str, Moments]
    as_if_gated: dict[str, Moments]

    def solved(self, choice: str) -> Patterns:
        solutions = {n: solve(op, self.moments[n], choice).patterns for n, op in self.network.operators.items()}
        return choose(self.network, solutions, choice)


def plain_additions(fitted: Fitted) -> Patterns:
    """The default, but that additions pass the whole signal to each of their inputs."""
    plain = {n: op.weight for n, op in fitted.network.operators.items() if isinstance(op.operator_type, Addition)}
    return fitted.solved("default") | plain


def all_gated(fitted: Fitted) -> Patterns:
    """The default, but that operators without a gate, the scores excepted, take a₊ for z > 0."""
    patterns = fitted.solved("default")
    *hidden, _ = fitted.network.operators.values()
    for operator in hidden:
        if operator.gate is None and not isinstance(operator.operator_type, Addition):
            gated = with_gate(operator)
            patterns[operator.name] = solve(gated, fitted.as_if_gated[operator.name]).patterns["positive"]
    return patterns


VARIANTS = (
    Variant("default", "a₊ where a gate follows, else linear; additions are neurons", lambda f: f.solved("default")),
    Variant("linear", "linear everywhere", lambda f: f.solved("linear")),
    Variant("own mean", "a₊ with the gate's own mean of y", lambda f: f.solved("two-component-own-mean")),
    Variant("multivariate", "all neurons of an operator at once", lambda f: f.solved("multivariate")),
    Variant("plain additions", "the default, but an addition's pattern is (1, 1)", plain_additions),
    Variant("gated bottlenecks", "the default, but a₊ also where no gate follows", all_gated),
    Variant("filter", "w / wᵀw: no data", lambda f: f.solved("filter")),
)


def with_gate(operator: Operator) -> Operator:
    """The operator as if a ReLU followed it."""
    shapes = operator.input_shapes, operator.output_shape
    gate = operator.gate or Gate(0.0, float("inf"))
    return Operator(
        operator.name, operator.operator_type, operator.weight, operator.bias, *shapes, operator.source, gate
    )


def fit(loaded: Loaded, crops: Sequence[str]) -> Fitted:
    """All moments of a model over some shards."""
    network = loaded.network
    moments = accumulate(network, images(loaded, crops))
    observer = Observer(replace(network, module=network.rewrite(with_gate)), lambda op: required_sums(op, "default"))
    for batch in images(loaded, crops):
        observer.update(batch)
    return Fitted(network, moments, observer.moments())


def images(loaded: Loaded, shards: Sequence[str]) -> Iterator[Tensor]:
    for shard in shards:
        yield from (batch.images for batch in ShardReader(shard, ReaderConfig(loaded.preprocessing, 20, loaded.dtype)))


def falls(network: Network, photographs: Tensor, maps: Tensor) -> Tensor:
    """The target's probability, as a share of what it was, with more and more patches taken away: (N, TAKEN).

    The patches with the largest sum of a map (N, C, H, W) go first; each becomes the photograph's mean.
    """
    heat = F.avg_pool2d(maps.sum(1, keepdim=True), PATCH).flatten(1)
    order = heat.argsort(1, descending=True)
    side = photographs.shape[-1] // PATCH
    mean = photographs.mean((2, 3), keepdim=True)
    probabilities = []
    target = None
    for count in TAKEN:
        kept = torch.ones_like(heat).scatter_(1, order[:, :count], 0.0).view(-1, 1, side, side)
        kept = F.interpolate(kept, scale_factor=PATCH)
        with torch.inference_mode():
            scores = network.module(photographs * kept + mean * (1 - kept)).softmax(1)
        target = scores.argmax(1, keepdim=True) if target is None else target
        probabilities.append(scores.gather(1, target)[:, 0])
    found = torch.stack(probabilities, 1)
    return found / found[:, :1]


def drawn(photograph: Tensor, found: dict[str, Tensor]) -> list[np.ndarray]:
    """A photograph, and each variant's signal and attribution, as colours (H, W, 3)."""
    pictures = [(photograph * 0.5 + 0.5).permute(1, 2, 0).numpy()]
    for name, values in found.items():
        array = values.numpy()
        if name.endswith("patternattribution"):
            pictures.append(get_cmap(COLOR_MAP)(center_values(array.sum(0)))[..., :3])
        else:
            pictures.append(center_values(array).transpose(1, 2, 0))
    return pictures


def draw(path: Path, rows: Sequence[Sequence[np.ndarray]]) -> None:
    """A row for each photograph; a signal and an attribution for each variant."""
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
        kind = "" if number == 0 else "\nsignal" if number % 2 else "\nattribution"
        axis.set_title(title + kind, fontsize=6, pad=2)
    save_figure(path, figure)


PAGE = """# Which patterns are the default, and why

Made by `python -m benchmarks.defaults --write docs/defaults.md`: EfficientNet-Lite0 with its ImageNet weights
(ReLU6, residual additions, 16 projections without a gate), patterns of {crops} crops of {count} photographs, maps
of the photographs.

![Signals and attributions of each choice of patterns](defaults.jpg)

How fast the probability of the predicted class falls when the patches of {patch}×{patch} pixels to which
PatternAttribution points are replaced by the mean, the largest first: the mean over photographs of what is left. Lower
is better; *average* is over all columns, and the last column its difference with the standard error over photographs.

| patterns | {heads} | average | against the default |
| --- | {rule} | --- |
{rows}
The largest magnitude of a signal, as a power of two: {exponents}.

## What follows from it

{argument}
"""

ARGUMENT = """\
- **Additions are neurons.** With (1, 1) in their place each block passes its signal on twice, once along each branch:
  the signal grows by 2^27 more on its way through ten additions, and shows texture rather than the object.
- **No gate, no gated pattern.** Taking a₊ for z > 0 where no rectifier follows gives noise, in signal and attribution,
  and the worst degradation of all patterns: a projection's sign means nothing to the layers behind it.
- **a₊ for gated operators** is the paper's estimator, and of the neuron-wise ones it degrades fastest, though by no
  more than the standard error against `linear` and the gate's own mean, whose maps from this little data (320 crops)
  are smoother. Twenty photographs cannot tell these three apart, so the paper decides.
- **`multivariate`** is as good, does not let the signal's magnitude grow, and its signals look most like the object.
  Its attributions show the grid of the strides: what reaches an input that one position sees is divided by 1, at its
  neighbour by 4. A choice for signals of deep networks (`--estimator multivariate`), and not the default.
- `filter` needs no data, and is worse than all but the gated bottlenecks. Every row beats a random order; the gradient
  times the input is worse than the default by about one standard error.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        config = ModelConfig(spec=SPEC, weights=str(prepare_weights(here / "weights.safetensors")))
        loaded = loading.load(config)
        originals = prepare_photographs(here / "photographs")
        crops, whole = pack(originals, here / "fit", crops=CROPS), pack(originals, here / "whole")
        fitted = fit(loaded, list(map(str, crops)))
        photographs = torch.cat(list(images(loaded, list(map(str, whole)))))
    found: dict[str, Tensor] = {}
    left: dict[str, Tensor] = {}
    exponents: dict[str, int] = {}
    for variant in VARIANTS:
        explanation = Explainer(fitted.network, variant.patterns(fitted), METHODS)(photographs)
        for method, maps in explanation.maps.items():
            found[f"{variant.name}/{method}"] = maps
        largest = float(explanation.maps["patternnet"].abs().max())
        exponents[variant.name] = int(np.frexp(largest)[1]) + explanation.exponents["patternnet"]
        left[variant.name] = falls(fitted.network, photographs, explanation.maps["patternattribution"])
    gradient = Explainer(fitted.network, None, ["gradient-x-input"])(photographs).maps["gradient-x-input"]
    left["gradient × input"] = falls(fitted.network, photographs, gradient)
    random = torch.rand(photographs.shape, generator=torch.Generator().manual_seed(0))
    left["random order"] = falls(fitted.network, photographs, random)
    about = {v.name: f"**{v.name}**: {v.about}" for v in VARIANTS}
    rows = ""
    for name, shares in left.items():
        averages = shares[:, 1:].mean(1)
        more = averages - left["default"][:, 1:].mean(1)
        error = float(more.std() / len(more) ** 0.5)
        cells = [f"{value:.2f}" for value in shares.mean(0)[1:].tolist()] + [f"{averages.mean():.3f}"]
        cells.append("" if name == "default" else f"{more.mean():+.3f} ± {error:.3f}")
        rows += f"| {about.get(name, name)} | {' | '.join(cells)} |\n"
    text = PAGE.format(
        crops=CROPS * len(photographs), count=len(photographs), patch=PATCH, rows=rows, argument=ARGUMENT,
        heads=" | ".join(f"{count} gone" for count in TAKEN[1:]), rule=" | ".join(["---"] * len(TAKEN)),
        exponents=", ".join(f"{name} {value}" for name, value in exponents.items()),
    )  # fmt: skip
    print(text)
    if options.write:
        options.write.write_text(text)
        chosen = torch.linspace(0, len(photographs) - 1, SHOWN).long().tolist()
        draw(
            options.write.with_suffix(".jpg"),
            [drawn(photographs[i], {name: maps[i] for name, maps in found.items()}) for i in chosen],
        )


if __name__ == "__main__":
    main()
