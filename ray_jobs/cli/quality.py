"""`patternnet quality`: patterns and other shards → ρ."""

from patterns import UserError
from ray_jobs.cli.arguments import absolute, echo, fitted_model, mirror_report, output_folder, resolve_shards
from ray_jobs.cli.typer_options import Given, command
from ray_jobs.config import QualityConfig, Resources
from ray_jobs.config.commands import FittedModel, ShardOptions


@command(
    "patternnet quality --patterns runs/vgg16 --shards '/data/val-{00..63}.tar'",
    "patternnet quality --patterns runs/vgg16 --operators 'features.*' \\\n"
    "    --shards '/data/val-{00..31}.tar' --evaluate '/data/val-{32..63}.tar'",
)
def quality(given: Given[QualityConfig], options: ShardOptions, resources: Resources) -> None:
    """Evaluate patterns on other shards: ρ of each neuron, operator and estimator, and a figure."""
    from ray_jobs.jobs.quality import compute_medians, measure

    shards = resolve_shards(given.shards, options)
    if not given.evaluate and len(shards) < 2:
        raise UserError("", "one shard cannot be split in two", "Give more, or give others as `evaluate`.", "shards")
    regressed, evaluated = (
        (shards, resolve_shards(given.evaluate, options)) if given.evaluate else (shards[::2], shards[1::2])
    )
    config = given.build(
        model=fitted_model(given.patterns, FittedModel()),
        patterns=absolute(given.patterns),
        shards=regressed,
        evaluate=evaluated,
        out=output_folder(given.out or given.patterns),
    )
    run = measure(config, resources)
    medians = compute_medians(run)
    mirror_report(run, resources, "quality", {f"median ρ {name}": value for name, value in medians.items()})
    for name, value in medians.items():
        echo(f"{name:>24}  median ρ {value:.3f}")
    echo(f"quality: {run.folder / 'quality.parquet'}, drawn in {run.folder / 'quality.png'}")
