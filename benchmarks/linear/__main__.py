"""Measure what docs/linear.md reports: `python -m benchmarks.linear [--write docs]`."""

import tempfile
from pathlib import Path

import torch
from torch import nn

from benchmarks.linear import figures, model, studies
from benchmarks.linear.model import angle_between
from benchmarks.pages import Cell, Table, include, make_parser, save_results, source_code

PLANES = (30, 45, 90, 135)
PLANE_SAMPLES, TURNING_SAMPLES, GATED_SAMPLES = 10_000, 100_000, 1_000_000
SIZES, REPEATS = [2**power for power in range(5, 17)], 400
EVALUATED = 512
ANGLE = "{:.1f}°"
# The functions whose source the page shows.
SOURCES = (
    model.LinearModel, model.train_layer, model.make_network, model.fit_patterns, studies.measure_plane,
    studies.turn_distractor, studies.make_images, studies.explain_images, studies.measure_gated,
    studies.measure_convergence,
)  # fmt: skip


def include_sources(docs: Path) -> None:
    """Write the source of functions to the page that shows it."""
    for function in SOURCES:
        include(docs, f"source:{function.__name__}", source_code(function))


def measure_planes(folder: Path) -> Table:
    """Measure the angles of weight and patterns to the signal for several distractors, and draw them."""
    found = {angle: studies.measure_plane(angle, PLANE_SAMPLES) for angle in PLANES}
    titles = {angle: f"distractor at {angle}°" + " (the paper's)" * (angle == 45) for angle in PLANES}
    figures.draw_planes({titles[angle]: plane for angle, plane in found.items()}, folder / "linear-planes.png")
    rows: list[list[Cell]] = [["weight", *(angle_between(p.weight, p.model.signal) for p in found.values())]]
    for name in studies.ESTIMATORS:
        rows.append([f"`{name}`", *(angle_between(p.patterns[name], p.model.signal) for p in found.values())])
    return Table({"distractor at": ""} | {f"{angle}°": ANGLE for angle in PLANES}, rows)


def measure_turning(folder: Path) -> dict[str, float]:
    """Measure the angles of weight and pattern as the distractor turns, and draw them."""
    found = studies.turn_distractor(TURNING_SAMPLES)
    figures.draw_turning(found, folder / "linear-turning.png")
    return {
        "samples": found.samples,
        "weight_range": max(found.weight) - min(found.weight),
        "weight_error": max(abs(weight - (angle - 90)) for weight, angle in zip(found.weight, found.angles)),
        "pattern_deviation": found.largest_deviation(),
        "standard_deviates": found.standard_deviates(),
    }


def compare_methods(folder: Path) -> tuple[Table, dict[str, float]]:
    """Compare the maps of all methods with the true signal and with what it adds to the output."""
    images = studies.make_images()
    panel = studies.explain_images(images, torch.tensor([0.9, 0.4, -0.7], dtype=torch.float64))
    figures.draw_side_by_side(panel, folder / "linear-methods.png")
    amounts = 2 * torch.rand(EVALUATED, generator=torch.Generator().manual_seed(2), dtype=torch.float64) - 1
    many = studies.explain_images(images, amounts, seed=3)
    rows: list[list[Cell]] = [
        [
            figures.TITLES.get(name, name).replace("-\n", "").replace("\n", " "),
            studies.mean_cosine(many.maps[name], many.signal),
            studies.mean_cosine(many.maps[name], many.weight * many.signal),
        ]
        for name in figures.sort_methods(many.maps)
    ]
    gratings = images.distractor[:, : -images.signal.shape[0]]
    values = {
        "gratings": gratings.shape[1] - 1,
        "distractor_to_signal": float(gratings.norm() / (images.signal.norm() / 3**0.5)),
        "output_error": float((many.output - many.y).square().mean().sqrt()),
        "weight_angle": angle_between(many.weight, images.signal),
        "exact_weight_angle": angle_between(images.weight(), images.signal),
        "pattern_angle": angle_between(many.pattern, images.signal),
    }
    return Table({"method": "", "with $s$": "{:.3f}", "with $w \\odot s$": "{:.3f}"}, rows), values


def measure_gated() -> Table:
    """Measure the angles of the patterns of neurons with a ReLU, GELU or SiLU to the signal."""
    found = {
        f"{type(activation).__name__}, μ = {mean:.0f}": studies.measure_gated(activation, mean, GATED_SAMPLES)
        for activation in (nn.ReLU(), nn.GELU(), nn.SiLU())
        for mean in (0.0, 1.0)
    }
    names = {"weight": "weight", "linear": "`linear`", "positive": "two-component, a₊", "negative": "two-component, a₋"}
    names |= {f"{sign}-own-mean": f"its own-mean form, {a}" for sign, a in (("positive", "a₊"), ("negative", "a₋"))}
    rows: list[list[Cell]] = [[names[name], *(row[name] for row in found.values())] for name in names]
    return Table({"angle to the signal": ""} | dict.fromkeys(found, "{:.2f}°"), rows)


def measure_samples(folder: Path) -> dict[str, float]:
    """Measure the error of the pattern against the number of samples, and draw it."""
    errors = studies.measure_convergence(SIZES, REPEATS)
    figures.draw_convergence(SIZES, errors, folder / "linear-samples.png")
    ratios = errors.square().mean(1).sqrt() / (6 / torch.tensor(SIZES)).sqrt()
    return {"slope": studies.fit_slope(SIZES, errors), "error_to_theory": float(ratios.mean())}


def main() -> None:
    """Measure everything, and write results, figures and sources."""
    docs = make_parser("benchmarks.linear", __doc__).parse_args().write
    with tempfile.TemporaryDirectory() as temporary:
        folder = docs or Path(temporary)
        methods, values = compare_methods(folder)
        results: dict[str, tuple[Table | None, dict[str, float]]] = {
            "linear-planes": (measure_planes(folder), {}),
            "linear-turning": (None, measure_turning(folder)),
            "linear-methods": (methods, values),
            "linear-gated": (measure_gated(), {}),
            "linear-samples": (None, measure_samples(folder)),
        }
    for name, (table, numbers) in results.items():
        print(f"\n{name}\n{table.render() if table else ''}\n{numbers or ''}")
        if docs:
            save_results(docs, name, table, **numbers)
    if docs:
        include_sources(docs)


if __name__ == "__main__":
    main()
