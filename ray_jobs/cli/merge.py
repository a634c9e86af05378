"""`patternnet merge`: several fits → one fit of all their data."""

from ray_jobs.cli.arguments import absolute, echo, output_folder
from ray_jobs.cli.typer_options import command
from ray_jobs.config import Resources
from ray_jobs.config.commands import MergeOptions


@command("patternnet merge runs/january runs/february --out runs/both")
def merge(options: MergeOptions) -> None:
    """Merge the moments of several fits into one fit of all their data."""
    from ray_jobs.jobs.fit.fit import describe_outliers
    from ray_jobs.jobs.fit.fit import merge as run_merge

    runs = [absolute(run) for run in options.runs]
    merged = run_merge(runs, output_folder(options.out), Resources(address=options.address))
    done = merged.manifest()["fit"]
    for line in describe_outliers(done):
        echo(line)
    echo(f"merge: {done['samples']} samples of {done['shards']} shards. Patterns: {merged.folder}/patterns.safetensors")
