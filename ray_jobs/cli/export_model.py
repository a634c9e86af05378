"""`patternnet export-model`: an explainer as a model for other programs."""

from ray_jobs.cli.arguments import absolute, echo, fitted_model
from ray_jobs.cli.typer_options import command
from ray_jobs.config import TargetConfig
from ray_jobs.config.commands import ExportModelOptions, FittedModel
from ray_jobs.units import format_bytes


@command(
    "patternnet export-model runs/vgg16 --to explainer.pt2",
    "patternnet export-model runs/vgg16 --methods patternnet,patternattribution \\\n"
    "    --target top-5 --to explainer.onnx",
)
def export_model(model: FittedModel, options: ExportModelOptions) -> None:
    """Write an explainer as one model: from images to scores and maps, without this package."""
    from ray_jobs.jobs.explain.target_files import load_target
    from ray_jobs.jobs.export_model import export_model as run_export

    config = fitted_model(options.run, model)
    run = absolute(options.run)
    explained = TargetConfig(
        model=config,
        patterns=run,
        shards=(),
        out=run,
        methods=options.methods,
        estimator=options.estimator,
        preset=options.preset,
        **load_target(options.target, run, config.spec, options.classes),
    )
    written = run_export(explained, options.to, options.classes)
    size = format_bytes(options.to.stat().st_size)
    echo(f"export-model: {options.to} ({size}): images → {', '.join(written['outputs'])}")
