"""`patternnet reproduce`: the paper's experiments."""

from dataclasses import replace

from patterns import UserError
from ray_jobs.cli.arguments import echo, resolve_shards
from ray_jobs.cli.typer_options import command
from ray_jobs.config import ModelConfig, Resources
from ray_jobs.config.commands import ReproduceOptions


@command(
    "patternnet reproduce --dataset mnist --data /data/mnist --out runs/mnist",
    "patternnet reproduce --model torchvision:vgg16 --out runs/paper \\\n"
    "    --shards '/data/train-{0000..1023}.tar' --evaluate '/data/val-*.tar'",
)
def reproduce(options: ReproduceOptions, resources: Resources) -> None:
    """Run the paper's experiments: patterns, their quality, image degradation, figures 3 to 6, results.md."""
    from ray_jobs.studies.datasets import NAMES
    from ray_jobs.studies.reproduce import Experiment, prepare_digits
    from ray_jobs.studies.reproduce import reproduce as run_reproduce

    out, data = options.out.absolute(), options.data
    if options.dataset in NAMES and options.spec is None:
        if data is None:
            what = f"no folder with the files of {options.dataset}"
            raise UserError("", what, "Give the folder of the four idx files.", "data")
        experiment = prepare_digits(options.dataset, data, out, options.max_samples, options.seed)
    elif options.dataset == "folder" and options.spec and (data is not None or (options.shards and options.evaluate)):
        names = ("spec", "weights", "seed", "image_size", "resize", "mean", "std", "strip_softmax")
        model = ModelConfig(**{name: vars(options)[name] for name in names})
        train = resolve_shards(options.shards or [f"{data}/train"], options)
        test = resolve_shards(options.evaluate or [f"{data}/test"], options)
        experiment = Experiment(model, train, test, seed=options.seed)
    else:
        what = "neither a data set with its own model nor a model with data"
        remedy = (
            f"Give `dataset={'` or `dataset='.join(NAMES)}` with `data`, or `spec` with `data` or with `shards` and "
        )
        raise UserError("reproduce", what, remedy + "`evaluate`.")
    experiment = replace(
        experiment,
        patch=options.patch,
        steps=options.steps,
        replacement=options.replacement,
        degraded=options.degraded,
        batch_size=options.batch_size,
        max_samples=options.max_samples,
    )
    found = run_reproduce(experiment, out, resources)
    echo(f"reproduce: {found}, with the paper's figures 3 to 6 in the same folder")
