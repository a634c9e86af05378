"""`patternnet plan`: the memory that a fit needs, and what it takes."""

import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.table import Table

from ray_jobs.cli.arguments import echo, resolve_shards
from ray_jobs.cli.typer_options import command
from ray_jobs.config import FitConfig, ModelConfig, Resources
from ray_jobs.config.commands import PlanOptions, ShardOptions
from ray_jobs.units import format_bytes, format_duration, format_number


@command(
    "patternnet plan --model torchvision:vgg16",
    "patternnet plan --model timm:resnet50 --weights random --memory 16G",
    "patternnet plan --model torchvision:vgg16 --shards '/data/train-*.tar' \\\n    --workers 2 --price 2.5/gpu-hour",
)
def plan(model: ModelConfig, options: PlanOptions, reading: ShardOptions, resources: Resources) -> None:
    """Show a model's operators, and the memory of a fit; with --shards also its time, from a trial of a few batches."""
    from patterns.estimation import parse_estimators, required_sums, resolve_estimators
    from patterns.moments import moments_bytes, patch_moments_bytes
    from patterns.operators import TYPE_NAMES
    from ray_jobs.jobs.fit.memory_plan import model_bytes, plan_passes
    from ray_jobs.models import loading

    estimators = options.estimators
    parse_estimators(estimators)
    loaded = loading.load(model)
    parse_estimators(estimators, loaded.network.operators)
    explained_by = resolve_estimators(loaded.network, options.preset or "default")
    table = Table("operator", "type", "weight", "gate", "moments", "for quality", "explained by", box=None)
    sizes = {}
    for name, operator in loaded.network.operators.items():
        sizes[name] = moments_bytes(operator, required_sums(operator, estimators))
        gate = "none: several" if operator.mixed_gates else ""
        if operator.gate is not None:
            gate = str(operator.gate)
        shape = "×".join(map(str, operator.weight.shape))
        moments = format_bytes(sizes[name]), format_bytes(patch_moments_bytes(operator))
        table.add_row(name, TYPE_NAMES[type(operator.operator_type)], shape, gate, *moments, explained_by[name])
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    total = format_bytes(sum(sizes.values()))
    echo(f"{len(sizes)} operators; moments of {total} in each worker and in each file of partial moments")
    for line in loaded.traced.describe():
        echo(line)
    rest = format_bytes(model_bytes(loaded.network, options.batch_size))
    echo(f"each worker also holds the model and a batch of {options.batch_size}: about {rest}")
    if options.memory is not None:
        passes = plan_passes(loaded.network, estimators, options.memory, options.batch_size)
        echo(f"with --memory {format_bytes(options.memory)}: {len(passes)} passes over the data")
        for number, group in enumerate(passes, 1):
            size = format_bytes(sum(sizes[operator.name] for operator in group))
            echo(f"  {number}: {group[0].name} to {group[-1].name}, {size}")
    if options.shards:
        for line in forecast_lines(model, options, reading, resources):
            echo(line)


def forecast_lines(
    model: ModelConfig, options: PlanOptions, reading: ShardOptions, resources: Resources
) -> Iterator[str]:
    """Yield lines on what a fit will take, after a pilot."""
    from ray_jobs.jobs.fit.cost_pilot import Range, plan_cost

    config = FitConfig(
        model=model,
        shards=resolve_shards(options.shards, reading),
        out=options.out or "",
        batch_size=options.batch_size,
        estimators=options.estimators,
        max_samples=options.max_samples,
        memory=options.memory,
        positions=options.positions,
        compile=options.compile,
    )
    pilot, found = plan_cost(config, resources)

    def show(found: Range, format_value: Callable[[float], str] = format_number) -> str:
        return f"{format_value(found.value)} ({format_value(found.low)} to {format_value(found.high)})"

    rate, spread = 1 / pilot.per_sample, f"±{pilot.spread:.0%}"
    yield f"pilot: {pilot.batches} batches on {pilot.workers} workers, {rate:.3g} samples/s for each worker, {spread}"
    shards = f"{len(config.shards)} shards"
    yield f"fit of about {found.samples:,.0f} samples in {shards} with {max(resources.workers or 0, 1)} workers:"
    end = f"{format_duration(pilot.start)} before the first batch, {format_duration(pilot.end)} after the last"
    yield f"  time: {show(found.seconds, format_duration)}, of which {end}"
    names = (("worker-hours", "worker_hours"), ("device-hours", "device_hours"))
    for name, attribute in names:
        yield f"  {name}: {show(Range(*(getattr(usage, attribute) for usage in found.usage)))}"
    yield f"  written: {format_bytes(int(found.written))}, of which {format_bytes(int(found.kept))} stay"
    if resources.price is not None:
        hint = found.usage[1].explain_zero(resources.price)
        yield f"  cost: {show(found.cost(resources.price))} at {resources.price}{hint}"
