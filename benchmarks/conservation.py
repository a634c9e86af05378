"""How much of the target's value PatternAttribution conserves: `python -m benchmarks.conservation [--write docs]`.

The models are EfficientNet-Lite0 with its ImageNet weights (extra `demo`), and ResNet-18 and VGG-11's convolutions with
random weights. Patterns are fitted on random crops of foolbox's photographs, and the photographs are explained.
"""

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor, nn
from torchvision.models import vgg11

from benchmarks.pages import Cell, Table, make_parser, save_results
from patterns import accumulate, choose, solve
from patterns.evaluation.conservation import Loss, conservation
from ray_jobs.config import ModelConfig
from ray_jobs.data.packing import pack
from ray_jobs.data.shard_reader import ReaderConfig, ShardReader
from ray_jobs.models import loading
from ray_jobs.models.loading import LoadedModel
from ray_jobs.studies.demo import SPEC, prepare_photographs, prepare_weights

CROPS = 4  # per photograph
CHOICES = "linear", "default"
CAUSES = "gate", "border", "neuron", "other"
SHARE = "{:.3g} ({:.3g} to {:.3g})"
COLUMNS = {
    "model": "",
    "patterns": "",
    "reaches the input": SHARE,
    "lost at gates": SHARE,
    "at borders": SHARE,
    "in neurons": SHARE,
    "elsewhere": SHARE,
}
ROUNDING = 1e-6
HERE = "benchmarks.conservation"


def vgg11_convolutions() -> nn.Module:
    """Return VGG-11's convolutions with random weights, followed by one linear layer of their mean."""
    return nn.Sequential(vgg11().features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def main() -> None:
    """Measure each model and estimator, and print the largest losses."""
    docs = make_parser("benchmarks.conservation", __doc__).parse_args().write
    rows: list[list[Cell]] = []
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        photographs = prepare_photographs(here / "photographs")
        crops, whole = pack(photographs, here / "fit", crops=CROPS), pack(photographs, here / "whole")
        names = {
            "EfficientNet-Lite0, trained": ModelConfig(
                spec=SPEC, weights=str(prepare_weights(here / "weights.safetensors"))
            ),
            "ResNet-18, random": ModelConfig(spec="torchvision:resnet18", weights="random"),
            "VGG-11, random": ModelConfig(spec=f"{HERE}:vgg11_convolutions", image_size=224, resize=256),
        }
        for name, config in names.items():
            loaded = loading.load(config)
            moments = accumulate(loaded.network, images(crops, loaded, 20))
            for choice in CHOICES:
                solved = {n: solve(op, moments[n], [choice]).patterns for n, op in loaded.network.operators.items()}
                patterns = choose(loaded.network, solved, choice)
                found = []
                for image in images(whole, loaded, 1):
                    target = loaded.network.module(image).argmax(1)
                    found.append(conservation(loaded.network, patterns, image, target))
                rows.append([name, choice, *share_cells(found)])
                print(f"{name}, {choice}:", flush=True)
                print_largest(found)
    print(Table(COLUMNS, rows).render())
    if docs:
        save_results(docs, "conservation", Table(COLUMNS, rows))


def images(shards: Sequence[Path], loaded: LoadedModel, batch_size: int) -> Iterator[Tensor]:
    """Yield the batches of some shards, as the model takes them."""
    for shard in shards:
        for batch in ShardReader(str(shard), ReaderConfig(loaded.preprocessing, batch_size, loaded.dtype)):
            yield batch.images


def share_cells(found: Sequence[Sequence[Loss]]) -> Iterator[Cell]:
    """Yield the share that reaches the input and the share lost by each cause, as `median_and_quartiles`."""
    yield median_and_quartiles([1 - sum(loss.lost for loss in losses) for losses in found])
    for cause in CAUSES:
        yield median_and_quartiles([sum(loss.lost for loss in losses if loss.cause == cause) for losses in found])


def median_and_quartiles(shares: Sequence[float]) -> Cell:
    """Return the median and the quartiles; text if they are rounding errors."""
    low, _, high = statistics.quantiles(shares, n=4)
    return f"< {ROUNDING:g}" if max(abs(low), abs(high)) < ROUNDING else [statistics.median(shares), low, high]


def print_largest(found: Sequence[Sequence[Loss]], count: int = 6) -> None:
    """Print the steps of the network with the largest loss, by the median over the photographs."""
    medians = {
        (row[0].cause, row[0].name): (
            statistics.median(loss.received for loss in row),
            statistics.median(loss.lost for loss in row),
        )
        for row in zip(*found)
    }
    for (cause, name), (received, lost) in sorted(medians.items(), key=lambda item: -abs(item[1][1]))[:count]:
        print(f"    {cause} {name}: receives {received:.3f}, loses {lost:.3f}")


if __name__ == "__main__":
    main()
