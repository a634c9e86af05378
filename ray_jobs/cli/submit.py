"""`patternnet submit`: a command → a job on a remote cluster."""

import os
from collections.abc import Sequence
from typing import Any

import typer

from patterns import UserError
from ray_jobs.cli.arguments import echo
from ray_jobs.cli.typer_options import command
from ray_jobs.config.commands import SubmitOptions


@command(
    "patternnet submit --address http://HEAD:8265 fit \\\n"
    "    --model torchvision:vgg16 --shards '/data/train-{0000..1023}.tar' \\\n"
    "    --out /data/runs/vgg16",
    "patternnet submit --address http://HEAD:8265 --no-wait status runs/vgg16",
    interspersed=False,
)
def submit(context: typer.Context, options: SubmitOptions) -> None:
    """Run a command as a job on a remote cluster, follow its log, and end with its exit status."""
    from ray_jobs.ops.submit import Submission
    from ray_jobs.ops.submit import submit as run_submit
    from ray_jobs.ops.working_dir import is_uv_project

    check_usage(context, options.command)
    uv = options.uv and options.working_dir is not None and is_uv_project(options.working_dir)
    submission = Submission(options.command, options.working_dir, options.pip, parse_variables(options.env), uv)
    if status := run_submit(submission, options.address, options.wait, options.patience, echo):
        raise typer.Exit(status)


def check_usage(context: typer.Context, words: Sequence[str]) -> None:
    """Raise the usage error that a command would raise itself, before anything is sent."""
    program: Any = context.find_root().command
    name, known, arguments = program.resolve_command(context, list(words))
    if name == "submit":
        raise UserError("submit", "it cannot submit itself", "Name another command.")
    known.make_context(name, arguments, parent=context.find_root())


def parse_variables(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Parse NAME=VALUE, or NAME for the value that the variable has in this process.

    Raises:
        UserError: If a text has another form, or a variable is not set.
    """
    found = {}
    for text in texts:
        name, given, value = text.partition("=")
        if not name or (not given and name not in os.environ):
            what = f"{text!r} names no variable that has a value here"
            raise UserError("", what, "Write NAME=VALUE or NAME.", "env")
        found[name] = value if given else os.environ[name]
    return tuple(found.items())
