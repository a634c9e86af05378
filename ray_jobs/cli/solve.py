"""`patternnet solve`: further patterns from the moments of a fit."""

from ray_jobs.cli.arguments import absolute, echo
from ray_jobs.cli.typer_options import command
from ray_jobs.config import Resources
from ray_jobs.config.commands import SolveOptions


@command(
    "patternnet solve runs/vgg16 --estimators filter,multivariate",
    "patternnet solve runs/vgg16 \\\n    --estimators 'features.*=linear,classifier.*=two-component'",
)
def solve(options: SolveOptions) -> None:
    """Compute the patterns of further estimators from the moments of a finished fit, without data."""
    from ray_jobs.jobs.fit.fit import describe_outliers
    from ray_jobs.jobs.fit.fit import solve as run_solve

    solved = run_solve(absolute(options.run), options.estimators, Resources(address=options.address))
    done = solved.manifest()["fit"]
    for line in describe_outliers(done):
        echo(line)
    echo(f"solve: {', '.join(done['solved'])}. Patterns: {solved.folder / 'patterns.safetensors'}")
