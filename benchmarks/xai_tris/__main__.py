"""Run the XAI-TRIS benchmark of docs/xai-tris.md: `python -m benchmarks.xai_tris [--write docs] [--model CNN]`."""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.pages import Cell, Table, make_parser, save_results
from benchmarks.xai_tris import study
from benchmarks.xai_tris.data import ALPHAS, BACKGROUNDS, draw_samples, split_samples
from benchmarks.xai_tris.figures import draw_maps
from benchmarks.xai_tris.models import MODELS, NEEDED_ACCURACY, Trained, is_correct, train

SEEDS, SCORED = 5, 60  # trainings of each scenario, and test images of each training
CELLS = [(scenario, background) for scenario in ALPHAS for background in BACKGROUNDS]
# The earth mover's accuracy of an MLP in the paper.
PUBLISHED = {
    "PatternNet": {"linear": (0.89, 0.78), "multiplicative": (0.73, 0.68), "XOR": (0.85, 0.79)},
    "PatternAttribution": {"linear": (0.94, 0.75), "multiplicative": (0.77, 0.78), "XOR": (0.86, 0.82)},
    "SHAP": {"linear": (0.84, 0.76), "multiplicative": (0.82, 0.78), "XOR": (0.83, 0.75)},
    "Integrated Gradients": {"linear": (0.96, 0.94), "multiplicative": (0.92, 0.86), "XOR": (0.86, 0.88)},
}
PUBLISHED_CELLS = [cell for cell in CELLS if cell[0] in PUBLISHED["SHAP"]]
PICTURED = (
    "gradient", "gradient-x-input", "integrated-gradients", "guided-backprop", "patternnet:linear",
    *(f"patternattribution:{preset}" for preset in ("paper", "linear", "own-mean", "class-specific")),
)  # fmt: skip
DIFFERENCE = ", difference of the scores"
Scores = dict[str, dict[tuple[str, str], Tensor]]  # by method and cell: (seeds, measures); NaN for unscored models
Pictures = dict[str, tuple[Tensor, Tensor, Mapping[str, Tensor]]]


def label(method: str) -> str:
    """Return the name of a method or baseline in a table."""
    name, comma, rest = method.partition(",")
    return study.BASELINES[name].replace("|", "\\|") if name in study.BASELINES else f"`{name}`{comma}{rest}"


def run_cell(
    cell: tuple[str, str], architecture: str, seeds: int, scored: int
) -> tuple[Scores, list[Trained], Pictures]:
    """Train models on a scenario and background, and score the maps of images that they classify correctly."""
    draws = [draw_samples(*cell, torch.Generator().manual_seed(seed)) for seed in range(seeds)]
    splits = [split_samples(samples) for samples in draws]
    trained = train(architecture, splits, 0)
    scores: Scores = {}
    pictures: Pictures = {}
    for seed, (it, split) in enumerate(zip(trained, splits)):
        if it.accuracy < NEEDED_ACCURACY:
            continue
        fitted = study.fit(it.model, split)
        samples = split.test.select(is_correct(it.model, split.test).nonzero()[:scored, 0])
        maps = study.explain(fitted, samples, [*study.list_methods(architecture), *study.BASELINES])
        differences = study.explain(fitted, samples, study.DIFFERENCES, difference=True)
        for name, heat in {**maps, **{name + DIFFERENCE: heat for name, heat in differences.items()}}.items():
            rows = scores.setdefault(name, {}).setdefault(cell, torch.full((seeds, len(study.MEASURES)), torch.nan))
            rows[seed] = study.score(heat, samples)
        if not pictures:
            heats = {name: maps[name][0] for name in PICTURED}
            pictures["\n".join(cell)] = samples.images[0, 0], samples.both[0], heats
    return scores, trained, pictures


def average(values: Mapping[tuple[str, str], Tensor], cells: list[tuple[str, str]]) -> list[float]:
    """Return the mean over cells of the means over seeds, and its standard error over seeds."""
    scored = [each[~each.isnan()] for each in (values[cell] for cell in cells)]
    errors = torch.stack([each.var() / len(each) for each in scored])
    mean = torch.stack([each.mean() for each in scored]).mean()
    return [float(mean), float(errors.sum().sqrt() / len(cells))]


def select_measure(scores: Scores, measure: int) -> Scores:
    """Return one measure of the scores, shape (seeds,) for each method and cell."""
    return {name: {cell: values[:, measure] for cell, values in of.items()} for name, of in scores.items()}


