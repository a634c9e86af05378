"""The commands that are jobs: shards and a model → what a run holds."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from patterns import UserError
from patterns.evaluation import PATCH, REPLACEMENTS, STEPS
from ray_jobs.cli.arguments import fitted, numbers, on_methods, place, say, target, words
from ray_jobs.cli.options import (
    DEFAULT_FIT,
    DEFAULT_METHODS,
    DEFAULT_OUTPUTS,
    LOCAL,
    NAME,
    PLACE,
    Address,
    AllowPipes,
    BatchSize,
    Classes,
    Compile,
    Estimators,
    FitModel,
    FitPrecision,
    Fitted,
    FitWeights,
    ImageSize,
    MapSize,
    MaxSamples,
    Mean,
    Memory,
    Methods,
    Model,
    Out,
    OutputKinds,
    PassThrough,
    Positions,
    Precision,
    Reduction,
    Resize,
    RetryQuarantined,
    Seed,
    Settings,
    Shards,
    Std,
    StripSoftmax,
    TargetSpec,
    UntilConverged,
    Weights,
    Workers,
    with_resources,
)
from ray_jobs.config import DegradeConfig, ExplainConfig, FitConfig, ModelConfig, QualityConfig, Resources


def demo(
    out: Annotated[Path, typer.Option(**LOCAL, help="Where everything goes.")] = Path("demo-run"),
    workers: Workers = 2,
    address: Address = None,
) -> None:
    """The whole way on packaged weights and photographs: shards, fit, explain, quality, a picture."""
    from ray_jobs.studies.demo import demo as run_demo

    picture = run_demo(out.absolute(), Resources(workers=workers, address=address))
    say(
        f"""
Photographs and what each method says of them:             {picture}
The patterns' quality by layer and estimator:              {picture.parent / "run" / "quality.png"}
Patterns, tables, explanations of every photograph:        {picture.parent / "run"}
Shards to try things on:                                   {picture.parent / "shards"}

