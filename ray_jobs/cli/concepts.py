"""`patternnet concepts`: how sensitive classes are to the concepts of a fit."""

from ray_jobs.cli.arguments import data_options, echo, mirror_report
from ray_jobs.cli.typer_options import Given, command
from ray_jobs.config import ConceptsConfig, Resources
from ray_jobs.config.commands import ClassNames, FittedModel, ShardOptions


@command(
    "patternnet concepts --patterns runs/birds --shards '/data/val-{00..63}.tar'",
    "patternnet concepts --patterns runs/birds --shards val.tar --target label",
)
def concepts(
    given: Given[ConceptsConfig], model: FittedModel, names: ClassNames, options: ShardOptions, resources: Resources
) -> None:
    """Measure how the scores of classes change along the concepts of a fit."""
    from ray_jobs.jobs.concepts import concepts as run_concepts
    from ray_jobs.jobs.explain.target_files import load_target

    common = data_options(given, model, options)
    target = load_target(given.target, given.patterns, common["model"].spec, names.classes)
    run = run_concepts(given.build(**common, **target), resources)
    mirror_report(run, resources, "concepts")
    done = run.manifest()["concepts"]
    table = run.folder / "sensitivity.parquet"
    echo(f"concepts: {done['samples']} samples, {done['refused']} rejected. Sensitivity: {table}")
