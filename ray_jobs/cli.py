"""The command line: arguments → a job's config; errors → one line and an exit status.

Exit status: 0 done; 2 bad usage or input; 3 stopped short, nothing lost; 1 anything unforeseen.
"""

import logging
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from patterns import UserError
from patterns.degradation import PATCH, REPLACEMENTS, STEPS
from patterns.methods import method_of, settings_of
from ray_jobs.config import DegradeConfig, ExplainConfig, FitConfig, ModelConfig, QualityConfig, Resources
from ray_jobs.files import here, located
from ray_jobs.options import (
    DEFAULT_FIT,
    DEFAULT_METHODS,
    DEFAULT_OUTPUTS,
    Address,
    AllowPipes,
    BatchSize,
    Classes,
    Estimators,
    FitModel,
    FitPrecision,
    Fitted,
    FitWeights,
    ImageSize,
    MapSize,
    MaxSamples,
    Mean,
    Memory,
    Methods,
    Model,
    Out,
    OutputKinds,
    PassThrough,
    Positions,
    Precision,
    Reduction,
    Resize,
    RetryQuarantined,
    RunFolder,
    Seed,
    Settings,
    Shards,
    Std,
    TargetSpec,
    UntilConverged,
    Weights,
    Workers,
    with_resources,
)
from ray_jobs.words import spoken_bytes

app = typer.Typer(
    help="PatternNet and PatternAttribution for large models and datasets, on Ray.",
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)


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
    batch_size: BatchSize = 32,
    memory: Memory = None,
) -> None:
    """What a model needs: operators, gates, bytes of moments, passes over the data for a given memory."""
    from patterns.estimators import parsed, wanted
    from patterns.moments import planned_bytes
    from patterns.operators import KIND_NAMES
    from patterns.patches import bytes_of
    from ray_jobs import models
    from ray_jobs.plan import model_bytes, passes

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
        sizes_of = spoken_bytes(size), spoken_bytes(bytes_of(operator))
        table.add_row(operator.name, KIND_NAMES[type(operator.kind)], shape, gate, *sizes_of)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    say(f"{len(loaded.network.operators)} operators; moments of {spoken_bytes(total)} in each worker and each part")
    beside = model_bytes(loaded.network, batch_size)
    say(f"beside them a worker holds the model and a batch of {batch_size}: about {spoken_bytes(beside)}")
    if memory is not None:
        through = passes(loaded.network, choices, memory, batch_size)
        say(f"with --memory {spoken_bytes(memory)}: {len(through)} passes over the data")
        for number, group in enumerate(through, 1):
            size = sum(planned_bytes(operator, wanted(operator, choices)) for operator in group)
            say(f"  {number}: {group[0].name} to {group[-1].name}, {spoken_bytes(size)}")


@app.command()
@with_resources
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
    memory: Memory = None,
    until_converged: UntilConverged = None,
    positions: Positions = None,
    retry_quarantined: RetryQuarantined = False,
    allow_pipes: AllowPipes = False,
    *,
    resources: Resources,
) -> None:
    """Shards → moments → patterns. The same command on the same --out goes on where an earlier one ended."""
    from ray_jobs.fit import fit as run_fit
    from ray_jobs.sources import list_shards

    sizes = image_size, resize, numbers(mean), numbers(std)
    config = FitConfig(
        ModelConfig(model, weights, precision, seed, *sizes, words(pass_through)),
        list_shards(shards, allow_pipes),
        place(out),
        batch_size,
        words(estimators),
        max_samples,
        seed,
        memory,
        until_converged,
        positions,
    )
    run = run_fit(config, resources, retry_quarantined)
    done = run.manifest()["fit"]
    say(
        f"fit: {done['samples']} samples of {done['shards']} shards, {done['refused']} refused "
        f"(quarantine.parquet). Patterns: {run.folder / 'patterns.safetensors'}"
    )


@app.command()
def merge(
    runs: Annotated[list[str], typer.Argument(help="The folders of finished fits of different shards.")],
    out: Out,
    address: Address = None,
) -> None:
    """The moments of several fits → one fit of all their data."""
    from ray_jobs.fit import merge as run_merge

    merged = run_merge([place(run) for run in runs], place(out), Resources(address=address))
    done = merged.manifest()["fit"]
    say(f"merge: {done['samples']} samples of {done['shards']} shards. Patterns: {merged.folder}/patterns.safetensors")


@app.command()
def status(run: RunFolder) -> None:
    """How far a run is, from its files alone: on any machine that sees them, whatever the cluster says."""
    from ray_jobs.run import Run
    from ray_jobs.status import spoken_status

    for line in spoken_status(Run(run), time.time()):
        say(line)


@app.command()
def solve(
    run: RunFolder,
    estimators: Estimators,
    address: Address = None,
) -> None:
    """Patterns of further estimators from a finished fit's moments, without data."""
    from ray_jobs.fit import solve as run_solve

    solved = run_solve(place(run), words(estimators), Resources(address=address))
    say(f"solve: {', '.join(solved.manifest()['fit']['solved'])}. Patterns: {solved.folder / 'patterns.safetensors'}")


