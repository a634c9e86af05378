"""Measure what docs/results.md reports about VGG-16: `python -m benchmarks.paper [--write docs] [--quick]`."""

import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from benchmarks.pages import Cell, Table, make_parser, save_results
from benchmarks.paper import figures, quality
from benchmarks.paper.convergence import (
    average_positions,
    measure_convergence,
    measure_negative_shares,
    measure_singular_ratios,
)
from benchmarks.paper.figures import layer
from benchmarks.paper.maps import (
    ATTRIBUTIONS,
    METHODS,
    SAMPLE,
    SIGNALS,
    Patterns,
    explain_photographs,
    fit_patterns,
    select_shown,
)
from benchmarks.paper.photographs import Photographs, find_photographs, load_whole, split_photographs
from benchmarks.paper.quality import ESTIMATORS, Judged, Sizes
from patterns import Network
from ray_jobs.config import ModelConfig
from ray_jobs.engine.shard_worker import keep_freed_memory
from ray_jobs.figures.drawing import draw_estimators, draw_grid
from ray_jobs.models import loading
from ray_jobs.studies.vgg16 import SPEC, fetch_weights

FIRST, LAST = "0", "28"  # conv1_1 and conv5_3
CACHE = Path.home() / ".cache" / "patternnet-ray"
SMALL = 576  # inputs of a neuron in the layers that are judged for several numbers of photographs
CONVERGED = 4  # photographs through whose gates random output gradients are propagated
QUICK = Sizes(crops=1, positions=16, regressed_positions=64, photographs=14, inputs=576)
STEPS = "conv5_3", "conv5_1", "conv4_1", "conv3_1", "conv2_1", "conv1_2", "conv1_1"
# What the end of the backward pass has according to Sixt et al. 2020 for VGG-16, from fc3 to the image.
REPORTED = {"deconvnet": "> 0.99", "guided-backprop": "> 0.99", "patternattribution:two-component": "> 0.99"}
Rows = list[list[Cell]]


def tabulate_quality(judged: Mapping[str, Judged]) -> Table:
    """Return the median ρ of each convolution and estimator."""
    rows: Rows = []
    for name, it in judged.items():
        medians = [float(torch.nanmedian(it.rho[estimator])) for estimator in ESTIMATORS]
        bounds = [float(torch.nanmedian(it.same_set[estimator])) for estimator in ("linear", "two-component")]
        rows.append([layer(name), it.inputs, f"{it.samples / it.inputs:.1f}", *medians, bounds])
    columns = {"layer": "", "D": "{}", "patches of v per input": ""} | dict.fromkeys(ESTIMATORS, "{:.3f}")
    return Table(columns | {"linear / two-component, set of v": "{:.3f} / {:.3f}"}, rows)


def tabulate_photographs(judged: Mapping[int, Mapping[str, Judged]]) -> Table:
    """Return the median ρ of `linear` by layer and number of photographs of its fit."""
    rows: Rows = [
        [str(count), *(float(torch.nanmedian(it.rho["linear"])) for it in by_layer.values())]
        for count, by_layer in judged.items()
    ]
    layers = [layer(name) for name in next(iter(judged.values()))]
    return Table({"photographs of the fit": ""} | dict.fromkeys(layers, "{:.3f}"), rows)


def tabulate_convergence(
    curves: Mapping[str, Mapping[str, Tensor]], apart: Mapping[str, Mapping[str, Tensor]]
) -> Table:
    """Return the mean |cosine| of two random output gradients at the inputs of some convolutions.

    Args:
        curves: For output gradients that are the same at all positions, by method.
        apart: For output gradients that are independent at each position.
    """
    steps = {layer(name): name for name in next(iter(curves.values())) if layer(name) in STEPS}
    rows: Rows = []
    for method, curve in curves.items():
        cosines = [float(curve[name].mean()) for name in steps.values()]
        rows.append([f"`{method}`", *cosines, float(apart[method][FIRST].mean()), REPORTED.get(method, "")])
    columns = {"backward pass": ""} | dict.fromkeys(steps, "{:.3f}")
    return Table(columns | {"independent positions, conv1_1": "{:.3f}", "Sixt et al.": ""}, rows)


def tabulate_ratios(ratios: Mapping[str, Mapping[str, float]], shares: Mapping[str, Mapping[str, float]]) -> Table:
    """Return σ₁/σ₂ of each convolution's weights, and the negative share of the mass of w⊙a by estimator."""
    labels = "normal numbers", "w", "a", "w⊙a", "w⊙a, center", "w⊙a, linear"
    columns = [*(ratios[label] for label in labels), *shares.values()]
    rows: Rows = [[layer(name), *(column[name] for column in columns)] for name in columns[0]]
    rows.append(["median", *(statistics.median(column.values()) for column in columns)])
    titles = [f"w⊙a below 0, {estimator}" for estimator in shares]
    return Table({"layer": ""} | dict.fromkeys(labels, "{:.2f}") | dict.fromkeys(titles, "{:.0%}"), rows)


