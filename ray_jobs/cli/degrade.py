"""`patternnet degrade`: how fast predictions fall if the most relevant patches are removed."""

from ray_jobs.cli.arguments import echo, methods_options, mirror_report
from ray_jobs.cli.typer_options import Given, command
from ray_jobs.config import DegradeConfig, Resources
from ray_jobs.config.commands import FittedModel, ShardOptions


@command(
    "patternnet degrade --patterns runs/vgg16 --shards '/data/val-{00..63}.tar'",
    "patternnet degrade --patterns runs/vgg16 --shards '/data/val-00.tar' \\\n"
    "    --patch-size 16 --steps 50 --replacement blur --max-samples 1000",
)
def degrade(given: Given[DegradeConfig], model: FittedModel, options: ShardOptions, resources: Resources) -> None:
    """Measure how fast predictions fall as the patches that a map calls relevant are replaced (Figure 4)."""
    from ray_jobs.jobs.degrade import degrade as run_degrade
    from ray_jobs.jobs.degrade import format_areas

    run = run_degrade(given.build(**methods_options(given, model, options)), resources)
    for line in format_areas(run):
        echo(line)
    mirror_report(run, resources, "degrade")
    done = run.manifest()["degrade"]
    echo(f"degrade: {done['samples']} samples, {done['refused']} rejected. Curves: {run.folder / 'degradation.png'}")
