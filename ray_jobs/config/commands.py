"""The options of the commands that are no jobs, and options of jobs that their manifests do not hold."""

# ruff: noqa: RUF009 - `option` returns a dataclass field
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ray_jobs.config.jobs import (
    DegradeConfig,
    FitConfig,
    MethodsConfig,
    QualityConfig,
    TargetConfig,
    describe_methods,
)
from ray_jobs.config.model import ModelConfig
from ray_jobs.config.option import Validated, metadata_of, option, required, same
from ray_jobs.config.resources import Resources
from ray_jobs.units import parse_duration

DATASETS = ("mnist", "fashion-mnist", "folder")
EXPORT_FORMATS = ("fiftyone", "virelay", "huggingface", "coco")


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """Options for reading the shards of a command."""

    allow_pipes: bool = option(False, "Allow shards of the form pipe:COMMAND.")
    image_column: str | None = option(
        None, "Column of Parquet files with the images, or with their URLs or paths (default: the column of bytes)."
    )
    image_base: str | None = option(
        None,
        "Folder or URL below which the column may name images (default: the folder of each Parquet file).",
        parse="path",
    )


@dataclass(frozen=True, kw_only=True)
class FitOptions(ShardOptions):
    """Options of one call of `fit`."""

    retry_quarantined: bool = option(False, "Process only the samples that were rejected.")


@dataclass(frozen=True, kw_only=True)
class AtlasOptions(ShardOptions):
    """Options of one call of `atlas`."""

    page: Path | None = option(None, "HTML file (default: atlas.html in the run's folder).", parse="local path")


@dataclass(frozen=True, kw_only=True)
class FittedModel(Validated):
    """The model of a finished fit, if it is to be loaded with other weights or in another precision."""

    spec: str | None = same(ModelConfig, "spec", default=None, help="Model (default: the fit's).")
    weights: str | None = same(
        ModelConfig, "weights", default=None, help="File or URL of its weights (default: the fit's)."
    )
    precision: str | None = same(
        ModelConfig, "precision", default=None, help="Precision of the model (default: the fit's)."
    )


@dataclass(frozen=True, kw_only=True)
class ClassNames:
    """The names of the model's classes."""

    classes: str | None = option(
        None,
        "File or URL with class names: a JSON list, a JSON object (as `pack` writes), or one name per line.",
        parse="path",
    )


@dataclass(frozen=True, kw_only=True)
class AddressOptions:
    """The Ray cluster that a command uses."""

    address: str | None = same(Resources, "address")


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Validated, AddressOptions):
    """Options of `demo`."""

    out: Path = option(Path("demo-run"), "Folder of shards, weights, run and picture.", parse="local path")
    workers: int | None = same(Resources, "workers", default=2)


