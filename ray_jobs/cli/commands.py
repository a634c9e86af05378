"""The commands that start no worker of their own: what comes before the jobs, and what looks at their runs."""

import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from patterns import UserError
from ray_jobs.cli.arguments import beside, numbers, place, say, target, variables, words
from ray_jobs.cli.options import (
    DEFAULT_FIT,
    LOCAL,
    PLACE,
    Address,
    AllowPipes,
    BatchSize,
    Classes,
    Estimators,
    ImageSize,
    Mean,
    Memory,
    Model,
    Out,
    PassThrough,
    Precision,
    Resize,
    RunFolder,
    Seed,
    Std,
    StripSoftmax,
    Weights,
)
from ray_jobs.config import ModelConfig, Resources
from ray_jobs.units import duration, format_bytes

MAX_NAME = 60  # characters of a key in a file's name


def pack(
    images: Annotated[Path, typer.Argument(**LOCAL, help="A folder that holds one folder for each class.")],
    out: Annotated[Path, typer.Argument(**LOCAL, help="The folder for the shards.")],
    per_shard: Annotated[int, typer.Option(min=1, help="Samples of a shard.")] = 1000,
    crops: Annotated[int, typer.Option(min=0, help="Random crops and flips in place of each image.")] = 0,
    size: Annotated[int, typer.Option(min=1, help="Height and width of a crop.")] = 256,
    seed: Seed = 0,
) -> None:
    """A folder of images → WebDataset shards."""
    from ray_jobs.data.packing import images_in
    from ray_jobs.data.packing import pack as run_pack

    shards = run_pack(images, out, per_shard, crops, size, seed)
    formats = Counter(name.rpartition(".")[2].lower() for name in images_in(images)).most_common()
    counts = ", ".join(f"{count} {extension}" for extension, count in formats)
    say(f"{len(shards)} shards in {out} from these images: {counts}; their classes in {out / 'classes.json'}")


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
    strip_softmax: StripSoftmax = False,
    batch_size: BatchSize = 32,
    memory: Memory = None,
) -> None:
    """What a model needs: operators, gates, bytes of moments, passes over the data for a given memory."""
    from patterns.estimation import parsed, wanted
    from patterns.moments import bytes_of, planned_bytes
    from patterns.operators import TYPE_NAMES
    from ray_jobs.jobs.fit.memory_plan import model_bytes, passes
    from ray_jobs.models import loading

    choices = words(estimators)
    sizes = image_size, resize, numbers(mean), numbers(std)
    config = ModelConfig(model, weights, precision, seed, *sizes, words(pass_through), strip_softmax)
    parsed(choices)
    loaded = loading.load(config)
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
        sizes_of = format_bytes(size), format_bytes(bytes_of(operator))
        table.add_row(operator.name, TYPE_NAMES[type(operator.kind)], shape, gate, *sizes_of)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    say(f"{len(loaded.network.operators)} operators; moments of {format_bytes(total)} in each worker and each part")
    beside = model_bytes(loaded.network, batch_size)
    say(f"beside them a worker holds the model and a batch of {batch_size}: about {format_bytes(beside)}")
    if memory is not None:
        through = passes(loaded.network, choices, memory, batch_size)
        say(f"with --memory {format_bytes(memory)}: {len(through)} passes over the data")
        for number, group in enumerate(through, 1):
            size = sum(planned_bytes(operator, wanted(operator, choices)) for operator in group)
            say(f"  {number}: {group[0].name} to {group[-1].name}, {format_bytes(size)}")


def merge(
    runs: Annotated[list[str], typer.Argument(**PLACE, help="The folders of finished fits of different shards.")],
    out: Out,
    address: Address = None,
) -> None:
    """The moments of several fits → one fit of all their data."""
    from ray_jobs.jobs.fit.fit import merge as run_merge

    merged = run_merge([place(run) for run in runs], target(out), Resources(address=address))
    done = merged.manifest()["fit"]
    say(f"merge: {done['samples']} samples of {done['shards']} shards. Patterns: {merged.folder}/patterns.safetensors")


def status(run: RunFolder) -> None:
    """How far a run is, from its files alone: on any machine that sees them, whatever the cluster says."""
    from ray_jobs.runs.lease import BEAT_EVERY
    from ray_jobs.runs.run_folder import Run
    from ray_jobs.views.status import status_lines

    for line in status_lines(Run(run), time.time(), patience=2 * BEAT_EVERY):
        say(line)


def solve(
    run: RunFolder,
    estimators: Estimators,
    address: Address = None,
) -> None:
    """Patterns of further estimators from a finished fit's moments, without data."""
    from ray_jobs.jobs.fit.fit import solve as run_solve

    solved = run_solve(place(run), words(estimators), Resources(address=address))
    say(f"solve: {', '.join(solved.manifest()['fit']['solved'])}. Patterns: {solved.folder / 'patterns.safetensors'}")