@app.command()
@with_resources
def quality(
    patterns: Fitted,
    shards: Shards,
    evaluate: Annotated[
        list[str] | None, typer.Option(help="Shards to evaluate on; by default every second one of --shards.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Where the results go; by default the fit's folder.")] = None,
    operators: Annotated[
        str, typer.Option(help="Those judged: 'features.*,fc'; by default all of moderate size with several inputs.")
    ] = "",
    gram_positions: Annotated[int, typer.Option(min=1, help="Patches drawn from each image for each operator.")] = 16,
    batch_size: BatchSize = 32,
    max_samples: MaxSamples = None,
    seed: Seed = 0,
    allow_pipes: AllowPipes = False,
    *,
    resources: Resources,
) -> None:
    """Patterns + other shards → how good they are: ρ for each neuron, operator and estimator, and a figure."""
    from ray_jobs.quality import measure, medians
    from ray_jobs.run import Run
    from ray_jobs.sources import list_shards

    listed = list_shards(shards, allow_pipes)
    if not evaluate and len(listed) < 2:
        raise UserError("--shards", "one shard cannot be parted in two", "Give more, or others by --evaluate.")
    regressed, evaluated = (listed, list_shards(evaluate, allow_pipes)) if evaluate else (listed[::2], listed[1::2])
    config = QualityConfig(
        ModelConfig(**Run(patterns).fitted_model()),
        place(patterns),
        regressed,
        evaluated,
        place(out or patterns),
        words(operators),
        gram_positions,
        batch_size,
        max_samples,
        seed,
    )
    run = measure(config, resources)
    for name, value in medians(run).items():
        say(f"{name:>24}  median ρ {value:.3f}")
    say(f"quality: {run.folder / 'quality.parquet'}, drawn in {run.folder / 'quality.png'}")


@app.command()
@with_resources
def explain(
    patterns: Fitted,
    shards: Shards,
    out: Annotated[str | None, typer.Option(help="Where explanations go; by default the fit's folder.")] = None,
    model: FitModel = None,
    weights: FitWeights = None,
    methods: Methods = DEFAULT_METHODS,
    estimator: Estimators = "default",
    set_: Settings = None,
    target: TargetSpec = "predicted",
    classes: Classes = None,
    output: OutputKinds = DEFAULT_OUTPUTS,
    resize: MapSize = None,
    reduce_channels: Reduction = "none",
    precision: FitPrecision = None,
    batch_size: BatchSize = 32,
    max_samples: MaxSamples = None,
    seed: Seed = 0,
    allow_pipes: AllowPipes = False,
    *,
    resources: Resources,
) -> None:
    """Shards + patterns → explanations, one shard for each input shard."""
    from ray_jobs.explain import explain as run_explain
    from ray_jobs.models import class_names
    from ray_jobs.sources import list_shards
    from ray_jobs.targets import named

    chosen = {name: method_of(name) for name in words(methods) or ("",)}
    of_fit = fitted(patterns, model, weights, precision)
    config = ExplainConfig(
        of_fit,
        place(patterns),
        list_shards(shards, allow_pipes),
        place(out or patterns),
        batch_size,
        tuple(chosen),
        words(estimator),
        tuple(settings_of(chosen, assignments(set_ or [])).items()),
        max_samples,
        seed,
        target,
        tuple(class_names(of_fit.spec, classes).items()) if named(target) else (),
        words(output),
        reduce_channels,
        resize,
    )
    run = run_explain(config, resources)
    done = run.manifest()["explain"]
    say(f"explain: {done['samples']} samples, {done['refused']} refused. Explanations: {run.folder / 'explanations'}")


@app.command()
@with_resources
def degrade(
    patterns: Fitted,
    shards: Shards,
    out: Annotated[str | None, typer.Option(help="Where the results go; by default the fit's folder.")] = None,
    model: FitModel = None,
    weights: FitWeights = None,
    methods: Methods = DEFAULT_METHODS,
    estimator: Estimators = "default",
    set_: Settings = None,
    patch_size: Annotated[int, typer.Option(min=1, help="Height and width of a patch in pixels.")] = PATCH,
    steps: Annotated[int, typer.Option(min=1, help="Patches that are replaced, one after the other.")] = STEPS,
    replacement: Annotated[str, typer.Option(help=f"What by: {', '.join(REPLACEMENTS)}.")] = "mean",
    least_first: Annotated[bool, typer.Option("--least-first", help="The least relevant patches first.")] = False,
    precision: FitPrecision = None,
    batch_size: BatchSize = 32,
    max_samples: MaxSamples = None,
    seed: Seed = 0,
    allow_pipes: AllowPipes = False,
    *,
    resources: Resources,
) -> None:
    """Shards + patterns → how soon predictions fall when what a map says matters is taken away (Figure 4)."""
    from ray_jobs.degrade import degrade as run_degrade
    from ray_jobs.degrade import spoken_areas
    from ray_jobs.sources import list_shards

    chosen = {name: method_of(name) for name in words(methods) or ("",)}
    config = DegradeConfig(
        fitted(patterns, model, weights, precision),
        place(patterns),
        list_shards(shards, allow_pipes),
        place(out or patterns),
        batch_size,
        tuple(chosen),
        words(estimator),
        tuple(settings_of(chosen, assignments(set_ or [])).items()),
        max_samples,
        seed,
        patch_size,
        steps,
        replacement,
        least_first,
    )
    run = run_degrade(config, resources)
    for line in spoken_areas(run):
        say(line)
    done = run.manifest()["degrade"]
    say(f"degrade: {done['samples']} samples, {done['refused']} refused. Curves: {run.folder / 'degradation.png'}")


