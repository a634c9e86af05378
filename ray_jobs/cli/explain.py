"""`patternnet explain`: shards and patterns → explanations."""

from ray_jobs.cli.arguments import echo, methods_options, mirror_report
from ray_jobs.cli.typer_options import Given, command
from ray_jobs.config import ExplainConfig, Resources
from ray_jobs.config.commands import ClassNames, FittedModel, ShardOptions


@command(
    "patternnet explain --patterns runs/vgg16 --shards '/data/val-{00..63}.tar' \\\n"
    "    --methods patternnet,patternattribution",
    "patternnet explain --patterns runs/vgg16 --shards '/data/val-00.tar' \\\n"
    "    --target top-5 --output parquet --out runs/vgg16-top-5",
    "patternnet explain --patterns runs/vgg16 --shards 'shards/*.tar' \\\n"
    "    --methods smoothgrad,lrp-z --set smoothgrad.samples=50",
)
def explain(
    given: Given[ExplainConfig], model: FittedModel, names: ClassNames, options: ShardOptions, resources: Resources
) -> None:
    """Explain shards by the patterns of a fit: one shard of explanations for each input shard."""
    from ray_jobs.jobs.explain.explain import explain as run_explain
    from ray_jobs.jobs.explain.targets import load_target_names, load_target_vector

    common = methods_options(given, model, options)
    classes = load_target_names(given.target, common["model"].spec, names.classes)
    vector = load_target_vector(given.target)
    run = run_explain(given.build(**common, classes=classes, vector=vector), resources)
    mirror_report(run, resources, "explain")
    done = run.manifest()["explain"]
    echo(f"explain: {done['samples']} samples, {done['refused']} rejected. Explanations: {run.folder / 'explanations'}")
