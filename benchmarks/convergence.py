"""How similar maps are at a given standard error of patterns: `python -m benchmarks.convergence [--write docs]`.

EfficientNet-Lite0 with its ImageNet weights is fitted on random crops of foolbox's photographs of ImageNet. At each
doubling of the crops, the benchmark measures the standard errors of the patterns, and the similarity of the maps to
those of the patterns of all crops.
"""

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import pil_to_tensor

from benchmarks.pages import Cell, Table, make_parser, save_results
from patterns import Explainer, Moments, Network, Observer, Solution, choose
from patterns.estimation import estimators
from patterns.estimation.estimators import required_sums
from patterns.estimation.jackknife import GROUPS, ConvergenceCheck, check_convergence
from ray_jobs.config import ModelConfig
from ray_jobs.data.packing import open_image, pack
from ray_jobs.data.shard_reader import ReaderConfig, ShardReader
from ray_jobs.engine.shard_worker import keep_freed_memory
from ray_jobs.figures.convergence_curves import append_rows, check_rows, draw_convergence
from ray_jobs.models import loading
from ray_jobs.studies.demo import SPEC, prepare_photographs, prepare_weights

CHOICES = ("two-component", "linear")
METHODS = ("patternattribution", "patternnet")
SIZE = 96  # pixels; small, so that a CPU can process many crops
BATCH = 32  # maximum
FIRST = 8  # crops in each of the partial moments of the first convergence check
TOLERANCE = 0.1
COLUMNS = {"crops": "{}", "patterns": "", "median": "{:.3f}", "worst p90": "{:.2f}"} | dict.fromkeys(METHODS, "{:.2f}")
PartialMoments = list[dict[str, Moments]]


@dataclass(frozen=True)
class Crops:
    """Random crops of random photographs, normalized for the model; the photographs are (C, H, W) in [0, 1]."""

    photographs: Sequence[Tensor]
    mean: Tensor
    std: Tensor
    size: int

    def draw(self, count: int) -> Tensor:
        """Draw crops, shape (count, C, size, size)."""
        crop = RandomResizedCrop(self.size, (0.25, 1.0), antialias=True)
        chosen = torch.randint(len(self.photographs), (count,)).tolist()
        return (torch.stack([crop(self.photographs[i]) for i in chosen]) - self.mean) / self.std


def load_model_and_crops(folder: Path, size: int) -> tuple[loading.LoadedModel, Crops]:
    """Load EfficientNet-Lite0 with its ImageNet weights, and crops of photographs, which are written to the folder."""
    weights = prepare_weights(folder / "weights.safetensors")
    loaded = loading.load(ModelConfig(spec=SPEC, weights=str(weights), image_size=size, resize=size))
    files = sorted(prepare_photographs(folder / "photographs").rglob("*.jpg"))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (loaded.preprocessing.mean, loaded.preprocessing.std))
    return loaded, Crops([pil_to_tensor(open_image(file)).float() / 255 for file in files], mean, std, size)


def accumulate_crops(network: Network, crops: Crops, count: int) -> dict[str, Moments]:
    """Accumulate the moments of a number of crops."""
    observer = Observer(network, lambda operator: required_sums(operator, CHOICES))
    for done in range(0, count, BATCH):
        observer.update(crops.draw(min(BATCH, count - done)))
    return observer.moments()


def merge_pairs(partial_moments: PartialMoments) -> PartialMoments:
    """Merge the partial moments in pairs."""
    return [{name: a[name] + b[name] for name in a} for a, b in zip(partial_moments[::2], partial_moments[1::2])]


def check_patterns(network: Network, partial_moments: PartialMoments) -> dict[str, ConvergenceCheck]:
    """Return the patterns of all partial moments with their standard errors, by operator."""
    return {
        name: check_convergence(operator, [partial(moments.__getitem__, name) for moments in partial_moments], CHOICES)
        for name, operator in network.operators.items()
    }


def explain(network: Network, solutions: dict[str, Solution], images: Tensor) -> dict[str, Tensor]:
    """Return the maps of each choice of patterns by `CHOICE, METHOD`."""
    patterns = {name: solution.patterns for name, solution in solutions.items()}
    return {
        f"{choice}, {method}": maps
        for choice in CHOICES
        for method, maps in Explainer(network, choose(network, patterns, choice), METHODS)(images).maps.items()
    }


def cosines(maps: Tensor, others: Tensor) -> Tensor:
    """Return the cosine of the two maps of each image, shape (N,); accurate for tiny maps too."""
    rows, columns = (m.flatten(1).double() for m in (maps, others))
    return ((rows / rows.norm(dim=1, keepdim=True)) * (columns / columns.norm(dim=1, keepdim=True))).sum(1)


def errors(table: pa.Table, samples: int, network: Network, choice: str) -> tuple[float, float]:
    """Return the median of the operators' medians, and the worst p90, of a choice's patterns after `samples` crops."""
    first = {name: estimators.CHOICES[choice][op.gate is None][0] for name, op in network.operators.items()}
    rows = [r for r in table.to_pylist() if r["samples"] == samples and r["estimator"] == first[r["operator"]]]
    return statistics.median(row["median"] for row in rows), max(row["p90"] for row in rows)


def main() -> None:
    """Measure, and write results and figure."""
    parser = make_parser("benchmarks.convergence", __doc__)
    parser.add_argument("--doublings", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        loaded, crops = load_model_and_crops(folder, SIZE)
        network = loaded.network
        (shard,) = pack(folder / "photographs", folder / "whole")
        reader = ShardReader(str(shard), ReaderConfig(loaded.preprocessing, BATCH, loaded.dtype))
        whole = torch.cat([batch.images for batch in reader])
        curve = folder / "convergence.parquet"
        found: dict[int, dict[str, Tensor]] = {}
        before: dict[str, Solution] = {}
        partial_moments: PartialMoments = []
        samples = 0
        for _ in range(options.doublings + 1):
            # As many crops as before, so that the number of partial moments stays the same, and their sizes are equal.
            more = [accumulate_crops(network, crops, max(FIRST, samples // GROUPS)) for _ in range(GROUPS)]
            partial_moments = merge_pairs(partial_moments + more) if partial_moments else more
            samples = samples * 2 or GROUPS * FIRST
            checks = check_patterns(network, partial_moments)
            new_rows = [check_rows(samples, name, check, before.get(name)) for name, check in checks.items()]
            curve_table = append_rows(curve, new_rows)
            before = {name: check.solution for name, check in checks.items()}
            found[samples] = explain(network, before, whole)
            print(f"{samples} crops", *errors(curve_table, samples, network, "two-component"), flush=True)
    rows: list[list[Cell]] = []
    for n, maps in found.items():
        for choice in CHOICES:
            keys = [f"{choice}, {method}" for method in METHODS]
            similarities = [float(cosines(maps[key], found[samples][key]).mean()) for key in keys]
            rows.append([n, f"`{choice}`", *errors(curve_table, n, network, choice), *similarities])
    print(Table(COLUMNS, rows).render())
    if options.write:
        save_results(options.write, "convergence", Table(COLUMNS, rows), photographs=len(crops.photographs))
        draw_convergence(options.write / "convergence.png", curve_table, TOLERANCE)


if __name__ == "__main__":
    main()
