"""What a job is told to do, as values: the manifest holds their JSON."""

from dataclasses import dataclass
from typing import Literal

# They take every sum, so that all other estimators can be solved without data.
FITTED = ("linear", "two-component", "multivariate")

Log = Literal["plain", "json"]

CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class Preprocessing:
    """From an image to the model's input: resize, crop the center, (x - mean) / std per channel.

    Attributes:
        image_size: Height and width of the input.
        resize: The side that `crop_mode` resizes to.
        interpolation: A value of torchvision's InterpolationMode, as Pillow computes it.
        mean: Means of pixels in [0, 1]: one for grey images, three for RGB. Ready tensors may have any number.
        std: Standard deviations, as many as means.
        crop_mode: `center`: the shorter side is resized. `squash`: both sides are, and the aspect ratio changes.
            `border`: the longer side is resized, and the rest of the input is filled with the mean.
    """

    image_size: int
    resize: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_mode: str = "center"  # absent in the manifests of version 0.2.0

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (len(self.mean), self.image_size, self.image_size)


@dataclass(frozen=True)
class ModelConfig:
    """Which model, with which weights. None: as the model's library has it.

    weights: a path or URL; `default`, the library's own (or as a factory made them); a name of torchvision's, such as
    IMAGENET1K_V1; `random`, drawn from the seed.
    precision: float32; tf32: the same, with products of 10-bit mantissas on GPUs that have them; float64; bfloat16.
    pass_through: operations without a pattern whose usual gradient is accepted.
    strip_softmax: leave off a softmax, log-softmax or sigmoid that the model ends in.
    """

    spec: str
    weights: str = "default"
    precision: str = "float32"
    seed: int = 0
    image_size: int | None = None
    resize: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    pass_through: tuple[str, ...] = ()
    strip_softmax: bool = False


@dataclass(frozen=True)
class FitConfig:
    """A fit: shards → moments → patterns, in the folder `out`.

    memory: bytes that a worker may use for the model, a batch and the moments; None: as many as they take.
    until_converged: the relative standard error of the patterns at which the fit ends early; None: never.
    positions: of each image, that count for each operator; None: all; `auto`: as many as a few images say it needs.
    compile: the mode for full batches, of `torch.compile` or `cudagraphs`; None: they are not compiled.
    """

    model: ModelConfig
    shards: tuple[str, ...]
    out: str
    batch_size: int = 32
    estimators: tuple[str, ...] = FITTED
    max_samples: int | None = None
    seed: int = 0
    memory: int | None = None
    until_converged: float | None = None
    positions: int | Literal["auto"] | None = None
    compile: str | None = None


@dataclass(frozen=True)
class QualityConfig:
    """The quality of the patterns of the run in `patterns`: v regressed on `shards`, ρ evaluated on `evaluate`.

    operators: patterns of names; empty: all but those whose Gram matrix is large.
    positions: patches drawn from each image.
    """

    model: ModelConfig
    patterns: str
    shards: tuple[str, ...]
    evaluate: tuple[str, ...]
    out: str
    operators: tuple[str, ...] = ()
    positions: int = 16
    batch_size: int = 32
    max_samples: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class MethodsConfig:
    """Methods by the patterns of the run in `patterns`, on whole shards.

    estimator: of the methods that name none.  settings: all that is set of the methods, `{method}.{setting}`.
    """

    model: ModelConfig
    patterns: str
    shards: tuple[str, ...]
    out: str
    batch_size: int = 32
    methods: tuple[str, ...] = ("gradient", "patternnet", "patternattribution")
    estimator: tuple[str, ...] = ("default",)
    settings: tuple[tuple[str, float], ...] = ()
    max_samples: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class ExplainConfig(MethodsConfig):
    """An explanation of whole shards.

    target: see `ray_jobs.jobs.explain.targets`.  classes: the numbers of the model's classes by name.
    outputs: see `ray_jobs.runs.map_files`.  reduction, size: of the maps' channels, and of their height and width.
    compile: as of a fit.
    """

    target: str = "predicted"
    classes: tuple[tuple[str, int], ...] = ()
    outputs: tuple[str, ...] = ("npy", "png")
    reduction: str = "none"
    size: int | None = None
    compile: str | None = None


@dataclass(frozen=True)
class DegradeConfig(MethodsConfig):
    """The degradation of every image of some shards, patch after patch, in the order of each method's map.

    patch: its height and width in pixels.  steps: patches that are replaced at most.  replacement: what by; see
    `patterns.evaluation.degradation`.  least_first: the least relevant patches first.
    """

    patch: int = 9
    steps: int = 100
    replacement: str = "mean"
    least_first: bool = False


@dataclass(frozen=True)
class Resources:
    """What the workers of a job take from the cluster; may change between a run and its resumption.

    workers: at most so many; None: as many as the cluster holds, more and fewer as nodes come and go;
    0: none, the work is done in this process, without Ray.
    gpus_per_worker: None: one where the cluster has any.
    max_loss: seconds of work that the loss of a worker may undo.
    address: the cluster's; None: RAY_ADDRESS, else Ray is started on this machine.
    min_workers: asked of the cluster even where it does not hold them now, so that an autoscaler adds nodes.
    stall_timeout: seconds without a batch after which a worker is replaced.
    shard_timeout: seconds after which a shard is tried elsewhere, however busy its worker is.
    retries: further attempts at a shard that failed.  max_bad_shards: how many the job may go on without.
    max_bad_fraction: the fraction of rejected samples beyond which a job ends with an error. It is judged while the
        job runs, from 100 samples on, and at its end, whatever its size. A job that used no sample always fails.
    log: plain lines, or json, one object a line.
    """

    workers: int | None = None
    gpus_per_worker: float | None = None
    cpus_per_worker: float = 1
    max_loss: float = 900.0
    address: str | None = None
    min_workers: int = 0
    stall_timeout: float = 900.0
    shard_timeout: float = 6 * 3600.0
    retries: int = 3
    max_bad_shards: int = 0
    max_bad_fraction: float = 0.5
    log: Log = "plain"


def equal_share(total: int | None, item: int, items: int) -> int | None:
    """How many of `total` samples item number `item` of `items` gives: equal shares, whatever the order of work."""
    if total is None:
        return None
    return total // items + (item < total % items)
