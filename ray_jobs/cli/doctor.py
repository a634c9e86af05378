"""`patternnet doctor`: whether a cluster is ready for a long run."""

import sys

from rich.console import Console
from rich.table import Table

from patterns import UserError
from ray_jobs.cli.arguments import absolute, echo, resolve_shards
from ray_jobs.cli.typer_options import command, name_flags
from ray_jobs.config import Resources
from ray_jobs.config.commands import DoctorOptions

# Measured; see "Feeding a GPU" in docs/data.md.
GPU_NEED = "an H200 takes 6500 in a forward pass of ResNet-50 (TF32), and about 1600 in its fit"


@command(
    "patternnet doctor",
    "patternnet doctor --shards '/data/train-{0000..1023}.tar' --out /data/runs",
    "patternnet doctor --address HEAD:6379 --cpus-per-worker 4 --out s3://bucket",
)
def doctor(options: DoctorOptions) -> None:
    """Check on every node whether a cluster is ready for a long run, and report each problem with its fix."""
    from ray_jobs.ops.preflight import examine

    names = ("gpus_per_worker", "cpus_per_worker", "min_workers", "address")
    resources = Resources(**{name: getattr(options, name) for name in names})
    shards = resolve_shards(options.shards, options) if options.shards else ()
    found = examine(resources, shards, absolute(options.out) if options.out else None, options.patience)
    table = Table("node", "host", "CPUs", "GPUs", "memory free", "disk free", "source", "images/s", "code", box=None)
    for node in found.nodes:
        table.add_row(*node.cells())
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    room = f"{found.workers} workers of {found.cpus:g} CPU{'' if found.cpus == 1 else 's'}"
    echo(f"{len(found.nodes)} nodes, with room for {room}; {len(shards)} shards checked")
    echo(f"images/s: JPEGs of 500×375 that the CPUs of a node decode; {GPU_NEED}")
    for problem in found.problems:
        echo(name_flags(f"  {problem}", doctor.flags()))
    if found.problems:
        raise UserError("doctor", f"{len(found.problems)} problems to fix before a long run", "They are listed above.")
    echo("doctor: no problems found")
