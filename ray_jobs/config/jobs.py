"""The configs of the jobs. Manifests hold their JSON, so a field that is renamed or removed breaks older runs."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from ray_jobs.config.model import ModelConfig
from ray_jobs.config.option import Validated, metadata_of, option, required, same
from ray_jobs.config.parsing import parse_setting
from ray_jobs.units import parse_bytes, parse_positions

# These estimators take all sums, so that every other estimator can be solved later without data.
FITTED = ("linear", "two-component", "multivariate")
MEASURES = (
    "degradation", "pointing", "class", "random-top", "random-half", "random-all", "random-all-refit", "shift",
)  # fmt: skip
# The methods that an evaluation compares: each preset of each method with patterns.
OURS = tuple(
    f"{method}:{preset}"
    for method in ("patternnet", "patternattribution")
    for preset in ("paper", "linear", "own-mean", "class-specific")
)
AUTO: Literal["auto"] = "auto"
OUTPUTS = ("npy", "png", "parquet", "zarr")
CLUSTERED = ("maps", "channels")
REDUCTIONS = ("none", "sum", "abs-sum", "abs-max")


def estimators_help() -> str:
    """Return the help text of the estimators."""
    from patterns import CHOICES

    return f"Estimators ({', '.join(CHOICES)}), or an estimator by operator: 'features.*=linear,classifier.*=filter'."


def methods_help() -> str:
    """Return the help text of the methods."""
    from patterns import METHODS

    return describe_methods(METHODS)


def describe_methods(names: Iterable[str]) -> str:
    """Return the help text of some methods."""
    from patterns.attribution import WITH_PATTERNS

    return f"Methods ({', '.join(names)}); {' and '.join(WITH_PATTERNS)} also as METHOD:ESTIMATOR."


def presets_help() -> str:
    """Return the help text of the presets."""
    from patterns import PRESETS

    listed = "; ".join(f"{name}: {preset.description[:-1]}" for name, preset in PRESETS.items())
    return f"Estimators of the operators that --estimators leaves out (default: class-specific). {listed}."


def list_presets() -> tuple[str, ...]:
    """Return the names of the presets."""
    from patterns import PRESETS

    return tuple(PRESETS)


def list_replacements() -> tuple[str, ...]:
    """Return the names of the values that can replace a patch."""
    from patterns.evaluation import REPLACEMENTS

    return tuple(REPLACEMENTS)


def validate_compile_mode(mode: str) -> None:
    """Raise UserError if a mode of compilation does not exist."""
    from patterns.compilation import compiler_options

    if mode != AUTO:
        compiler_options(mode)


def parse_compile_mode(text: str) -> str | None:
    """Return a mode of compilation; `none` is None."""
    return None if text == "none" else text


@dataclass(frozen=True, kw_only=True)
class FitConfig(Validated):
    """A fit: shards → moments → patterns, in the folder `out`."""

    model: ModelConfig
    shards: tuple[str, ...] = field(
        metadata=required(
            "Tar files, Parquet files or image folders: paths, URLs, {000..015}, globs, @LIST. Repeatable.",
            repeated=True,
        )
    )
    out: str = field(metadata=required("Folder or URL of the run. Every worker reads and writes it.", parse="path"))
    batch_size: int = option(32, "Samples per batch.", min=1)
    estimators: tuple[str, ...] = option(FITTED, estimators_help, flag="--estimators", aliases=("--estimator",))
    max_samples: int | None = option(
        None, "Maximum number of samples, an equal share from the start of each shard (default: all).", min=1
    )
    seed: int = same(ModelConfig, "seed")
    memory: int | None = option(
        None,
        "Memory budget per worker, for example 16G. If the moments do not fit, the data are read in several passes.",
        parse=parse_bytes,
        metavar="SIZE",
    )
    until_converged: float | None = option(
        None, "Stop when 90 % of the patterns have a relative standard error below this value, for example 0.05.", min=0
    )
    positions: int | Literal["auto"] | None = option(
        AUTO,
        "Spatial positions per image and operator, drawn at random. `auto`: all for fewer than 5,000 images; otherwise "
        "the smallest number whose expected relative standard error, estimated on 64 images, is at most 1 %.",
        parse=parse_positions,
        metavar="N|all|auto",
        min=1,
    )
    keys: str | None = option(
        None, "List of the samples to use, as `select` writes it (default: all samples).", parse="path"
    )
    without_keys: str | None = option(None, "List of samples to leave out, as `select` writes it.", parse="path")
    concepts: str | None = option(
        None,
        "Parquet file of concepts, whose directions are fitted too: a column `key`, optionally `shard`, and for each "
        "concept a column of numbers or booleans.",
        parse="path",
    )
    compile: str | None = option(
        AUTO,
        "Compile full batches: `cudagraphs` (GPU, recorded in seconds), a mode of torch.compile (compiled in minutes) "
        "or `none`. `auto`: CUDA graphs on a GPU if the model can be recorded.",
        parse=parse_compile_mode,
        metavar="MODE",
        validate=validate_compile_mode,
    )

    def __post_init__(self) -> None:
        """Raise UserError for a wrong value, and for values that exclude each other."""
        super().__post_init__()
        if self.compile not in (None, AUTO) and isinstance(self.positions, int):
            from patterns import UserError

            remedy = "Leave out `compile` or `positions`."
            raise UserError("", "sums over sampled positions cannot be compiled", remedy, "compile")
        if self.compile not in (None, AUTO) and self.concepts is not None:
            from patterns import UserError

            raise UserError("", "sums of concepts cannot be compiled", "Leave out `compile` or `concepts`.", "compile")


@dataclass(frozen=True, kw_only=True)
class QualityConfig(Validated):
    """The quality of the patterns of the run `patterns`: v is regressed on `shards`, ρ is evaluated on `evaluate`.

    If `operators` is empty, all operators are evaluated except those with a large Gram matrix.
    """

    model: ModelConfig
    patterns: str = field(metadata=required("Folder or URL of a finished fit.", parse="path"))
    shards: tuple[str, ...] = field(metadata=metadata_of(FitConfig, "shards"))
    evaluate: tuple[str, ...] = field(
        metadata=required(
            "Shards to evaluate on (default: every second shard of --shards). Repeatable.",
            repeated=True,
            required=False,
        )
    )
    out: str = field(
        metadata=required("Folder or URL of the results (default: the fit's).", parse="path", required=False)
    )
    operators: tuple[str, ...] = option(
        (), "Operators to evaluate: 'features.*,fc' (default: all of moderate size with several inputs)."
    )
    positions: int = option(
        16, "Spatial positions per image and operator, drawn at random.", min=1, former="--gram-positions"
    )
    batch_size: int = same(FitConfig, "batch_size")
    max_samples: int | None = same(FitConfig, "max_samples")
    seed: int = same(ModelConfig, "seed")


@dataclass(frozen=True, kw_only=True)
class MethodsConfig(Validated):
    """Methods by the patterns of the run `patterns`, on whole shards.

    `estimator` and `preset` serve the methods that name no estimator. `settings` are pairs of `METHOD.SETTING` and its
    value.
    """

    model: ModelConfig
    patterns: str = field(metadata=metadata_of(QualityConfig, "patterns"))
    shards: tuple[str, ...] = field(metadata=metadata_of(FitConfig, "shards"))
    out: str = field(metadata=metadata_of(QualityConfig, "out"))
    batch_size: int = same(FitConfig, "batch_size")
    methods: tuple[str, ...] = option(("gradient", "patternnet", "patternattribution"), methods_help)
    estimator: tuple[str, ...] = same(FitConfig, "estimators", default=("default",))
    preset: str | None = option(None, presets_help, choices=list_presets)
    settings: tuple[tuple[str, float], ...] = option(
        (),
        "Setting of a method: smoothgrad.samples=50. Repeatable.",
        flag="--set",
        parse=parse_setting,
        repeated=True,
        metavar="METHOD.SETTING=NUMBER",
    )
    max_samples: int | None = same(FitConfig, "max_samples")
    keys: str | None = same(FitConfig, "keys")
    without_keys: str | None = same(FitConfig, "without_keys")
    seed: int = same(ModelConfig, "seed")

    @property
    def estimators(self) -> tuple[str, ...]:
        """The choices of estimators for the methods that name none: the first that applies to an operator counts."""
        return (*(each for each in self.estimator if each != "default"), self.preset or "default")


@dataclass(frozen=True, kw_only=True)
class TargetConfig(MethodsConfig):
    """Methods with a target that is parsed by `ray_jobs.jobs.explain.targets`.

    `classes` are pairs of a class's name and number, `vector` is what the embeddings are compared with by the target
    `similarity:FILE`.
    """

    target: str = option(
        "predicted",
        "What to explain: predicted, second, label, top-K, a class by number or name, A-vs-B, A-vs-others, contrast, "
        "OPERATOR:NEURON, OPERATOR:strongest, concept:NAME or OPERATOR:concept:NAME; of dense outputs CLASS@mask, "
        "CLASS@predicted or CLASS@box; of embeddings unit:NUMBER or similarity:FILE.npy.",
    )
    classes: tuple[tuple[str, int], ...] = ()
    vector: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExplainConfig(TargetConfig):
    """An explanation of whole shards. `reduction` and `size` apply to the channels, and to the height and width."""

    outputs: tuple[str, ...] = option(("npy", "png"), "Formats of the maps.", flag="--output", choices=OUTPUTS)
    reduction: str = option("none", "Reduction of the maps' channels.", flag="--reduce-channels", choices=REDUCTIONS)
    size: int | None = option(
        None, "Height and width of the maps (default: the input's).", flag="--map-size", former="--resize", min=1
    )
    compile: str | None = same(
        FitConfig,
        "compile",
        default=None,  # CUDA graphs save at most 3 % of the time here, and take as much memory again
        help="Compile full batches: `cudagraphs` (GPU, recorded in seconds) or a mode of torch.compile (compiled in "
        "minutes) (default: none).",
    )


@dataclass(frozen=True, kw_only=True)
class AtlasConfig(TargetConfig):
    """An atlas of the samples of whole shards; see `ray_jobs.jobs.atlas`.

    `explanations` is the run of a finished `explain`, whose stored maps then replace the pass.
    """

    methods: tuple[str, ...] = same(
        MethodsConfig,
        "methods",
        default=("patternattribution",),
        help="Method: patternattribution, also with :ESTIMATOR, or gradient-x-input. With --explanations: theirs.",
        aliases=("--method",),
    )
    target: str = same(
        TargetConfig,
        "target",
        help="What to explain: predicted, second, label, a class by number or name, A-vs-B, A-vs-others, contrast.",
    )
    operators: tuple[str, ...] = option(
        (), "Operators whose channels are recorded (default: the last operator of each resolution)."
    )
    explanations: str | None = option(
        None, "Folder or URL of a finished explain whose stored maps are used instead of a new pass.", parse="path"
    )
    pooled: int = option(14, "Height and width to which maps are pooled.", min=2, max=64)
    top: int = option(10, "Samples in each list: prototypes, typical samples, top samples of a channel.", min=1)
    cluster_by: str = option("maps", "What the samples of a class are clustered by.", choices=CLUSTERED)
    cluster_operator: str | None = option(
        None, "Operator whose channels samples are clustered by (default: the last one that is recorded)."
    )
    neighbors: int = option(10, "Nearest neighbors of each sample in the graph that is clustered.", min=2)
    max_clusters: int = option(12, "Maximum number of clusters of a class.", min=1)
    compile: str | None = same(ExplainConfig, "compile")


@dataclass(frozen=True, kw_only=True)
class ConceptsConfig(TargetConfig):
    """Sensitivity of the scores of classes to the concepts of the run `patterns`; see `ray_jobs.jobs.concepts`."""

    methods: tuple[str, ...] = ("gradient",)  # no option, as the next three
    estimator: tuple[str, ...] = ("default",)
    preset: str | None = None
    settings: tuple[tuple[str, float], ...] = ()
    target: str = same(
        TargetConfig,
        "target",
        help="Class whose score is differentiated: predicted, label, or a class by number or name.",
    )


@dataclass(frozen=True, kw_only=True)
class DegradeConfig(MethodsConfig):
    """The degradation of every image of some shards, patch after patch, in the order of each method's map."""

    patch: int = option(9, "Height and width of a patch in pixels.", flag="--patch-size", min=1)
    steps: int = option(100, "Number of patches that are replaced one after another.", min=1)
    replacement: str = option("mean", "What replaces a patch.", choices=list_replacements)
    least_first: bool = option(False, "Replace the least relevant patches first.")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DegradeConfig):
    """An evaluation of methods by several measures; see `ray_jobs.jobs.evaluation_measures`."""

    methods: tuple[str, ...] = same(
        MethodsConfig, "methods", default=("gradient", "gradient-x-input", "lrp-epsilon-plus-flat", *OURS)
    )
    measures: tuple[str, ...] = option(MEASURES, "Measures.", flag="--measures", choices=MEASURES)
    target: str = option(
        "predicted",
        "What maps explain: the class, or the class less the weighted mean of the others.",
        choices=("predicted", "contrast"),
    )
    refit_samples: int = option(256, "Samples on which patterns of random weights are fitted.", min=1)
    patch: int = same(DegradeConfig, "patch", default=16)
    steps: int = same(DegradeConfig, "steps", default=30)
