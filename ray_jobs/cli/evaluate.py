"""`patternnet evaluate`: several measures of the maps of several methods, as one table."""

import sys

from rich.console import Console
from rich.table import Table

from ray_jobs.cli.arguments import echo, methods_options, mirror_report
from ray_jobs.cli.typer_options import Given, command
from ray_jobs.config import EvaluateConfig, Resources
from ray_jobs.config.commands import FittedModel, ShardOptions


@command(
    "patternnet evaluate --patterns runs/vgg16 --shards '/data/val-{00..03}.tar'",
    "patternnet evaluate --patterns runs/vgg16 --shards '/data/val-00.tar' \\\n"
    "    --target contrast --methods patternattribution:class-specific,lrp-z \\\n"
    "    --measures pointing,class",
)
def evaluate(given: Given[EvaluateConfig], model: FittedModel, options: ShardOptions, resources: Resources) -> None:
    """Compare methods, presets, and baselines that ignore the model, by several measures."""
    from ray_jobs.jobs.evaluate import evaluate as run_evaluate
    from ray_jobs.jobs.evaluate import format_summary

    run = run_evaluate(given.build(**methods_options(given, model, options)), resources)
    header, rows = format_summary(run)
    table = Table(*header, box=None)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    mirror_report(run, resources, "evaluate")
    done = run.manifest()["evaluate"]
    for name, reason in done["not_measured"].items():
        echo(f"evaluate: {name} was not measured: {reason}")
    echo(f"evaluate: {done['samples']} samples, {done['refused']} rejected. Figure: {run.folder / 'evaluation.png'}")