def draw_maps(
    folder: Path, network: Network, patterns: Patterns, paths: list[Path], loaded: loading.LoadedModel
) -> None:
    """Draw the maps of photographs by every method, and those of one photograph by every estimator."""
    preprocessing = loaded.preprocessing
    rows = explain_photographs(network, patterns, paths, preprocessing, METHODS)
    draw_grid(folder / "vgg16-signals.png", rows, columns=1, scale=1.5)
    chosen = [path for path in paths if path.stem == SAMPLE] or paths[:1]
    (sample,) = explain_photographs(network, patterns, chosen, preprocessing, (*SIGNALS, *ATTRIBUTIONS))
    draw_estimators(folder / "vgg16-estimators.png", sample, SIGNALS, ATTRIBUTIONS)
    for name in ("vgg16-signals.png", "vgg16-estimators.png"):
        figures.shrink(folder / name, Image.Dither.FLOYDSTEINBERG)


def save(docs: Path | None, name: str, table: Table, **values: object) -> None:
    """Print a result, and write it if there is a folder of docs."""
    print(f"\n{name}\n{table.render()}\n{values or ''}", flush=True)
    if docs:
        save_results(docs, name, table, **values)


def measure(loaded: loading.LoadedModel, last: str, sets: Photographs, sizes: Sizes, docs: Path | None) -> None:
    """Measure everything.

    Args:
        loaded: The convolutions of VGG-16, or some of them.
        last: The operator whose channels are explained, followed by its rectifier.
        sets: The photographs.
        sizes: How much data to use.
        docs: The folder for results and figures, if any.
    """
    network, preprocessing = loaded.network.until(last), loaded.preprocessing
    with tempfile.TemporaryDirectory() as temporary:
        folder = docs or Path(temporary)
        fitted = quality.fit_moments(network, sets.fitted, sizes, preprocessing)
        b, c = Path(temporary) / "regressed", Path(temporary) / "evaluated"
        regressed = quality.gather_patches(network, sets.regressed, sizes.regressed_positions, sizes, preprocessing)
        quality.save_patches(regressed, b)
        # The maps are of photographs of the third set, so the patterns can have both others.
        both = {name: of + regressed[name].moments if name in regressed else of for name, of in fitted.items()}
        patterns = fit_patterns(network, both)
        del regressed, both
        quality.save_patches(quality.gather_patches(network, sets.evaluated, sizes.positions, sizes, preprocessing), c)
        fewer = {count: sets.fitted[:count] for count in (len(sets.fitted) // 4, len(sets.fitted) // 2)}
        fits = {count: quality.fit_moments(network, paths, sizes, preprocessing) for count, paths in fewer.items()}
        fits[len(sets.fitted)] = fitted
        by_count = {count: dict(quality.judge(network, fit, b, c, SMALL)) for count, fit in fits.items()}
        save(docs, "paper-photographs", tabulate_photographs(by_count))
        judged = dict(quality.judge(network, fitted, b, c, sizes.inputs))
        counts = {name: len(paths) for name, paths in vars(sets).items()}
        save(docs, "paper-quality", tabulate_quality(judged), **(vars(sizes) | {"photographs": counts}))
        figures.draw_judged(folder / "vgg16-quality.png", judged)
        shown = select_shown(sets.evaluated)
        draw_maps(folder, network, patterns, shown, loaded)
        images = torch.stack([load_whole(path, preprocessing) for path in shown[:CONVERGED]])
        layers = list(loaded.model.children())[: int(last) + 2]  # with the rectifier
        curves = measure_convergence(average_positions(layers, images[:1]), patterns, images)
        apart = measure_convergence(network, patterns, images)
        save(docs, "paper-convergence", tabulate_convergence(curves, apart))
        figures.draw_convergence(folder / "vgg16-convergence.png", curves)
        shares = {e: measure_negative_shares(network, patterns[e]) for e in ("two-component", "linear")}
        ratios = measure_singular_ratios(network, patterns)
        save(docs, "paper-singular-ratios", tabulate_ratios(ratios, shares))


def main() -> None:
    """Load the network and the photographs, measure, and write results and figures."""
    parser = make_parser("benchmarks.paper", __doc__)
    parser.add_argument("--quick", action="store_true", help="use few crops, and judge layers with few inputs only")
    parser.add_argument(
        "--weights", type=Path, default=CACHE, metavar="FOLDER", help=f"folder of the weights ({CACHE})"
    )
    options = parser.parse_args()
    begun = time.monotonic()
    keep_freed_memory()
    sizes = QUICK if options.quick else Sizes()
    loaded = loading.load(ModelConfig(spec=SPEC, weights=str(fetch_weights(options.weights))))
    sets = split_photographs(find_photographs()[: sizes.photographs])
    measure(loaded, LAST, sets, sizes, options.write)
    print(f"{(time.monotonic() - begun) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
