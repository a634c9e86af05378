"""Error and cost of patterns from sampled positions: `python -m benchmarks.sampling [--write docs]`.

EfficientNet-Lite0 with its ImageNet weights is fitted on random crops of foolbox's photographs of ImageNet. The
reference is an exact fit of many other crops.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.convergence import load_model_and_crops
from benchmarks.pages import Cell, Table, make_parser, save_results
from patterns import Moments, Network, Observer, choose, solve
from patterns.estimation.estimators import required_sums
from ray_jobs.engine.shard_worker import keep_freed_memory

CHOICES = ("two-component", "linear")
SIZE = 160
BATCH = 16
POSITIONS = (1, 4, 16, 64, None)
TIME = "time of the fit, forward passes per image"
COLUMNS = {"positions": "{}", "images": "{}", TIME: "{:.2f}"} | {f"error, `{c}`": "{:.3f}" for c in CHOICES}
Patterns = dict[str, Tensor]


@dataclass(frozen=True)
class Point:
    """A fit of some images.

    Attributes:
        positions: The number of sampled positions per image; None for all.
        images: The number of images.
        cost: Its time, in forward passes of one image.
        errors: The errors of its patterns by choice.
    """

    positions: int | None
    images: int
    cost: float
    errors: dict[str, float]


def solve_all(network: Network, moments: dict[str, Moments]) -> dict[str, Patterns]:
    """Return the patterns of each choice."""
    found = {name: solve(op, moments[name], CHOICES).patterns for name, op in network.operators.items()}
    chosen = {choice: choose(network, found, choice) for choice in CHOICES}
    return {choice: {name: a for name, a in each.items() if a is not None} for choice, each in chosen.items()}


def error(network: Network, patterns: Patterns, reference: Patterns) -> float:
    """Return ‖a - a'‖ / ‖a'‖ of the median neuron of the median operator that has several spatial positions."""
    medians = []
    for name, op in network.operators.items():
        if op.output_shape[1:]:
            a, b = (p[name].flatten(1).double() for p in (patterns, reference))
            informative = b.norm(dim=1) > 0
            medians.append(float(((a - b).norm(dim=1) / b.norm(dim=1))[informative].median()))
    return statistics.median(medians)


def curve(network: Network, images: Tensor, positions: int | None, reference: dict[str, Patterns]) -> list[Point]:
    """Return a point at every doubling of the images."""
    observer = Observer(network, lambda op: required_sums(op, CHOICES), positions=positions)
    points, spent, forward, next_point = [], 0.0, 0.0, 2 * BATCH
    for done, batch in enumerate(images.split(BATCH), 1):
        begun = time.perf_counter()
        with torch.inference_mode():
            network.module(batch)
        between = time.perf_counter()
        observer.update(batch)
        if done * BATCH == next_point:
            observer.flush()
        forward += between - begun
        spent += time.perf_counter() - between
        if done * BATCH == next_point:
            patterns = solve_all(network, observer.moments())
            errors = {choice: error(network, patterns[choice], reference[choice]) for choice in CHOICES}
            points.append(Point(positions, next_point, next_point * spent / forward, errors))
            print(points[-1], flush=True)
            next_point *= 2
    return points


def draw(path: Path, points: list[Point]) -> None:
    """Draw the error against the number of images."""
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    for positions in dict.fromkeys(point.positions for point in points):
        line = [point for point in points if point.positions == positions]
        name = "all positions" if positions is None else f"{positions} of each image"
        axes.plot([p.images for p in line], [p.errors["two-component"] for p in line], "o-", label=name)
    axes.set(xscale="log", yscale="log", xlabel="images", ylabel="median relative error of patterns")
    ticks = sorted({point.images for point in points})
    axes.set_xticks(ticks, map(str, ticks))
    axes.tick_params(axis="x", which="minor", labelbottom=False)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, and write results and figure."""
    parser = make_parser("benchmarks.sampling", __doc__)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--reference", type=int, default=1536, help="number of crops of the reference")
    options = parser.parse_args()
    torch.manual_seed(0)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as temporary:
        loaded, crops = load_model_and_crops(Path(temporary), SIZE)
        network = loaded.network
        exact = Observer(network, lambda op: required_sums(op, CHOICES))
        for _ in range(0, options.reference, BATCH):
            exact.update(crops.draw(BATCH))
        reference = solve_all(network, exact.moments())
        images = crops.draw(options.images)
        points = [p for positions in POSITIONS for p in curve(network, images, positions, reference)]
    rows: list[list[Cell]] = [
        [p.positions or "all", p.images, p.cost / p.images, *(p.errors[choice] for choice in CHOICES)] for p in points
    ]
    print(Table(COLUMNS, rows).render())
    if options.write:
        save_results(options.write, "sampling", Table(COLUMNS, rows), reference=options.reference)
        draw(options.write / "sampling.png", points)


if __name__ == "__main__":
    main()
