"""`patternnet status`: the progress of a run."""

import time

from ray_jobs.cli.arguments import echo
from ray_jobs.cli.typer_options import command
from ray_jobs.config.commands import RunFolder


@command("patternnet status runs/vgg16", "patternnet status s3://bucket/resnet50")
def status(options: RunFolder) -> None:
    """Show the progress of a run, from its files alone: on any machine that sees them."""
    from ray_jobs.config.timing import PRODUCTION
    from ray_jobs.runs.run_folder import Run
    from ray_jobs.views.status import status_lines

    for line in status_lines(Run(options.run), time.time(), patience=2 * PRODUCTION.heartbeat_interval):
        echo(line)
