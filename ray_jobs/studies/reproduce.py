"""The paper's experiments and figures.

Patterns are fitted on the first half of the training data, v is regressed on the second half, and ρ and the image
degradation are evaluated on the test data.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor

from patterns import UserError
from patterns.evaluation import PATCH, STEPS
from patterns.io import write_atomically
from ray_jobs.config import FITTED, DegradeConfig, ExplainConfig, FitConfig, ModelConfig, QualityConfig, Resources
from ray_jobs.data.shard_specs import list_shards
from ray_jobs.engine.ray_session import connect
from ray_jobs.engine.worker_hosts import keep_workers
from ray_jobs.figures.drawing import draw_estimators, draw_grid
from ray_jobs.jobs.degrade import degrade
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.jobs.input_size import infer_input_size
from ray_jobs.jobs.quality import measure
from ray_jobs.models.loading import build_model
from ray_jobs.runs.run_folder import Run
from ray_jobs.studies.datasets import NAMES, read_digits, to_inputs, write_digits
from ray_jobs.studies.small_cnn import BATCH, SPEC, train
from ray_jobs.views.gallery import Gallery, Row

ESTIMATORS = "random", "filter", *FITTED
COMPARED = (
    "gradient",
    "deconvnet",
    "guided-backprop",
    "lrp-z",
    "integrated-gradients",
    "patternnet",
    "patternattribution",
)
BY_ESTIMATOR = "filter", "linear", "two-component"
SIGNALS = ("signal:identity", *(f"patternnet:{estimator}" for estimator in BY_ESTIMATOR))
ATTRIBUTIONS = ("gradient-x-input", *(f"patternattribution:{estimator}" for estimator in BY_ESTIMATOR))
DEGRADED = (*COMPARED, "patternattribution:filter", "patternattribution:linear")
EXPLAINED, DRAWN = 64, 8  # test images that are explained, and drawn side by side
# Smaller images have smaller patches. Their own mean would keep most of what they show, so black replaces them.
SMALL, SMALL_PATCH = 64, 4
REPLACEMENT_TEXTS = {
    "mean": "their means",
    "blur": "a blurred image",
    "zero": "black",
    "dataset-mean": "the data's mean",
}
TOLERANCE = 0.05  # two estimators are comparable if their ρ differs by less


@dataclass(frozen=True)
class Experiment:
    """A model and data for the paper's experiments.

    Attributes:
        model: The model.
        train: The shards of training data.
        test: The shards of test data.
        names: The names of the classes by number.
        patch: The side of the degradation's patches in pixels; None: the paper's 9, and 4 for small images.
        steps: The number of patches that are replaced; None: the paper's 100, or as many as an image has.
        replacement: What replaces a patch; None: the paper's mean of the patch, and black for small images.
        degraded: The number of test images that are degraded.
        batch_size: The number of samples of a batch.
        max_samples: The number of training samples at most; None: all.
        seed: The seed.
    """

    model: ModelConfig
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: tuple[str, ...] = ()
    patch: int | None = None
    steps: int | None = None
    replacement: str | None = None
    degraded: int = 1000
    batch_size: int = 32
    max_samples: int | None = None
    seed: int = 0


def prepare_digits(dataset: str, data: Path, out: Path, limit: int | None, seed: int) -> Experiment:
    """Return an experiment on MNIST or Fashion-MNIST, with a small network that is trained first.

    Args:
        dataset: One of NAMES.
        data: The folder of the dataset's idx files.
        out: The folder for shards and weights. Existing weights are used.
        limit: The number of training images at most, and twice the number of test images; None: all.
        seed: The seed.

    Raises:
        UserError: If the data are missing.
    """
    parts = {"train": read_digits(data, "train", limit), "test": read_digits(data, "t10k", limit and -(-limit // 2))}
    count = len(parts["train"][0])
    weights = out / f"weights-{count}-{seed}.safetensors"  # another training has other weights
    model = ModelConfig(spec=SPEC, weights=str(weights), image_size=28, resize=28, mean=(0.5,), std=(0.5,))
    shards = {}
    for name, (images, labels) in parts.items():
        shards[name] = write_digits(images, labels, out / f"shards-{count}", name)
    if not weights.exists():
        batches = partial(make_epoch, *parts["train"], torch.Generator().manual_seed(seed))
        trained = train(batches, seed, log=partial(print, flush=True))
        write_atomically(weights, lambda temporary: save_file(trained.state_dict(), temporary))
    listed = {name: list_shards(map(str, paths)) for name, paths in shards.items()}
    return Experiment(model, listed["train"], listed["test"], NAMES[dataset], seed=seed)


def make_epoch(images: np.ndarray, labels: np.ndarray, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the shuffled batches of one epoch: images float32 (N, 1, H, W) in [-1, 1], and labels (N,)."""
    order = torch.randperm(len(images), generator=generator)
    y = torch.from_numpy(labels.astype(np.int64))
    for chosen in order.split(BATCH):
        yield to_inputs(images[chosen.numpy()]), y[chosen]


