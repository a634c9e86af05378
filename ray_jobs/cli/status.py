"""`patternnet status`: the progress of a run."""

import time

from ray_jobs.cli.arguments import echo
from ray_jobs.cli.typer_options import command
from ray_jobs.config.commands import StatusOptions


@command("patternnet status runs/vgg16 --price 2.5/gpu-hour", "patternnet status s3://bucket/resnet50")
def status(options: StatusOptions) -> None:
    """Show the progress of a run from its files, on any machine that can read the files."""
    from ray_jobs.config.timing import PRODUCTION
    from ray_jobs.runs.run_folder import Run
    from ray_jobs.views.status import status_lines

    patience = 2 * PRODUCTION.heartbeat_interval
    for line in status_lines(Run(options.run), time.time(), patience, price=options.price):
        echo(line)
