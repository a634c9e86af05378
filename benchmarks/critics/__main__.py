"""Measure what docs/critics.md reports: `python -m benchmarks.critics [--write docs]`."""

import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.critics import figures, photographs, shapes
from benchmarks.critics.photographs import VARIANTS
from benchmarks.pages import Cell, Table, make_parser, save_results
from patterns.evaluation import cosine, heat, spearman, ssim
from ray_jobs.engine.shard_worker import keep_freed_memory

PARTS = "classifier", "blocks.6", "blocks.4", "blocks.2", "conv_stem"  # stages of the cascade in the table
PICTURED = 7  # the photograph in the figure
STEPS = 7  # operators of the backward pass in the table
PICTURED_METHODS = tuple(
    name
    for name in (*shapes.METHODS, *shapes.BASELINES)
    if name not in ("integrated-gradients", "smoothgrad", "random map")
)
QUANTUS = (
    ("guided-backprop", "two-component"),
    ("patternattribution", "two-component"),
    ("patternattribution", "linear"),
)
PAIR = "{:.2f} / {:.2f}"
Rows = list[list[Cell]]


def escape(text: str) -> str:
    """Escape the bars in a cell or title of a table."""
    return text.replace("|", "\\|")


def label(method: str) -> str:
    """Return a method as code, or a baseline as text."""
    return escape(method) if method in shapes.BASELINES else f"`{method}`"


def mean_pair(pair: tuple[Tensor, Tensor]) -> list[float]:
    """Return the means of SSIM and rank correlation."""
    return [float(values.mean()) for values in pair]


# --- the photographs ------------------------------------------------------------------------------


def measure_cascade(it: photographs.Setting, patterns: photographs.Patterns, folder: Path) -> Table:
    """Measure the similarity to the trained network's map along the cascade, and draw the figures."""
    before, stages = photographs.measure_randomization(it, patterns, [PICTURED])
    references = photographs.compare_with_baselines(before, it.photographs)
    by_part = {stage.part: stage.similarity for stage in stages}
    figures.draw_cascade(folder / "critics-cascade.png", stages, references)
    heats = {method: heat(maps)[PICTURED] for method, maps in before.items()}
    figures.draw_maps(folder / "critics-maps.png", it.photographs[PICTURED], heats, stages)
    columns = {"randomized": "", "method": ""} | dict.fromkeys(PARTS, PAIR)
    columns |= {f"against {escape(name)}": PAIR for name in next(iter(references.values()))}
    rows: Rows = []
    for variant, methods in VARIANTS.items():
        for method in methods:
            along_cascade = [mean_pair(by_part[part][variant, method]) for part in PARTS]
            rows.append([variant, label(method), *along_cascade, *map(mean_pair, references[method].values())])
    return Table(columns, rows)


