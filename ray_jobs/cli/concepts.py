"""`patternnet concepts`: how sensitive classes are to the concepts of a fit."""

from ray_jobs.cli.arguments import absolute, echo, fitted_model, listed, output_folder
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

    config = fitted_model(given.patterns, model)
    common = {
        "model": config,
        "patterns": absolute(given.patterns),
        "shards": listed(given.shards, options),
        "out": output_folder(given.out or given.patterns),
    }
    target = load_target(given.target, given.patterns, config.spec, names.classes)
    run = run_concepts(given.build(**common, **target), resources)
    done = run.manifest()["concepts"]
    table = run.folder / "sensitivity.parquet"
    echo(f"concepts: {done['samples']} samples, {done['refused']} rejected. Sensitivity: {table}")
