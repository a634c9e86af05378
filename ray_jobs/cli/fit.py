"""`patternnet fit`: shards → moments → patterns."""

from ray_jobs.cli.arguments import echo, mirror_report, output_folder, resolve_shards
from ray_jobs.cli.typer_options import Given, command
from ray_jobs.config import FitConfig, ModelConfig, Resources
from ray_jobs.config.commands import FitOptions


@command(
    "patternnet fit --model torchvision:vgg16 --out runs/vgg16 \\\n"
    "    --shards '/data/imagenet-train-{0000..1023}.tar' --batch-size 64",
    "patternnet fit --model my_models.py:small --weights small.safetensors \\\n"
    "    --image-size 32 --resize 32 --mean 0.5,0.5,0.5 --std 0.25,0.25,0.25 \\\n"
    "    --shards 'shards/*.tar' --out runs/small --workers 0",
    "patternnet fit --model torchvision:resnet50 --out s3://bucket/resnet50 \\\n"
    "    --shards @shards.txt --until-converged 0.05 --positions auto",
)
def fit(model: ModelConfig, given: Given[FitConfig], options: FitOptions, resources: Resources) -> None:
    """Fit the patterns of a model to shards. The same command on the same --out resumes an interrupted fit."""
    from ray_jobs.jobs.fit.fit import fit as run_fit

    config = given.build(model=model, shards=resolve_shards(given.shards, options), out=output_folder(given.out))
    run = run_fit(config, resources, options.retry_quarantined)
    mirror_report(run, resources, "fit")
    done = run.manifest()["fit"]
    echo(
        f"fit: {done['samples']} samples of {done['shards']} shards, {done['refused']} rejected "
        f"(quarantine.parquet). Patterns: {run.folder / 'patterns.safetensors'}"
    )