def compare_classes(it: photographs.Setting, patterns: photographs.Patterns) -> Table:
    """Compare the maps of the predicted class with those of other classes."""
    found = photographs.compare_classes(it, patterns)
    one, other = (torch.randn(it.photographs.shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    random = ssim(heat(one), heat(other)), spearman(heat(one), heat(other)), cosine(one, other).abs()
    rows: Rows = [[label(name), *(float(v.mean()) for v in scores.values())] for name, scores in found.items()]
    rows.append(["two random maps", *(float(values.mean()) for values in random)])
    rows += [[f"{name}, the same for all classes", 1.0, 1.0, 1.0] for name in ("Sobel edges", "\\|x\\|")]
    return Table({"method": ""} | dict.fromkeys(next(iter(found.values())), "{:.3f}"), rows)


def measure_convergence(it: photographs.Setting, patterns: photographs.Patterns, folder: Path) -> Table:
    """Measure the cosine of two random output gradients along the backward pass, and draw the figure."""
    curves = photographs.measure_backward_convergence(it, patterns)
    figures.draw_convergence(folder / "critics-convergence.png", curves)
    operators = list(next(iter(curves.values())))
    some = [operators[round(k * (len(operators) - 1) / (STEPS - 1))] for k in range(STEPS)]
    rows: Rows = [[label(name), *(float(curve[op].mean()) for op in some)] for name, curve in curves.items()]
    return Table({"backward pass": ""} | dict.fromkeys((f"`{name}`" for name in some), "{:.2f}"), rows)


def measure_singular_ratios(it: photographs.Setting, patterns: photographs.Patterns) -> Table:
    """Measure σ₁/σ₂ of the weights of backward passes."""
    ratios = photographs.singular_ratios(it.network, patterns)
    rows: Rows = [[name, statistics.median(v.values()), max(v.values())] for name, v in ratios.items()]
    return Table({"weight": "", "σ₁/σ₂, median": "{:.2f}", "largest": "{:.2f}"}, rows)


# --- the shapes -----------------------------------------------------------------------------------


def measure_suppressors(docs: Path | None, folder: Path) -> None:
    """Score the maps of generated images against their ground truth."""
    scores: dict[tuple[str, str], dict[str, list[Tensor]]] = {}  # by scenario and architecture, then by method
    pictures: dict[str, tuple[Tensor, Mapping[str, Tensor]]] = {}
    accuracies: dict[tuple[str, str], list[float]] = {}
    first: dict[tuple[str, str], shapes.Trained] = {}
    for scenario in shapes.SCENARIOS:
        for architecture in shapes.MODELS:
            key = scenario, architecture
            for seed in range(shapes.SEEDS):
                trained = shapes.train(scenario, architecture, seed)
                accuracies.setdefault(key, []).append(trained.accuracy)
                images, labels = trained.images[: shapes.EXPLAINED], trained.labels[: shapes.EXPLAINED]
                maps = shapes.explain(trained, images, labels)
                for name, some in maps.items():
                    stacked = torch.stack([v.double() for v in shapes.score_maps(name, some).values()])
                    scores.setdefault(key, {}).setdefault(name, []).append(stacked)
                if seed == 0:
                    first[key] = trained
                    heats = {name: heat(maps[name])[0] for name in PICTURED_METHODS}
                    pictures[", ".join(key)] = images[0, 0], heats
                print(f"{scenario}, {architecture}, seed {seed}: accuracy {trained.accuracy:.3f}", flush=True)
    figures.draw_shapes(folder / "critics-shapes.png", pictures, shapes.MASK)
    means = {key: {name: torch.cat(v, 1).mean(1) for name, v in of.items()} for key, of in scores.items()}
    # The images of one model are not independent draws of models, so the error is that of the means of models.
    errors = [
        float(torch.stack([v[0].mean() for v in several]).std() / len(several) ** 0.5)
        for of in scores.values()
        for name, several in of.items()
        if name not in shapes.BASELINES
    ]
    methods = [*shapes.METHODS, *shapes.BASELINES]
    columns = [", ".join(key) for key in means]
    distances: Rows = [[label(name), *(float(of[name][0]) for of in means.values())] for name in methods]
    masses: Rows = [[label(name), *(of[name][1:].tolist() for of in means.values())] for name in methods]
    lowest: Rows = [[min(values) for values in accuracies.values()]]
    save(docs, "critics-accuracies", Table(dict.fromkeys(columns, "{:.3f}"), lowest))
    distance_table = Table({"method": ""} | dict.fromkeys(columns, "{:.3f}"), distances)
    save(docs, "critics-earth-movers", distance_table, standard_error=max(errors))
    save(docs, "critics-mass", Table({"method": ""} | dict.fromkeys(columns, PAIR), masses))
    save(docs, "critics-shift", measure_shift(first["XOR", "MLP"]))
    save(docs, "critics-quantus", compare_with_quantus(first["XOR", "CNN"]))


def measure_shift(trained: shapes.Trained) -> Table:
    """Measure the change of maps by a constant shift of the inputs."""
    rows: Rows = [[label(name), *pair] for name, pair in shapes.measure_shift(trained).items()]
    return Table({"method": "", "patterns carried over": "{:.1g}", "patterns refitted": "{:.1g}"}, rows)


def compare_with_quantus(trained: shapes.Trained) -> Table:
    """Run the randomization test by Quantus and by this project."""
    rows: Rows = []
    for method, estimator in QUANTUS:
        name = f"{method}:{estimator}" if method.startswith("pattern") else method
        rows.append([label(name), *shapes.compare_with_quantus(trained, method, estimator)])
    return Table({"method": "", "Quantus' MPRT": "{:.2f}", "`patterns.evaluation.cascade`": "{:.2f}"}, rows)


def save(docs: Path | None, name: str, table: Table, **values: object) -> None:
    """Print a result, and write it if there is a folder of docs."""
    print(f"\n{name}\n{table.render()}\n{values or ''}")
    if docs:
        save_results(docs, name, table, **values)


def main() -> None:
    """Measure everything, and write results and figures."""
    docs = make_parser("benchmarks.critics", __doc__).parse_args().write
    begun = time.monotonic()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as temporary:
        folder = docs or Path(temporary)
        it = photographs.load_setting(Path(temporary))
        patterns = it.patterns(it.network)
        save(docs, "critics-classes", compare_classes(it, patterns))
        save(docs, "critics-convergence", measure_convergence(it, patterns, folder))
        negative = {e: statistics.median(photographs.negative_shares(it.network, patterns[e])) for e in patterns}
        ratios = measure_singular_ratios(it, patterns)
        save(docs, "critics-singular-ratios", ratios, negative_shares=negative)
        save(docs, "critics-cascade", measure_cascade(it, patterns, folder))
        measure_suppressors(docs, folder)
    print(f"{(time.monotonic() - begun) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
