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
    from ray_jobs.jobs.fit.fit import solve as run_solve

    solved = run_solve(absolute(options.run), options.estimators, Resources(address=options.address))
    echo(f"solve: {', '.join(solved.manifest()['fit']['solved'])}. Patterns: {solved.folder / 'patterns.safetensors'}")