def reproduce(experiment: Experiment, out: Path, resources: Resources = Resources()) -> Path:  # noqa: B008 - frozen
    """Run the paper's experiments, or resume those that ended early.

    Args:
        experiment: The model and the data.
        out: The folder to write to.
        resources: The workers, and the limits on failures.

    Returns:
        The path of `results.md`.

    Raises:
        UserError: If the configuration or the data are wrong.
        StoppedShortError: If a signal stopped a job.
    """
    one = replace(experiment, model=infer_input_size(experiment.model, experiment.train))
    half = len(one.train) // 2
    if half == 0:
        raise UserError("", "one shard cannot be split into two halves", "Pass more training shards.", "shards")
    _, preprocessing = build_model(replace(one.model, weights="random"))
    size = one.model.image_size or preprocessing.image_size
    patch = one.patch or (SMALL_PATCH if size < SMALL else PATCH)
    folder = str(out / "run")
    samples_of_half = one.max_samples and one.max_samples // 2
    fitting = FitConfig(
        model=one.model,
        shards=one.train[:half],
        out=folder,
        batch_size=one.batch_size,
        estimators=ESTIMATORS,
        max_samples=samples_of_half,
        seed=one.seed,
        positions=None,
    )
    judging = QualityConfig(
        model=one.model,
        patterns=folder,
        shards=one.train[half:],
        evaluate=one.test,
        out=folder,
        batch_size=one.batch_size,
        max_samples=samples_of_half,
        seed=one.seed,
    )
    degrading = DegradeConfig(
        model=one.model,
        patterns=folder,
        shards=one.test,
        out=folder,
        batch_size=one.batch_size,
        methods=DEGRADED,
        patch=patch,
        steps=one.steps or min(STEPS, (-(-size // patch)) ** 2),
        replacement=one.replacement or ("zero" if size < SMALL else "mean"),
        max_samples=one.degraded,
        seed=one.seed,
    )
    explaining = ExplainConfig(
        model=one.model,
        patterns=folder,
        shards=one.test,
        out=folder,
        batch_size=one.batch_size,
        methods=tuple(dict.fromkeys((*COMPARED, *SIGNALS, *ATTRIBUTIONS))),
        outputs=("npy",),
        max_samples=EXPLAINED,
        seed=one.seed,
    )
    with connect(resources), keep_workers():
        run = fit(fitting, resources)
        measure(judging, resources)
        degrade(degrading, resources)
        explain(explaining, resources)
    draw_figures(run, out, one.names)
    write_atomically(out / "results.md", partial(Path.write_text, data=format_results(run)))
    return out / "results.md"


def draw_figures(run: Run, out: Path, names: tuple[str, ...]) -> None:
    """Draw the paper's figures 3 to 6, as `figure-3.png` and so on."""
    gallery = Gallery(run, dict(enumerate(names)))
    by_class: dict[int, Row] = {}
    for row in gallery.rows():
        by_class.setdefault(row["prediction"], row)
    shown = gallery.pictures(list(by_class.values())[:DRAWN])
    draw_estimators(out / "figure-5.png", shown[0], SIGNALS, ATTRIBUTIONS)
    draw_grid(out / "figure-6.png", [replace(s, maps={m: s.maps[m] for m in COMPARED}) for s in shown], columns=1)
    for number, name in ((3, "quality.png"), (4, "degradation.png")):
        drawn = (run.folder / name).read_bytes()
        write_atomically(out / f"figure-{number}.png", partial(Path.write_bytes, data=drawn))


def format_results(run: Run) -> str:
    """Return the results as Markdown: ρ by layer and estimator, areas over the curves, and the paper's findings."""
    manifest = run.manifest()
    sections = {job: manifest[job] for job in ("fit", "quality", "degrade")}
    kinds = {op["name"]: op["kind"] for op in manifest["operators"]}
    rho = compute_medians(pq.read_table(run.folder / "quality.parquet"))
    rho = {name: rho[name] for name in ESTIMATORS if name in rho}
    rows = pq.read_table(run.folder / "degradation.parquet", columns=["method", "label", "prediction"])
    judged = rows.filter(pc.equal(rows["method"], "random"))
    right = pc.mean(pc.cast(pc.equal(judged["label"], judged["prediction"]), pa.float64())).as_py()
    lines = [
        f"Model `{sections['fit']['options']['spec']}`; patterns of {sections['fit']['samples']} samples, v of "
        f"{sections['quality']['regressed']}, ρ on {sections['quality']['evaluated']}; {len(judged)} images degraded"
        + ("." if right is None else f", {right:.1%} of them classified right."),
        "",
        "![ρ by layer and estimator, as the paper's Figure 3](figure-3.png)",
        "",
        f"| median ρ | kind | {' | '.join(rho)} |",
        f"| --- | --- | {' | '.join(['---:'] * len(rho))} |",
    ]
    operators = [name for name in kinds if any(name in found for found in rho.values())]
    for name in operators:
        cells = [f"{found[name]:.3f}" if name in found else "" for found in rho.values()]
        lines.append(f"| `{name}` | {kinds[name]} | {' | '.join(cells)} |")
    lines += ["", *compare_findings(rho, kinds), "", "![Image degradation, as the paper's Figure 4](figure-4.png)", ""]
    options = sections["degrade"]["options"]
    replacement = REPLACEMENT_TEXTS[options["replacement"]]
    lines += [f"Patches of {options['patch']}×{options['patch']} pixels, replaced by {replacement}.", ""]
    lines += ["| method | area over the curve | 95 % |", "| --- | ---: | ---: |"]
    areas = sorted(sections["degrade"]["areas"].items(), key=lambda item: -item[1]["area"])
    for method, found in areas:
        band = "" if found["low"] is None else f"{found['low']:.4f} to {found['high']:.4f}"
        lines.append(f"| {method} | {found['area']:.4f} | {band} |")
    found = [method for method, _ in areas].index("patternattribution")
    soonest = "as in the paper" if found == 0 else f"differs, number {found + 1} of {len(areas)}"
    lines += ["", f"- By PatternAttribution, predictions fall soonest: {soonest}."]
    lines += [
        "",
        "![One image by every estimator, signal above attribution, as the paper's Figure 5](figure-5.png)",
        "",
        "![Images by method, as the paper's Figure 6](figure-6.png)",
    ]
    return "\n".join(lines) + "\n"


def compute_medians(quality: pa.Table) -> dict[str, dict[str, float]]:
    """Return the median ρ over the neurons of each operator, by estimator."""
    found: dict[str, dict[str, float]] = {}
    grouped = quality.drop_null().group_by(["estimator", "operator"], use_threads=False)
    for row in grouped.aggregate([("rho", "list")]).to_pylist():
        found.setdefault(row["estimator"], {})[row["operator"]] = float(np.median(row["rho_list"]))
    return found


def compare_findings(rho: dict[str, dict[str, float]], kinds: dict[str, str]) -> list[str]:
    """Compare the paper's findings for VGG-16 (§5, Figure 3) to the results.

    Args:
        rho: The median ρ of each operator, by estimator; medians within TOLERANCE are comparable.
        kinds: The operator type of each operator.

    Returns:
        A line of Markdown for each finding.
    """
    two = rho.get("two-component", {})
    gated = [name for name in kinds if name in two]  # an operator without a gate has no such estimator
    convolutions = [name for name in gated if kinds[name] == "convolution"]
    dense = [name for name in gated if kinds[name] == "linear"]
    later = [name for name in kinds if name in rho["filter"]][1:]
    claims = {
        "In convolutions, linear and two-component are comparable": {
            name: rho["linear"][name] - two[name] for name in convolutions
        },
        "In dense layers, two-component is best": {
            name: max(rho[other][name] for other in ("linear", "filter", "random")) - two[name] for name in dense
        },
        "Above the first layer, the filter is little better than random": {
            name: rho["filter"][name] - rho["random"][name] for name in later
        },
    }
    lines = []
    for claim, differences in claims.items():
        if not differences:
            continue
        best = claim.endswith("best")
        off = {name: d for name, d in differences.items() if (d > 0 if best else abs(d) > TOLERANCE)}
        verdict = (
            "as in the paper" if not off else "differs in " + ", ".join(f"`{n}` ({d:+.4f})" for n, d in off.items())
        )
        lines.append(f"- {claim}: {verdict}.")
    return lines
