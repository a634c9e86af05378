"""The options of the command line, and their defaults."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from patterns import CHOICES, METHODS
from patterns.attribution import WITH_PATTERNS
from ray_jobs.config import FITTED, ExplainConfig, Log, Resources
from ray_jobs.io.file_systems import expanded
from ray_jobs.io.object_store import local_file, plain
from ray_jobs.jobs.explain.map_statistics import REDUCTIONS
from ray_jobs.runs.map_files import OUTPUTS
from ray_jobs.units import byte_count, duration, position_count

DEFAULT_FIT, DEFAULT_METHODS = ",".join(FITTED), ",".join(ExplainConfig.methods)
DEFAULT_OUTPUTS = ",".join(ExplainConfig.outputs)

# What all options that name a file or folder go through; shards are listed by `ray_jobs.data.shard_specs`.
PLACE: dict[str, Any] = {"parser": plain, "metavar": "PATH"}
LOCAL: dict[str, Any] = {"parser": local_file, "metavar": "PATH"}
NAME: dict[str, Any] = {"parser": expanded, "metavar": "TEXT"}

Model = Annotated[str, typer.Option(**NAME, help="torchvision:NAME, timm:NAME, module:factory or file.py:factory.")]
Weights = Annotated[
    str, typer.Option(**PLACE, help="File or URL of a state dict, `default` (the library's) or `random`.")
]
Shards = Annotated[
    list[str],
    typer.Option(help="Tars, Parquet files or image folders: paths, URLs, {000..015}, globs, @LIST. Repeatable."),
]
AllowPipes = Annotated[bool, typer.Option("--allow-pipes", help="Take shards of the form pipe:COMMAND.")]
Out = Annotated[str, typer.Option(**PLACE, help="The run's folder, or its URL, that every worker reads and writes.")]
RunFolder = Annotated[str, typer.Argument(**PLACE, help="The folder, or URL, of a run.")]
Fitted = Annotated[str, typer.Option(**PLACE, help="The folder, or URL, of a finished fit.")]
FitModel = Annotated[str | None, typer.Option(**NAME, help="The model; by default the fit's.")]
FitWeights = Annotated[str | None, typer.Option(**PLACE, help="Its weights; by default where the fit found them.")]
FitPrecision = Annotated[str | None, typer.Option(help="float32, tf32, float64 or bfloat16; by default the fit's.")]
Memory = Annotated[
    int | None,
    typer.Option(
        parser=byte_count, help="A worker's for model, batch and moments: 16G; what does not fit takes further passes."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples that go through the model at once.")]
MaxSamples = Annotated[int | None, typer.Option(min=1, help="At most so many samples, an equal share of each shard.")]
Precision = Annotated[str, typer.Option(help="float32, tf32 (with faster products on a GPU), float64 or bfloat16.")]
Seed = Annotated[int, typer.Option(help="For everything random.")]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Input height and width; else as the library has it.")]
Estimators = Annotated[
    str,
    typer.Option(
        "--estimators",
        "--estimator",
        help=f"Some of {', '.join(CHOICES)}; or for operators by name: 'features.*=linear,classifier.*=filter'.",
    ),
]
UntilConverged = Annotated[
    float | None,
    typer.Option(min=0, help="End early once nine in ten patterns have a relative standard error below this: 0.05."),
]
Positions = Annotated[
    int | None,
    typer.Option(
        parser=position_count, metavar="N|all|auto", help="How many positions of each image count, drawn at random."
    ),
]
Compile = Annotated[
    str | None,
    typer.Option(
        metavar="MODE",
        help="Compile full batches: `cudagraphs` on a GPU, in seconds, or a mode of torch.compile, in minutes.",
    ),
]
RetryQuarantined = Annotated[
    bool, typer.Option("--retry-quarantined", help="Take up the samples that were refused, and these only.")
]
Resize = Annotated[int | None, typer.Option(min=1, help="Shorter side before the centre crop.")]
Mean = Annotated[str | None, typer.Option(help="Mean per channel, for pixels in [0, 1]: 0.5,0.5,0.5.")]
Std = Annotated[str | None, typer.Option(help="Deviation per channel: 0.5,0.5,0.5.")]
PassThrough = Annotated[str, typer.Option(help="Operations whose usual gradient to take: gelu,layer_norm,…")]
StripSoftmax = Annotated[
    bool,
    typer.Option("--strip-softmax", help="Leave off the softmax, log-softmax or sigmoid that the model ends in."),
]
Methods = Annotated[
    str, typer.Option(help=f"Some of {', '.join(METHODS)}; {' and '.join(WITH_PATTERNS)} also as METHOD:ESTIMATOR.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="A method's setting: smoothgrad.samples=50. Repeatable.")
]
TargetSpec = Annotated[
    str,
    typer.Option(help="predicted, second, label, top-K, a class by number or name, A-vs-B, or OPERATOR:NEURON."),
]
Classes = Annotated[
    str | None,
    typer.Option(
        **PLACE, help="Names of the classes: a JSON list, a JSON object (as `pack` writes), or a name a line."
    ),
]
OutputKinds = Annotated[str, typer.Option("--output", help=f"Some of {', '.join(OUTPUTS)}.")]
MapSize = Annotated[int | None, typer.Option("--resize", min=1, help="Height and width of the maps that are written.")]
Reduction = Annotated[str, typer.Option("--reduce-channels", help=f"One of {', '.join(REDUCTIONS)}.")]
Address = Annotated[str | None, typer.Option(help="The Ray cluster; else RAY_ADDRESS, else Ray is started here.")]
Workers = Annotated[
    int | None, typer.Option(min=0, help="Workers at most; else as many as the cluster holds. 0: here, without Ray.")
]

# The options of everything in Resources, which all jobs over shards take.
RESOURCES: dict[str, Any] = {
    "workers": Workers,
    "gpus_per_worker": Annotated[
        float | None, typer.Option(min=0, help="GPUs of a worker; else 1 where the cluster has any.")
    ],
    "cpus_per_worker": Annotated[float, typer.Option(min=0, help="CPUs of a worker, and its threads.")],
    "max_loss": Annotated[
        float, typer.Option(parser=duration, help="Work that the loss of a worker may undo: 90s, 15m, 2h.")
    ],
    "address": Address,
    "min_workers": Annotated[
        int, typer.Option(min=0, help="Workers to ask the cluster for even where it has no room now.")
    ],
    "stall_timeout": Annotated[
        float, typer.Option(parser=duration, help="Time without a batch until a worker is replaced.")
    ],
    "shard_timeout": Annotated[
        float,
        typer.Option(parser=duration, help="Time for a shard until it is tried elsewhere, however busy its worker."),
    ],
    "retries": Annotated[int, typer.Option(min=0, help="Further attempts at a shard that failed.")],
    "max_bad_shards": Annotated[int, typer.Option(min=0, help="Shards that the job may go on without.")],
    "max_bad_fraction": Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Fraction of rejected samples above which the job fails; judged from 100 samples on and at the end.",
        ),
    ],
    "log": Annotated[Log, typer.Option(help="Lines for people, or one JSON object a line.")],
}


def with_resources(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes `resources`, with an option for each field of it instead."""

    @wraps(command)
    def taking_options(**options: Any) -> None:
        command(resources=Resources(**{name: options.pop(name) for name in RESOURCES}), **options)

    own = inspect.signature(command)
    defaults, keyword = Resources(), inspect.Parameter.KEYWORD_ONLY
    kept = [p.replace(kind=keyword) for p in own.parameters.values() if p.name != "resources"]
    more = [inspect.Parameter(n, keyword, default=getattr(defaults, n), annotation=o) for n, o in RESOURCES.items()]
    taking_options.__signature__ = own.replace(parameters=[*kept, *more])  # type: ignore[attr-defined]
    return taking_options
