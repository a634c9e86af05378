"""`patternnet atlas`: what a model looks at in a dataset, as tables and a page."""

from ray_jobs.cli.arguments import absolute, echo, methods_options, mirror_report, output_file
from ray_jobs.cli.typer_options import Given, command
from ray_jobs.config import AtlasConfig, Resources
from ray_jobs.config.commands import AtlasOptions, ClassNames, FittedModel


@command(
    "patternnet atlas --patterns runs/vgg16 --shards '/data/val-{00..63}.tar' \\\n    --out runs/vgg16-atlas",
    "patternnet atlas --patterns runs/vgg16 --shards '/data/val-00.tar' \\\n"
    "    --explanations runs/vgg16 --out runs/vgg16-atlas",
)
def atlas(
    given: Given[AtlasConfig], model: FittedModel, names: ClassNames, options: AtlasOptions, resources: Resources
) -> None:
    """Describe a dataset by its explanations: classes, clusters, channels and unusual samples."""
    from ray_jobs.jobs.atlas.atlas import atlas as run_atlas
    from ray_jobs.jobs.explain.targets import load_target_names
    from ray_jobs.views.atlas import write_atlas

    common = methods_options(given, model, options)
    classes = load_target_names(given.target, common["model"].spec, names.classes)
    explanations = given.explanations and absolute(given.explanations)
    run = run_atlas(given.build(**common, classes=classes, explanations=explanations), resources)
    mirror_report(run, resources, "atlas")
    done = run.manifest()["atlas"]
    echo(
        f"atlas: {done['samples']} samples, {done['refused']} rejected, {done['clusters']} clusters, "
        f"{done['suspicious']} of them suspicious. Tables: {run.folder}"
    )
    path = output_file(options.page, str(run.folder), "atlas.html")
    pages = write_atlas(path, str(run.folder), names.classes)
    echo(f"atlas: {path}" + (f" and {pages - 1} pages of classes" if pages > 1 else ""))