def make_table(scores: Scores, cells: list[tuple[str, str]], measure: int) -> Table:
    """Return the table of a measure: a row for each method, a column for each cell and one for their mean."""
    forms = dict.fromkeys((" ".join(cell) for cell in cells), "{:.3f}") | {"mean": "{:.3f} ± {:.3f}"}
    rows: list[list[Cell]] = [
        [label(name), *(average(of, [cell])[0] for cell in cells), average(of, cells)]
        for name, of in select_measure(scores, measure).items()
    ]
    return Table({"method": ""} | forms, rows)


def compare_with_published(scores: Scores) -> Table:
    """Return our earth mover's accuracies of the published scenarios next to the published ones."""
    rows: list[list[Cell]] = []
    for name, of in PUBLISHED.items():
        numbers = [number for pair in of.values() for number in pair]
        rows.append([f"{name}, published", *(f"{number:.2f}" for number in numbers), f"{sum(numbers) / 6:.3f}"])
    ours = make_table({name: of for name, of in scores.items() if is_compared(name)}, PUBLISHED_CELLS, 0)
    return Table(ours.columns, rows + [list(row) for row in ours.rows])


def is_compared(name: str) -> bool:
    """Return whether the comparison with the published table has a row for a method."""
    return name.partition(":")[0].partition(",")[0] in ("patternnet", "patternattribution", "integrated-gradients")


def find_leads(scores: Scores, method: str, cells: list[tuple[str, str]]) -> Table:
    """Compare a method with each other one: the difference of the means over cells, paired by seed."""
    values = select_measure(scores, 0)
    rows: list[list[Cell]] = []
    for name, of in values.items():
        lead, error = average({cell: values[method][cell] - of[cell] for cell in cells}, cells)
        if name != method:
            verdict = "ahead" if lead > 2 * error else "behind" if lead < -2 * error else "equal"
            rows.append([label(name), [lead, error], verdict])
    return Table({"method": "", f"lead of `{method}`": "{:+.3f} ± {:.3f}", "verdict": ""}, rows)


def save(docs: Path | None, name: str, table: Table, **values: object) -> None:
    """Print a result, and write it if there is a folder of docs."""
    print(f"\n{name}\n{table.render()}\n{values or ''}", flush=True)
    if docs:
        save_results(docs, name, table, **values)


def run(architecture: str, seeds: int, scored: int, docs: Path | None) -> None:
    """Run all scenarios and backgrounds, and write results and the figure."""
    scores: Scores = {}
    pictures: Pictures = {}
    accuracies: dict[tuple[str, str], list[float]] = {}
    for cell in CELLS:
        found, trained, examples = run_cell(cell, architecture, seeds, scored)
        for name, of in found.items():
            scores.setdefault(name, {}).update(of)
        pictures |= examples
        accuracies[cell] = [it.accuracy for it in trained]
        print(f"{architecture}, {', '.join(cell)}: {[(it.epoch, it.accuracy) for it in trained]}", flush=True)
    name = f"xai-tris-{architecture.lower()}"
    ranges: list[Cell] = [[min(values), max(values)] for values in accuracies.values()]
    save(docs, f"{name}-accuracies", Table({" ".join(c): "{:.2f} to {:.2f}" for c in CELLS}, [ranges]))
    cells = [cell for cell in CELLS if sum(a >= NEEDED_ACCURACY for a in accuracies[cell]) > 1]
    if not cells:
        return
    save(docs, name, make_table(scores, cells, 0))
    save(docs, f"{name}-precision", make_table(scores, cells, 1))
    save(docs, f"{name}-own", make_table(scores, cells, 2))
    save(docs, f"{name}-leads", find_leads(scores, study.PRESET_METHOD, cells))
    if architecture == "MLP" and set(PUBLISHED_CELLS) <= set(cells):
        save(docs, "xai-tris", compare_with_published(scores))
        if docs:
            draw_maps(docs / "xai-tris-maps.png", pictures)


def main() -> None:
    """Parse the options and run the benchmark."""
    parser = make_parser("benchmarks.xai_tris", __doc__)
    parser.add_argument("--model", choices=list(MODELS), default="MLP", help="the model of the paper (default: MLP)")
    parser.add_argument("--quick", action="store_true", help="2 trainings and 10 images each, to test the command")
    options = parser.parse_args()
    seeds, scored = (2, 10) if options.quick else (SEEDS, SCORED)
    begun = time.monotonic()
    run(options.model, seeds, scored, options.write)
    print(f"{(time.monotonic() - begun) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