Next, the same on your own images:
  patternnet pack IMAGES SHARDS                 a folder of class folders → shards
  patternnet fit --model torchvision:resnet50 --shards 'SHARDS/*.tar' --out RUN
  patternnet explain --patterns RUN --shards 'SHARDS/*.tar' --methods patternattribution"""
    )


@with_resources
def fit(
    model: Model,
    shards: Shards,
    out: Out,
    weights: Weights = "default",
    estimators: Estimators = DEFAULT_FIT,
    batch_size: BatchSize = 32,
    max_samples: MaxSamples = None,
    precision: Precision = "float32",
    seed: Seed = 0,
    image_size: ImageSize = None,
    resize: Resize = None,
    mean: Mean = None,
    std: Std = None,
    pass_through: PassThrough = "",
    strip_softmax: StripSoftmax = False,
    memory: Memory = None,
    until_converged: UntilConverged = None,
    positions: Positions = None,
    compile: Compile = None,  # noqa: A002
    retry_quarantined: RetryQuarantined = False,
    allow_pipes: AllowPipes = False,
    *,
    resources: Resources,
) -> None:
    """Shards → moments → patterns. The same command on the same --out goes on where an earlier one ended."""
    from ray_jobs.data.shard_specs import list_shards
    from ray_jobs.jobs.fit.fit import fit as run_fit

    sizes = image_size, resize, numbers(mean), numbers(std)
    config = FitConfig(
        ModelConfig(model, weights, precision, seed, *sizes, words(pass_through), strip_softmax),
        list_shards(shards, allow_pipes),
        target(out),
        batch_size,
        words(estimators),
        max_samples,
        seed,
        memory,
        until_converged,
        positions,
        compile,
    )
    run = run_fit(config, resources, retry_quarantined)
    done = run.manifest()["fit"]
    say(
        f"fit: {done['samples']} samples of {done['shards']} shards, {done['refused']} refused "
        f"(quarantine.parquet). Patterns: {run.folder / 'patterns.safetensors'}"
    )


@with_resources
def quality(
    patterns: Fitted,
    shards: Shards,
    evaluate: Annotated[
        list[str] | None, typer.Option(help="Shards to evaluate on; by default every second one of --shards.")
    ] = None,
    out: Annotated[str | None, typer.Option(**PLACE, help="Where the results go; by default the fit's folder.")] = None,
    operators: Annotated[
        str, typer.Option(help="Those judged: 'features.*,fc'; by default all of moderate size with several inputs.")
    ] = "",
    gram_positions: Annotated[int, typer.Option(min=1, help="Patches drawn from each image for each operator.")] = 16,
    batch_size: BatchSize = 32,
    max_samples: MaxSamples = None,
    seed: Seed = 0,
    allow_pipes: AllowPipes = False,
    *,
    resources: Resources,
) -> None:
    """Patterns + other shards → how good they are: ρ for each neuron, operator and estimator, and a figure."""
    from ray_jobs.data.shard_specs import list_shards
    from ray_jobs.jobs.quality import measure, medians
    from ray_jobs.runs.run_folder import Run

    listed = list_shards(shards, allow_pipes)
    if not evaluate and len(listed) < 2:
        raise UserError("--shards", "one shard cannot be parted in two", "Give more, or others by --evaluate.")
    regressed, evaluated = (listed, list_shards(evaluate, allow_pipes)) if evaluate else (listed[::2], listed[1::2])
    config = QualityConfig(
        ModelConfig(**Run(patterns).fitted_model()),
        place(patterns),
        regressed,
        evaluated,
        target(out or patterns),
        words(operators),
        gram_positions,
        batch_size,
        max_samples,
        seed,
    )
    run = measure(config, resources)
    for name, value in medians(run).items():
        say(f"{name:>24}  median ρ {value:.3f}")
    say(f"quality: {run.folder / 'quality.parquet'}, drawn in {run.folder / 'quality.png'}")


@with_resources
def explain(
    patterns: Fitted,
    shards: Shards,
    out: Annotated[str | None, typer.Option(**PLACE, help="For the explanations; by default the fit's folder.")] = None,
    model: FitModel = None,
    weights: FitWeights = None,
    methods: Methods = DEFAULT_METHODS,
    estimator: Estimators = "default",
    set_: Settings = None,
    target: TargetSpec = "predicted",
    classes: Classes = None,
    output: OutputKinds = DEFAULT_OUTPUTS,
    resize: MapSize = None,
    reduce_channels: Reduction = "none",
    precision: FitPrecision = None,
    batch_size: BatchSize = 32,
    compile: Compile = None,  # noqa: A002
    max_samples: MaxSamples = None,
    seed: Seed = 0,
    allow_pipes: AllowPipes = False,
    *,
    resources: Resources,
) -> None:
    """Shards + patterns → explanations, one shard for each input shard."""
    from ray_jobs.data.shard_specs import list_shards
    from ray_jobs.jobs.explain.explain import explain as run_explain
    from ray_jobs.jobs.explain.targets import names_for

    of_fit, listed = fitted(patterns, model, weights, precision), list_shards(shards, allow_pipes)
    common = on_methods(of_fit, patterns, listed, out, batch_size, methods, estimator, set_, max_samples, seed)
    config = ExplainConfig(
        **vars(common),
        target=target,
        classes=names_for(target, of_fit.spec, classes),
        outputs=words(output),
        reduction=reduce_channels,
        size=resize,
        compile=compile,
    )
    run = run_explain(config, resources)
    done = run.manifest()["explain"]
    say(f"explain: {done['samples']} samples, {done['refused']} refused. Explanations: {run.folder / 'explanations'}")


@with_resources
def degrade(
    patterns: Fitted,
    shards: Shards,
    out: Annotated[str | None, typer.Option(**PLACE, help="Where the results go; by default the fit's folder.")] = None,
    model: FitModel = None,
    weights: FitWeights = None,
    methods: Methods = DEFAULT_METHODS,
    estimator: Estimators = "default",
    set_: Settings = None,
    patch_size: Annotated[int, typer.Option(min=1, help="Height and width of a patch in pixels.")] = PATCH,
    steps: Annotated[int, typer.Option(min=1, help="Patches that are replaced, one after the other.")] = STEPS,
    replacement: Annotated[str, typer.Option(help=f"What by: {', '.join(REPLACEMENTS)}.")] = "mean",
    least_first: Annotated[bool, typer.Option("--least-first", help="The least relevant patches first.")] = False,
    precision: FitPrecision = None,
    batch_size: BatchSize = 32,
    max_samples: MaxSamples = None,
    seed: Seed = 0,
    allow_pipes: AllowPipes = False,
    *,
    resources: Resources,
) -> None:
    """Shards + patterns → how soon predictions fall when what a map says matters is taken away (Figure 4)."""
    from ray_jobs.data.shard_specs import list_shards
    from ray_jobs.jobs.degrade import area_lines
    from ray_jobs.jobs.degrade import degrade as run_degrade

    of_fit, listed = fitted(patterns, model, weights, precision), list_shards(shards, allow_pipes)
    common = on_methods(of_fit, patterns, listed, out, batch_size, methods, estimator, set_, max_samples, seed)
    config = DegradeConfig(
        **vars(common), patch=patch_size, steps=steps, replacement=replacement, least_first=least_first
    )
    run = run_degrade(config, resources)
    for line in area_lines(run):
        say(line)
    done = run.manifest()["degrade"]
    say(f"degrade: {done['samples']} samples, {done['refused']} refused. Curves: {run.folder / 'degradation.png'}")


@with_resources
def reproduce(
    out: Annotated[Path, typer.Option(**LOCAL, help="Where everything goes.")],
    dataset: Annotated[str, typer.Option(help="mnist, fashion-mnist, or folder.")] = "folder",
    data: Annotated[
        Path | None,
        typer.Option(**LOCAL, help="Digits: folder of the four idx files; else one with train/ and test/."),
    ] = None,
    model: Annotated[str | None, typer.Option(**NAME, help="The model; for digits a small one is trained.")] = None,
    weights: Weights = "default",
    shards: Annotated[list[str] | None, typer.Option(help="Training data, in place of --data. Repeatable.")] = None,
    evaluate: Annotated[list[str] | None, typer.Option(help="Test data, in place of --data. Repeatable.")] = None,
    image_size: ImageSize = None,
    resize: Resize = None,
    mean: Mean = None,
    std: Std = None,
    strip_softmax: StripSoftmax = False,
    patch_size: Annotated[
        int | None, typer.Option(min=1, help="Of the degradation; by default 9, of small images 4.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of the degradation; by default 100, or all patches.")
    ] = None,
    replacement: Annotated[
        str | None, typer.Option(help="Of the degradation; by default mean, of small images zero.")
    ] = None,
    degraded: Annotated[int, typer.Option(min=1, help="Test images that are degraded.")] = 1000,
    batch_size: BatchSize = 32,
    max_samples: MaxSamples = None,
    seed: Seed = 0,
    allow_pipes: AllowPipes = False,
    *,
    resources: Resources,
) -> None:
    """The paper's experiments in one go: patterns, their quality, image degradation, figures 3 to 6, results.md."""
    from ray_jobs.data.shard_specs import list_shards
    from ray_jobs.studies.datasets import NAMES
    from ray_jobs.studies.reproduce import Experiment, digits
    from ray_jobs.studies.reproduce import reproduce as run_reproduce

    here = out.absolute()
    if dataset in NAMES and model is None:
        if data is None:
            raise UserError("--data", f"no folder of {dataset}'s files", "Name the one with the four idx files.")
        experiment = digits(dataset, data, here, max_samples, seed)
    elif dataset == "folder" and model is not None and (data is not None or (shards and evaluate)):
        sizes = image_size, resize, numbers(mean), numbers(std)
        train, test = (shards or [f"{data}/train"]), (evaluate or [f"{data}/test"])
        listed = list_shards(train, allow_pipes), list_shards(test, allow_pipes)
        config = ModelConfig(model, weights, "float32", seed, *sizes, strip_softmax=strip_softmax)
        experiment = Experiment(config, *listed, seed=seed)
    else:
        what = "neither a data set with its own model nor a model with data"
        remedy = f"Give --dataset {' or '.join(NAMES)} with --data, or --model with --data or --shards and --evaluate."
        raise UserError("reproduce", what, remedy)
    experiment = replace(
        experiment,
        patch=patch_size,
        steps=steps,
        replacement=replacement,
        degraded=degraded,
        batch_size=batch_size,
        max_samples=max_samples,
    )
    found = run_reproduce(experiment, here, resources)
    say(f"reproduce: {found}, with the paper's figures 3 to 6 beside it")


COMMANDS = demo, fit, quality, explain, degrade, reproduce
