"""`patternnet plan`: the memory that a fit needs."""

import sys

from rich.console import Console
from rich.table import Table

from ray_jobs.cli.arguments import echo
from ray_jobs.cli.typer_options import command
from ray_jobs.config import ModelConfig
from ray_jobs.config.commands import PlanOptions
from ray_jobs.units import format_bytes


@command(
    "patternnet plan --model torchvision:vgg16",
    "patternnet plan --model timm:resnet50 --weights random --memory 16G",
)
def plan(model: ModelConfig, options: PlanOptions) -> None:
    """Show a model's operators, the bytes of their moments, the passes for a memory budget, and default estimators."""
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
