"""The command line: arguments → a job's config; errors → one line and an exit status.

Exit status: 0 done; 2 bad usage or input; 3 stopped short, nothing lost; 1 anything unforeseen.
"""

import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from patterns import CHOICES, METHODS, UserError
from ray_jobs.config import FITTED, ExplainConfig, FitConfig, ModelConfig, QualityConfig, Resources

app = typer.Typer(
    help="PatternNet and PatternAttribution for large models and datasets, on Ray.",
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)

DEFAULT_FIT, DEFAULT_METHODS = ",".join(FITTED), ",".join(ExplainConfig.methods)

Model = Annotated[str, typer.Option(help="torchvision:NAME, timm:NAME, package.module:factory or file.py:factory.")]
Weights = Annotated[str, typer.Option(help="File or URL of a state dict; `default`: the library's own; `random`.")]
Shards = Annotated[
    list[str],
    typer.Option(help="Tars, Parquet files or image folders: paths, URLs, {000..015}, globs, @LIST. Repeatable."),
]
Out = Annotated[Path, typer.Option(help="The run's folder, readable and writable by every worker.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples that go through the model at once.")]
MaxSamples = Annotated[int | None, typer.Option(min=1, help="At most so many samples, an equal share of each shard.")]
Precision = Annotated[str, typer.Option(help="float32 or float64.")]
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
Resize = Annotated[int | None, typer.Option(min=1, help="Shorter side before the centre crop.")]
Mean = Annotated[str | None, typer.Option(help="Mean per channel, for pixels in [0, 1]: 0.5,0.5,0.5.")]
Std = Annotated[str | None, typer.Option(help="Deviation per channel: 0.5,0.5,0.5.")]
PassThrough = Annotated[str, typer.Option(help="Operations whose usual gradient to take: gelu,layer_norm,…")]
Workers = Annotated[int | None, typer.Option(min=1, help="Workers at most; else as many as the cluster holds.")]
Gpus = Annotated[float | None, typer.Option(min=0, help="GPUs of a worker; else 1 where the cluster has any.")]
Cpus = Annotated[float, typer.Option(min=0, help="CPUs of a worker, and its threads.")]
MaxLoss = Annotated[float, typer.Option(min=0, help="Seconds of work that the loss of a worker may undo.")]
MinWorkers = Annotated[int, typer.Option(min=0, help="Workers to ask the cluster for even where it has no room now.")]
StallTimeout = Annotated[float, typer.Option(min=1, help="Seconds without a batch until a worker is replaced.")]
Retries = Annotated[int, typer.Option(min=0, help="Further attempts at a shard that failed.")]
MaxBadShards = Annotated[int, typer.Option(min=0, help="Shards that the job may go on without.")]
Address = Annotated[str | None, typer.Option(help="The Ray cluster; else RAY_ADDRESS, else Ray is started here.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("demo-run"),
    workers: Workers = 2,
    address: Address = None,
) -> None:
    """The whole way on packaged weights and photographs: shards, fit, explain, quality, a picture."""
    from ray_jobs.demo import demo as run_demo

    picture = run_demo(out.absolute(), Resources(workers=workers, address=address))
    say(
        f"""
Photographs and what each method says of them:             {picture}
The patterns' quality by layer and estimator:              {picture.parent / "run" / "quality.png"}
Patterns, tables, explanations of every photograph:        {picture.parent / "run"}
Shards to try things on:                                   {picture.parent / "shards"}

Next, the same on your own images:
  patternnet pack IMAGES SHARDS                 a folder of class folders → shards
  patternnet fit --model torchvision:resnet50 --shards 'SHARDS/*.tar' --out RUN
  patternnet explain --patterns RUN --shards 'SHARDS/*.tar' --methods patternattribution"""
    )


@app.command()
def pack(
    images: Annotated[Path, typer.Argument(help="A folder that holds one folder for each class.")],
    out: Annotated[Path, typer.Argument(help="The folder for the shards.")],
    per_shard: Annotated[int, typer.Option(min=1, help="Samples of a shard.")] = 1000,
    crops: Annotated[int, typer.Option(min=0, help="Random crops and flips in place of each image.")] = 0,
    size: Annotated[int, typer.Option(min=1, help="Height and width of a crop.")] = 256,
    seed: Seed = 0,
) -> None:
    """A folder of images → WebDataset shards."""
    from ray_jobs.pack import pack as run_pack

    shards = run_pack(images, out, per_shard, crops, size, seed)
    say(f"{len(shards)} shards in {out}, their classes in {out / 'classes.json'}")


@app.command()
def plan(
    model: Model,
    weights: Weights = "default",
    estimators: Estimators = DEFAULT_FIT,
    precision: Precision = "float32",
    seed: Seed = 0,
    image_size: ImageSize = None,
    resize: Resize = None,
    mean: Mean = None,
    std: Std = None,
    pass_through: PassThrough = "",
) -> None:
    """What a model needs: operators, gates, bytes of moments."""
    from patterns.estimators import parsed, wanted
    from patterns.moments import planned_bytes
    from patterns.operators import KIND_NAMES
    from patterns.patches import bytes_of
    from ray_jobs import models

    choices = words(estimators)
    sizes = image_size, resize, numbers(mean), numbers(std)
    config = ModelConfig(model, weights, precision, seed, *sizes, words(pass_through))
    parsed(choices)
    loaded = models.load(config)
    parsed(choices, loaded.network.operators)
    table = Table("operator", "kind", "weight", "gate", "moments", "for quality", box=None)
    total = 0
    for operator in loaded.network.operators.values():
        size = planned_bytes(operator, wanted(operator, choices))
        total += size
        gate = "several, so none" if operator.mixed_gates else ""
        if operator.gate is not None:
            gate = f"{operator.gate.low:g} < z < {operator.gate.high:g}"
        shape = "×".join(map(str, operator.weight.shape))
        sizes_of = megabytes(size), megabytes(bytes_of(operator))
        table.add_row(operator.name, KIND_NAMES[type(operator.kind)], shape, gate, *sizes_of)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    say(f"{len(loaded.network.operators)} operators; moments of {megabytes(total)} in each worker and each part")


@app.command()
def fit(
    model: Model,
    shards: Shards,
    out: Out,
    weights: Weights = "default",
    estimators: Estimators = DEFAULT_FIT,
    batch_size: BatchSize = 32,
    max_samples: MaxSamples = None,
    precision: Precision = "float32",
    seed: Seed = 0,
    image_size: ImageSize = None,
    resize: Resize = None,
    mean: Mean = None,
    std: Std = None,
    pass_through: PassThrough = "",
    workers: Workers = None,
    gpus_per_worker: Gpus = None,
    cpus_per_worker: Cpus = 1,
    max_loss: MaxLoss = 300,
    min_workers: MinWorkers = 0,
    stall_timeout: StallTimeout = 900,
    retries: Retries = 3,
    max_bad_shards: MaxBadShards = 0,
    address: Address = None,
) -> None:
    """Shards → moments → patterns. The same command on the same --out goes on where an earlier one ended."""
    from ray_jobs.fit import fit as run_fit
    from ray_jobs.shards import list_shards

    sizes = image_size, resize, numbers(mean), numbers(std)
    config = FitConfig(
        ModelConfig(model, weights, precision, seed, *sizes, words(pass_through)),
        list_shards(shards),
        str(out.absolute()),
        batch_size,
        words(estimators),
        max_samples,
        seed,
    )
    faults = min_workers, stall_timeout, retries, max_bad_shards
    resources = Resources(workers, gpus_per_worker, cpus_per_worker, max_loss, address, *faults)
    run = run_fit(config, resources)
    done = run.manifest()["fit"]
    say(
        f"fit: {done['samples']} samples of {done['shards']} shards, {done['refused']} refused "
        f"(quarantine.parquet). Patterns: {run.folder / 'patterns.safetensors'}"
    )


@app.command()
def merge(
    runs: Annotated[list[Path], typer.Argument(help="The folders of finished fits of different shards.")],
    out: Out,
    address: Address = None,
) -> None:
    """The moments of several fits → one fit of all their data."""
    from ray_jobs.fit import merge as run_merge

    merged = run_merge([str(run.absolute()) for run in runs], str(out.absolute()), Resources(address=address))
    done = merged.manifest()["fit"]
    say(f"merge: {done['samples']} samples of {done['shards']} shards. Patterns: {merged.folder}/patterns.safetensors")


@app.command()
def status(run: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """How far a run is, from its files alone: on any machine that sees them, whatever the cluster says."""
    from ray_jobs.run import Run, spoken_status

    for line in spoken_status(Run(run.absolute()), time.time()):
        say(line)


@app.command()
def solve(
    run: Annotated[Path, typer.Argument(help="The folder of a finished fit.")],
    estimators: Estimators,
    address: Address = None,
) -> None:
    """Patterns of further estimators from a finished fit's moments, without data."""
    from ray_jobs.fit import solve as run_solve

    solved = run_solve(str(run.absolute()), words(estimators), Resources(address=address))
    say(f"solve: {', '.join(solved.manifest()['fit']['solved'])}. Patterns: {solved.folder / 'patterns.safetensors'}")


@app.command()
def quality(
    patterns: Annotated[Path, typer.Option(help="The folder of a finished fit.")],
    shards: Shards,
    evaluate: Annotated[
        list[str] | None, typer.Option(help="Shards to evaluate on; by default every second one of --shards.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where the results go; by default the fit's folder.")] = None,
    operators: Annotated[
        str, typer.Option(help="Those judged: 'features.*,fc'; by default all of moderate size with several inputs.")
    ] = "",
    gram_positions: Annotated[int, typer.Option(min=1, help="Patches drawn from each image for each operator.")] = 16,
    batch_size: BatchSize = 32,
    max_samples: MaxSamples = None,
    seed: Seed = 0,
    workers: Workers = None,
    gpus_per_worker: Gpus = None,
    cpus_per_worker: Cpus = 1,
    max_loss: MaxLoss = 300,
    min_workers: MinWorkers = 0,
    stall_timeout: StallTimeout = 900,
    retries: Retries = 3,
    max_bad_shards: MaxBadShards = 0,
    address: Address = None,
) -> None:
    """Patterns + other shards → how good they are: ρ for each neuron, operator and estimator, and a figure."""
    from ray_jobs.quality import measure, medians
    from ray_jobs.run import Run
    from ray_jobs.shards import list_shards

    listed = list_shards(shards)
    if not evaluate and len(listed) < 2:
        raise UserError("--shards", "one shard cannot be parted in two", "Give more, or others by --evaluate.")
    regressed, evaluated = (listed, list_shards(evaluate)) if evaluate else (listed[::2], listed[1::2])
    config = QualityConfig(
        ModelConfig(**Run(patterns.absolute()).fitted_model()),
        str(patterns.absolute()),
        regressed,
        evaluated,
        str((out or patterns).absolute()),
        words(operators),
        gram_positions,
        batch_size,
        max_samples,
        seed,
    )
    faults = min_workers, stall_timeout, retries, max_bad_shards
    resources = Resources(workers, gpus_per_worker, cpus_per_worker, max_loss, address, *faults)
    run = measure(config, resources)
    for name, value in medians(run).items():
        say(f"{name:>24}  median ρ {value:.3f}")
    say(f"quality: {run.folder / 'quality.parquet'}, drawn in {run.folder / 'quality.png'}")


@app.command()
def explain(
    patterns: Annotated[Path, typer.Option(help="The folder of a finished fit.")],
    shards: Shards,
    out: Annotated[Path | None, typer.Option(help="Where explanations go; by default the fit's folder.")] = None,
    model: Annotated[str | None, typer.Option(help="The model; by default the fit's.")] = None,
    weights: Annotated[str | None, typer.Option(help="Its weights; by default where the fit found them.")] = None,
    methods: Annotated[str, typer.Option(help=f"Some of {', '.join(METHODS)}.")] = DEFAULT_METHODS,
    estimator: Estimators = "default",
    target: Annotated[str, typer.Option(help="The class explained: predicted or label.")] = "predicted",
    batch_size: BatchSize = 32,
    max_samples: MaxSamples = None,
    workers: Workers = None,
    gpus_per_worker: Gpus = None,
    cpus_per_worker: Cpus = 1,
    min_workers: MinWorkers = 0,
    stall_timeout: StallTimeout = 900,
    retries: Retries = 3,
    max_bad_shards: MaxBadShards = 0,
    address: Address = None,
) -> None:
    """Shards + patterns → explanations, one shard for each input shard."""
    from ray_jobs.explain import explain as run_explain
    from ray_jobs.run import Run
    from ray_jobs.shards import list_shards

    fitted = Run(patterns.absolute()).fitted_model()
    config = ExplainConfig(
        ModelConfig(**{**fitted, "spec": model or fitted["spec"], "weights": weights or fitted["weights"]}),
        str(patterns.absolute()),
        list_shards(shards),
        str((out or patterns).absolute()),
        batch_size,
        names(methods, METHODS, "--methods", "method"),
        words(estimator),
        target,
        max_samples,
    )
    faults = min_workers, stall_timeout, retries, max_bad_shards
    resources = Resources(workers, gpus_per_worker, cpus_per_worker, 0.0, address, *faults)
    run = run_explain(config, resources)
    done = run.manifest()["explain"]
    say(f"explain: {done['samples']} samples, {done['refused']} refused. Explanations: {run.folder / 'explanations'}")


def names(listed: str, table: Any, option: str, thing: str) -> tuple[str, ...]:
    """A comma-separated option whose words must stand in a table."""
    chosen = words(listed)
    unknown = [word for word in chosen if word not in table]
    if unknown or not chosen:
        raise UserError(option, f"no {thing} {(unknown or [''])[0]!r}", f"Choose from {', '.join(table)}.")
    return chosen


def words(listed: str) -> tuple[str, ...]:
    """A comma-separated option of words."""
    return tuple(word.strip() for word in listed.split(",") if word.strip())


def numbers(listed: str | None) -> tuple[float, ...] | None:
    """A comma-separated option of numbers."""
    try:
        return None if listed is None else tuple(map(float, listed.split(",")))
    except ValueError as error:
        raise UserError("--mean --std", f"{listed!r} are no numbers", "Write 0.5,0.5,0.5.") from error


def megabytes(size: int) -> str:
    """A size in MiB or GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def say(text: str) -> None:
    print(text, flush=True)


COMMANDS = {command.callback.__name__ for command in app.registered_commands if command.callback}


def main() -> None:
    """Run the program and exit with its status."""
    sys.exit(exit_status(sys.argv[1:]))


def exit_status(arguments: list[str]) -> int:
    """Run the program; gives its exit status. Bad usage and input are one line on stderr."""
    from ray_jobs.session import StoppedShortError

    warnings.filterwarnings("ignore")
    for library in ("torch", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        app(arguments, prog_name="patternnet", standalone_mode=False)
    except UserError as error:
        return complain(str(error), 2)
    except StoppedShortError as error:
        return complain(str(error), 3)
    except KeyboardInterrupt:
        return complain("interrupted; the same command goes on where this one ended", 3)
    except Exception as error:
        if hasattr(error, "format_message"):  # the command-line library's own complaints about usage
            if not (what := error.format_message()):  # no command at all: the help was shown
                return 2
            command = f" {arguments[0]}" if arguments[0] in COMMANDS else ""
            return complain(f"{what.rstrip('.')}. See patternnet{command} --help.", 2)
        raise
    return 0


def complain(line: str, exit_status: int) -> int:
    print(f"patternnet: {line}", file=sys.stderr, flush=True)
    return exit_status