@dataclass(frozen=True, kw_only=True)
class PackOptions(Validated):
    """Options of `pack`."""

    images: Path = field(
        metadata=required("Folder that holds one folder per class.", argument=True, parse="local path")
    )
    out: Path = field(metadata=required("Folder of the shards.", argument=True, parse="local path"))
    per_shard: int = option(1000, "Samples per shard.", min=1)
    crops: int = option(0, "Random crops and flips that replace each image.", min=0)
    size: int = option(256, "Height and width of a crop.", min=1)
    seed: int = same(ModelConfig, "seed")
    keys: str | None = same(
        FitConfig, "keys", help="List of the images to pack, as `select` writes it; shards are ignored."
    )
    without_keys: str | None = same(
        FitConfig, "without_keys", help="List of the images to leave out, in the same format."
    )


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Validated):
    """Options of `plan`, in addition to the model's. With `shards`, a pilot of a few batches is run."""

    shards: tuple[str, ...] = same(
        FitConfig,
        "shards",
        default=(),
        help="Shards of the fit: a pilot of a few batches then shows its time, hours, bytes and cost. Repeatable.",
        required=False,
    )
    out: str | None = same(
        FitConfig,
        "out",
        default=None,
        help="Folder or URL for the files of the pilot, which are deleted: every worker writes it (default: a folder "
        "of this machine).",
        required=False,
    )
    max_samples: int | None = same(FitConfig, "max_samples")
    positions: int | Literal["auto"] | None = same(FitConfig, "positions")
    compile: str | None = same(FitConfig, "compile")

    estimators: tuple[str, ...] = same(FitConfig, "estimators")
    preset: str | None = same(
        MethodsConfig, "preset", help="Preset that the column `explained by` shows (default: class-specific)."
    )
    batch_size: int = same(FitConfig, "batch_size")
    memory: int | None = same(FitConfig, "memory")


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The run that a command reads."""

    run: str = field(metadata=required("Folder or URL of a run.", argument=True, parse="path"))


@dataclass(frozen=True, kw_only=True)
class StatusOptions(RunFolder):
    """Options of `status`."""

    price: str | None = same(Resources, "price", help="Price of the workers (default: what the job was given).")


@dataclass(frozen=True, kw_only=True)
class MergeOptions(AddressOptions):
    """Options of `merge`."""

    runs: tuple[str, ...] = field(
        metadata=required(
            "Folders or URLs of finished fits of different shards.", argument=True, parse="path", repeated=True
        )
    )
    out: str = field(metadata=metadata_of(FitConfig, "out"))


@dataclass(frozen=True, kw_only=True)
class SolveOptions(AddressOptions, RunFolder):
    """Options of `solve`."""

    estimators: tuple[str, ...] = field(metadata=metadata_of(FitConfig, "estimators"))


@dataclass(frozen=True, kw_only=True)
class GridOptions(Validated, ClassNames, RunFolder):
    """Options of `grid`."""

    keys: str = option("", "Keys of the samples to draw, in this order: KEY,KEY.")
    worst: int = option(0, "Number of wrong predictions to draw, the most confident first.", min=0)
    random: int = option(0, "Number of randomly chosen samples to draw.", min=0)
    out: Path | None = option(None, "PNG or PDF file (default: grid.png in the run's folder).", parse="local path")
    columns: int = option(1, "Photographs per row.", min=1)
    seed: int = same(ModelConfig, "seed")


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Validated, ClassNames):
    """Options of `report`."""

    runs: tuple[str, ...] = field(
        metadata=required(
            "Folders or URLs of runs. Several runs are compared.", argument=True, parse="path", repeated=True
        )
    )
    out: Path | None = option(None, "HTML file (default: report.html in the first run's folder).", parse="local path")
    samples: int = option(200, "Randomly chosen explained samples of each run.", min=0)
    seed: int = same(ModelConfig, "seed")
    price: str | None = same(StatusOptions, "price")


@dataclass(frozen=True, kw_only=True)
class SelectOptions(RunFolder):
    """Options of `select`."""

    expression: str = field(
        metadata=required("Comparisons of columns of samples.parquet with and, or, not and parentheses.", argument=True)
    )
    out: Path = option(Path("selection"), "Folder for keys.txt and shards.txt.", parse="local path")


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Validated, ClassNames, RunFolder):
    """Options of `export`."""

    to: str = field(metadata=required("Format of the dataset.", choices=EXPORT_FORMATS))
    out: Path = field(metadata=required("Folder of the dataset. It must not exist, or be empty.", parse="local path"))
    atlas: str | None = option(
        None, "Folder of an atlas of the same samples, for the clusters (default: the run's, if any).", parse="path"
    )
    method: str | None = option(None, "Method of the maps (default: patternattribution, or else the run's first).")
    threshold: float = option(
        0.5, "coco: share of the largest relevance from which cells belong to the box of an image.", min=0, max=1
    )


def backward_passes_help() -> str:
    """Return the help text of methods that are backward passes of the network."""
    from patterns.attribution import BACKWARD_PASSES

    return describe_methods(BACKWARD_PASSES)


@dataclass(frozen=True, kw_only=True)
class ExportModelOptions(Validated, ClassNames, RunFolder):
    """Options of `export-model`."""

    to: Path = field(
        metadata=required("File to write: NAME.pt2 (torch.export) or NAME.onnx (extra onnx).", parse="local path")
    )
    methods: tuple[str, ...] = same(
        MethodsConfig, "methods", default=("patternattribution",), help=backward_passes_help
    )
    estimator: tuple[str, ...] = same(MethodsConfig, "estimator")
    preset: str | None = same(MethodsConfig, "preset")
    target: str = same(
        TargetConfig,
        "target",
        help="What to explain: predicted, second, top-K, a class by number or name, A-vs-B, A-vs-others, contrast, "
        "OPERATOR:NEURON or OPERATOR:strongest; of embeddings unit:NUMBER or similarity:FILE.npy.",
    )


@dataclass(frozen=True, kw_only=True)
class ShowOptions(ClassNames, RunFolder):
    """Options of `show`."""

    key: str = field(metadata=required("Key of the sample.", argument=True))
    out: Path | None = option(None, "PNG or PDF file (default: KEY.png in the run's folder).", parse="local path")


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(Validated, ShardOptions, AddressOptions):
    """Options of `doctor`, with the values of the job that is to run."""

    shards: tuple[str, ...] = option((), "Shards that the job will read. Repeatable.", repeated=True)
    out: str | None = option(None, "Folder or URL that the job will write.", parse="path")
    gpus_per_worker: float | None = same(Resources, "gpus_per_worker")
    cpus_per_worker: float | None = same(Resources, "cpus_per_worker")
    min_workers: int = same(Resources, "min_workers")
    patience: float = option(120.0, "Time that a node may take to answer.", parse=parse_duration)


@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """Options of `submit`."""

    command: tuple[str, ...] = field(
        metadata=required("Command of this program with its options.", argument=True, repeated=True)
    )
    address: str = field(
        metadata=required("Address of the cluster's dashboard: http://HEAD:8265.", environment="RAY_API_SERVER_ADDRESS")
    )
    working_dir: str | None = option(
        None, "Folder to send and to run in (default: the program that is installed on the cluster).", parse="path"
    )
    pip: tuple[str, ...] = option((), "Package to install for the job. Repeatable.", repeated=True)
    env: tuple[str, ...] = option(
        (), "Environment variable of the job: NAME=VALUE, or NAME for its value here. Repeatable.", repeated=True
    )
    uv: bool = option(
        True,
        "Run in the environment of the working directory's uv.lock, if it has one. uv must be installed on every node.",
        flag="--uv/--no-uv",
    )
    wait: bool = option(True, "Show the log until the job ends.", flag="--wait/--no-wait")
    patience: float = option(3600.0, "Time for which the cluster may fail to answer.", parse=parse_duration)


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions(Validated, ShardOptions):
    """Options of `reproduce`. None of the degradation's values: the paper's, and smaller values for small images."""

    out: Path = field(metadata=required("Folder of the run, the figures and results.md.", parse="local path"))
    dataset: str = option("folder", "Data set, or `folder` for images in folders or shards.", choices=DATASETS)
    data: Path | None = option(
        None, "Folder of the data: the four idx files of the digits, or train/ and test/.", parse="local path"
    )
    spec: str | None = same(
        ModelConfig, "spec", default=None, help="Model (default for digits: a small network is trained)."
    )
    weights: str = same(ModelConfig, "weights")
    shards: tuple[str, ...] = same(
        FitConfig, "shards", default=(), help="Shards of training data instead of --data. Repeatable."
    )
    evaluate: tuple[str, ...] = same(
        QualityConfig, "evaluate", default=(), help="Shards of test data instead of --data. Repeatable."
    )
    image_size: int | None = same(ModelConfig, "image_size")
    resize: int | None = same(ModelConfig, "resize")
    mean: tuple[float, ...] | None = same(ModelConfig, "mean")
    std: tuple[float, ...] | None = same(ModelConfig, "std")
    strip_softmax: bool = same(ModelConfig, "strip_softmax")
    patch: int | None = same(
        DegradeConfig,
        "patch",
        default=None,
        help="Height and width of a patch in pixels (default: 9, and 4 for small images).",
    )
    steps: int | None = same(
        DegradeConfig, "steps", default=None, help="Number of patches that are replaced (default: 100, or all)."
    )
    replacement: str | None = same(
        DegradeConfig,
        "replacement",
        default=None,
        help="What replaces a patch (default: mean, and zero for small images).",
    )
    degraded: int = option(1000, "Number of test images that are degraded.", min=1)
    batch_size: int = same(FitConfig, "batch_size")
    max_samples: int | None = same(FitConfig, "max_samples")
    seed: int = same(ModelConfig, "seed")