def grid(
    run: RunFolder,
    keys: Annotated[str, typer.Option(help="These samples, in this order: KEY,KEY.")] = "",
    worst: Annotated[int, typer.Option(min=0, help="So many wrong predictions, the surest first.")] = 0,
    random: Annotated[int, typer.Option(min=0, help="So many samples drawn at random.")] = 0,
    out: Annotated[
        Path | None, typer.Option(**LOCAL, help="PNG or PDF; by default grid.png in the run's folder.")
    ] = None,
    columns: Annotated[int, typer.Option(min=1, help="Photographs side by side.")] = 1,
    classes: Classes = None,
    seed: Seed = 0,
) -> None:
    """Draw photographs × methods, with captions: label → prediction and its probability."""
    from ray_jobs.figures.drawing import draw_grid
    from ray_jobs.views.gallery import gallery

    if (bool(keys) + bool(worst) + bool(random)) != 1:
        raise UserError("grid", "one way to choose samples is needed", "Give --keys, --worst N or --random N.")
    explained = gallery(run, classes)
    rows = explained.listed(keys) if keys else explained.worst(worst) if worst else explained.drawn(random, seed)
    if not rows:
        raise UserError("--worst", "no prediction is wrong", "Choose by --keys or --random.")
    path = out or beside(run, "grid.png")
    draw_grid(path, explained.shown(rows), columns)
    say(f"grid: {len(rows)} samples in {path}")


def report(
    runs: Annotated[list[str], typer.Argument(**PLACE, help="Folders or URLs of runs; several are set side by side.")],
    out: Annotated[
        Path | None, typer.Option(**LOCAL, help="The file; by default report.html in the first run's folder.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Explained samples of each run, drawn at random.")] = 200,
    classes: Classes = None,
    seed: Seed = 0,
) -> None:
    """Runs → one page of HTML to look at and pass on, which needs no network."""
    from ray_jobs.views.report import write_report

    path = out or beside(runs[0], "report.html")
    write_report(path, runs, samples, classes, seed)
    say(f"report: {path}, {format_bytes(path.stat().st_size)}")


def show(
    run: RunFolder,
    key: Annotated[str, typer.Argument(help="The sample's key.")],
    out: Annotated[
        Path | None, typer.Option(**LOCAL, help="PNG or PDF; by default KEY.png in the run's folder.")
    ] = None,
    classes: Classes = None,
) -> None:
    """Draw one sample large."""
    from ray_jobs.figures.drawing import draw_sample
    from ray_jobs.views.gallery import gallery

    explained = gallery(run, classes)
    row = explained.named(key)
    path = out or beside(run, f"{row['key'].replace('/', '_')[:MAX_NAME]}.png")
    draw_sample(path, explained.shown([row])[0])
    for name, value in explained.said(row).items():
        say(f"{name:>40}  {value}")
    say(f"show: {path}")


def doctor(
    shards: Annotated[list[str] | None, typer.Option(help="What a job will read, as its --shards. Repeatable.")] = None,
    out: Annotated[str | None, typer.Option(**PLACE, help="Where it will write, as its --out.")] = None,
    gpus_per_worker: Annotated[
        float | None, typer.Option(min=0, help="GPUs of a worker; else 1 where the cluster has any.")
    ] = None,
    cpus_per_worker: Annotated[float, typer.Option(min=0, help="CPUs of a worker.")] = Resources.cpus_per_worker,
    min_workers: Annotated[int, typer.Option(min=0, help="As of the job: nodes may come only when asked for.")] = 0,
    patience: Annotated[float, typer.Option(parser=duration, help="Time that a node may take.")] = 120.0,
    allow_pipes: AllowPipes = False,
    address: Address = None,
) -> None:
    """Whether a cluster is fit for a long run, looked at from every node, and what to mend."""
    from ray_jobs.data.shard_specs import list_shards
    from ray_jobs.ops.preflight import examine

    resources = Resources(
        gpus_per_worker=gpus_per_worker, cpus_per_worker=cpus_per_worker, min_workers=min_workers, address=address
    )
    listed = list_shards(shards, allow_pipes) if shards else ()
    found = examine(resources, listed, place(out) if out else None, patience)
    table = Table("node", "host", "CPUs", "GPUs", "memory free", "disk free", "source", "code", box=None)
    for node in found.nodes:
        table.add_row(*node.cells())
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    say(f"{len(found.nodes)} nodes, with room for {found.workers} workers; {len(listed)} shards looked at")
    for trouble in found.troubles:
        say(f"  {trouble}")
    if found.troubles:
        raise UserError("doctor", f"{len(found.troubles)} things to mend before a long run", "They are listed above.")
    say("doctor: nothing to mend")


def submit(
    context: typer.Context,
    command: Annotated[list[str], typer.Argument(help="A command of this program with its options.")],
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard: http://HEAD:8265.")
    ],
    working_dir: Annotated[
        str | None,
        typer.Option(**PLACE, help="Folder to send and run in; by default the cluster's own installation runs."),
    ] = None,
    pip: Annotated[list[str] | None, typer.Option(help="A package to install for the job. Repeatable.")] = None,
    env: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for the job, or NAME with the value it has here. Repeatable.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the log to the job's end.")] = True,
    patience: Annotated[
        float, typer.Option(parser=duration, help="Time for which the cluster may not answer, before it is given up.")
    ] = 3600.0,
) -> None:
    """A command → a job of a cluster elsewhere, followed to its end, with its exit status."""
    from ray_jobs.ops.submit import Submission
    from ray_jobs.ops.submit import submit as run_submit

    check_usage(context, command)
    submission = Submission(tuple(command), working_dir, tuple(pip or ()), variables(env or []))
    if status := run_submit(submission, address, wait, patience, say):
        raise typer.Exit(status)


def check_usage(context: typer.Context, command: list[str]) -> None:
    """Complains of a command as it would itself, before anything is sent."""
    program: Any = context.find_root().command
    name, known, arguments = program.resolve_command(context, list(command))
    if name == "submit":
        raise UserError("submit", "it cannot submit itself", "Name another command.")
    known.make_context(name, arguments, parent=context.find_root())


COMMANDS = pack, plan, merge, status, solve, grid, report, show, doctor