def fitted(patterns: str, model: str | None, weights: str | None, precision: str | None) -> ModelConfig:
    """The model of a finished fit, with what is said otherwise of it."""
    from ray_jobs.run import Run

    said = {"spec": model, "weights": weights, "precision": precision}
    return ModelConfig(**Run(patterns).fitted_model() | {k: v for k, v in said.items() if v is not None})


@app.command()
def grid(
    run: RunFolder,
    keys: Annotated[str, typer.Option(help="These samples, in this order: KEY,KEY.")] = "",
    worst: Annotated[int, typer.Option(min=0, help="So many wrong predictions, the surest first.")] = 0,
    random: Annotated[int, typer.Option(min=0, help="So many samples drawn at random.")] = 0,
    out: Annotated[Path | None, typer.Option(help="A PNG or PDF; by default grid.png in the run's folder.")] = None,
    columns: Annotated[int, typer.Option(min=1, help="Photographs side by side.")] = 1,
    classes: Classes = None,
    seed: Seed = 0,
) -> None:
    """Draw photographs × methods, with captions: label → prediction and its probability."""
    from ray_jobs.grid import gallery
    from ray_jobs.pictures import draw_grid

    if (bool(keys) + bool(worst) + bool(random)) != 1:
        raise UserError("grid", "one way to choose samples is needed", "Give --keys, --worst N or --random N.")
    explained = gallery(run, classes)
    rows = explained.named(words(keys)) if keys else explained.worst(worst) if worst else explained.drawn(random, seed)
    if not rows:
        raise UserError("--worst", "no prediction is wrong", "Choose by --keys or --random.")
    path = out or beside(run, "grid.png")
    draw_grid(path, explained.shown(rows), columns)
    say(f"grid: {len(rows)} samples in {path}")


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="The folders, or URLs, of runs; several are set side by side.")],
    out: Annotated[Path | None, typer.Option(help="The file; by default report.html in the first run's folder.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="Explained samples of each run, drawn at random.")] = 200,
    classes: Classes = None,
    seed: Seed = 0,
) -> None:
    """Runs → one page of HTML to look at and pass on, which needs no network."""
    from ray_jobs.report import write_report

    path = out or beside(runs[0], "report.html")
    write_report(path, runs, samples, classes, seed)
    say(f"report: {path}, {spoken_bytes(path.stat().st_size)}")


@app.command()
def show(
    run: RunFolder,
    key: Annotated[str, typer.Argument(help="The sample's key.")],
    out: Annotated[Path | None, typer.Option(help="A PNG or PDF; by default KEY.png in the run's folder.")] = None,
    classes: Classes = None,
) -> None:
    """Draw one sample large."""
    from ray_jobs.grid import gallery
    from ray_jobs.pictures import draw_sample

    explained = gallery(run, classes)
    rows = explained.named([key])
    path = out or beside(run, f"{key.replace('/', '_')}.png")
    draw_sample(path, explained.shown(rows)[0])
    for name, value in explained.said(rows[0]).items():
        say(f"{name:>40}  {value}")
    say(f"show: {path}")


def beside(run: str, name: str) -> Path:
    """A file of a run's folder; of a run at a URL, in this directory."""
    folder = located(run)
    return Path(str(folder)) / name if here(folder) else Path(name)


def place(where: str) -> str:
    """A folder or URL as every process understands it."""
    return str(located(where))


def assignments(listed: list[str]) -> dict[str, float]:
    """Options of the form NAME=NUMBER."""
    found = {}
    for text in listed:
        name, _, value = text.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError as error:
            raise UserError("--set", f"{text!r} sets nothing", "Write METHOD.SETTING=NUMBER.") from error
    return found


def words(listed: str) -> tuple[str, ...]:
    """A comma-separated option of words."""
    return tuple(word.strip() for word in listed.split(",") if word.strip())


def numbers(listed: str | None) -> tuple[float, ...] | None:
    """A comma-separated option of numbers."""
    try:
        return None if listed is None else tuple(map(float, listed.split(",")))
    except ValueError as error:
        raise UserError("--mean --std", f"{listed!r} are no numbers", "Write 0.5,0.5,0.5.") from error


def say(text: str) -> None:
    print(text, flush=True)


COMMANDS = {command.callback.__name__ for command in app.registered_commands if command.callback}


def main() -> None:
    """Run the program and exit with its status."""
    status = exit_status(sys.argv[1:])
    for number in (signal.SIGTERM, signal.SIGINT):  # the status is known; nothing may change it on the way out
        signal.signal(number, signal.SIG_IGN)
    sys.exit(status)


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
