"""Write docs/linear.md and its figures: `python -m benchmarks.linear [--write docs/linear.md]`."""

import argparse
import inspect
import textwrap
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.linear import figures, model, studies
from benchmarks.linear.model import degrees

PLANES = (30, 45, 90, 135)
PLANE_SAMPLES, TURNING_SAMPLES, RECTIFIED_SAMPLES = 10_000, 100_000, 1_000_000
SIZES, REPEATS = [2**power for power in range(5, 17)], 400
EVALUATED = 512
CELLS = (
    model.LinearModel, model.trained, model.network, model.fitted, studies.plane,
    studies.turning, studies.pictures, studies.side_by_side, studies.rectified, studies.convergence,
)  # fmt: skip


def sources() -> dict[str, str]:
    """The cells of the page by name."""
    return {cell.__name__: textwrap.dedent(inspect.getsource(cell)).rstrip() for cell in CELLS}


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def planes(folder: Path) -> dict[str, object]:
    found = {angle: studies.plane(angle, PLANE_SAMPLES) for angle in PLANES}
    titles = {angle: f"distractor at {angle}°" + " (the paper's)" * (angle == 45) for angle in PLANES}
    figures.draw_planes({titles[angle]: plane for angle, plane in found.items()}, folder / "linear-planes.png")
    rows = [["weight", *(f"{degrees(p.weight, p.model.signal):.1f}°" for p in found.values())]]
    for name in studies.ESTIMATORS:
        rows.append([f"`{name}`", *(f"{degrees(p.patterns[name], p.model.signal):.1f}°" for p in found.values())])
    return {
        "plane_samples": spaced(PLANE_SAMPLES),
        "plane_table": table(["distractor at", *(f"{angle}°" for angle in PLANES)], rows),
    }


def turning(folder: Path) -> dict[str, object]:
    found = studies.turning(TURNING_SAMPLES)
    figures.draw_turning(found, folder / "linear-turning.png")
    errors = [abs(weight - (angle - 90)) for weight, angle in zip(found.weight, found.angles)]
    return {
        "turning_samples": spaced(found.samples),
        "weight_range": max(found.weight) - min(found.weight),
        "weight_error": "less than 10⁻⁹ degrees" if max(errors) < 1e-9 else f"{max(errors):.1g} degrees",
        "deviation": found.largest_deviation(),
        "deviates": found.standard_deviates(),
    }


def methods(folder: Path) -> dict[str, object]:
    model = studies.pictures()
    panel = studies.side_by_side(model, torch.tensor([0.9, 0.4, -0.7], dtype=torch.float64))
    figures.draw_side_by_side(panel, folder / "linear-methods.png")
    amounts = 2 * torch.rand(EVALUATED, generator=torch.Generator().manual_seed(2), dtype=torch.float64) - 1
    many = studies.side_by_side(model, amounts, seed=3)
    attributed = many.weight * many.signal
    rows = [
        [
            figures.TITLES.get(name, name).replace("-\n", "").replace("\n", " "),
            f"{studies.likeness(many.maps[name], many.signal):.3f}",
            f"{studies.likeness(many.maps[name], attributed):.3f}",
        ]
        for name in figures.ordered(many.maps)
    ]
    gratings = model.distractor[:, : -model.signal.shape[0]]
    return {
        "gratings": gratings.shape[1] - 1,
        "pixel_noise": f"{float(model.distractor[0, -model.signal.shape[0]]):.1f}",
        "distractor_ratio": float(gratings.norm() / (model.signal.norm() / 3**0.5)),
        "output_error": float((many.output - many.y).square().mean().sqrt()),
        "weight_degrees": degrees(many.weight, model.signal),
        "exact_degrees": degrees(model.weight(), model.signal),
        "pattern_degrees": degrees(many.pattern, model.signal),
        "evaluated": EVALUATED,
        "likeness_table": table(["method", "with $s$", "with $w \\odot s$"], rows),
    }


def rectified() -> dict[str, object]:
    found = {mean: studies.rectified(mean, RECTIFIED_SAMPLES) for mean in (0.0, 1.0)}
    names = {"linear": "`linear`", "positive": "two-component, a₊", "negative": "two-component, a₋"}
    names |= {f"{sign}-own-mean": f"its own-mean form, {a}" for sign, a in (("positive", "a₊"), ("negative", "a₋"))}
    rows = [[names[name], *(f"{row[name]:.2f}°" for row in found.values())] for name in names]
    signal, distractor = model.PAPER.signal, model.PAPER.distractor
    return {
        "rectified_samples": spaced(RECTIFIED_SAMPLES),
        "rectified_table": table(["degrees from the signal", *(f"μ = {mean:.0f}" for mean in found)], rows),
        "closed_plus": degrees(signal + 1.5 * distractor, signal),
        "closed_minus": degrees(signal - 1.5 * distractor, signal),
    }


def convergence(folder: Path) -> dict[str, object]:
    errors = studies.convergence(SIZES, REPEATS)
    figures.draw_convergence(SIZES, errors, folder / "linear-samples.png")
    ratios = errors.square().mean(1).sqrt() / (6 / torch.tensor(SIZES)).sqrt()
    return {
        "slope": f"{studies.slope(SIZES, errors):.3f}".replace("-", "−"),
        "sizes": f"{SIZES[0]} to {spaced(SIZES[-1])}",
        "repeats": REPEATS,
        "theory_ratio": float(ratios.mean()),
    }


def spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=__doc__)
    parser.add_argument("--write", type=Path, default=Path("docs/linear.md"), help="the page; figures go beside it")
    page: Path = parser.parse_args().write
    page.parent.mkdir(parents=True, exist_ok=True)
    measured = {
        "torch": torch.__version__.split("+")[0],
        **planes(page.parent),
        **turning(page.parent),
        **methods(page.parent),
        **rectified(),
        **convergence(page.parent),
    }
    text = Path(__file__).with_name("page.md").read_text().format(**sources(), **measured)
    page.write_text(text)
    print(f"{page}: " + ", ".join(f"{k} {v:.3g}" for k, v in measured.items() if isinstance(v, float)))


if __name__ == "__main__":
    main()
