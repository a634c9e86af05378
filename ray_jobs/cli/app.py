"""The program: a command line → a command; errors → one line and an exit status.

Exit status: 0 done; 2 wrong usage or input; 3 stopped early, nothing is lost; 1 anything unforeseen.
"""

import logging
import os
import platform
import signal
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Annotated

import typer

from patterns import UserError
from ray_jobs.cli.arguments import echo
from ray_jobs.cli.atlas import atlas
from ray_jobs.cli.concepts import concepts
from ray_jobs.cli.degrade import degrade
from ray_jobs.cli.demo import demo
from ray_jobs.cli.doctor import doctor
from ray_jobs.cli.evaluate import evaluate
from ray_jobs.cli.explain import explain
from ray_jobs.cli.export import export
from ray_jobs.cli.export_model import export_model
from ray_jobs.cli.fit import fit
from ray_jobs.cli.grid import grid
from ray_jobs.cli.merge import merge
from ray_jobs.cli.pack import pack
from ray_jobs.cli.plan import plan
from ray_jobs.cli.quality import quality
from ray_jobs.cli.report import report
from ray_jobs.cli.reproduce import reproduce
from ray_jobs.cli.select import select
from ray_jobs.cli.show import show
from ray_jobs.cli.solve import solve
from ray_jobs.cli.status import status
from ray_jobs.cli.submit import submit
from ray_jobs.cli.typer_options import Command, name_flags
from ray_jobs.engine.signals import INTERRUPTED, SIGNALS, StoppedShortError
from ray_jobs.io.file_systems import to_user_error
from ray_jobs.units import find_version

COMPLETION = "_PATTERNNET_COMPLETE"  # set by the shell when it asks for the words that may follow
CTRL_C = 130  # the status that the command-line library returns after Ctrl-C
WITHOUT_OPTIONS: list[list[str]] = [[], ["--help"], ["--version"]]  # command lines that need no options of commands
# In the order of the help.
COMMANDS = {
    each.name: each
    for each in (
        *(demo, fit, quality, explain, degrade, evaluate, atlas, concepts, reproduce),
        *(pack, plan, merge, status, solve, grid, report, select, export, export_model, show, doctor, submit),
    )
}


def program(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the versions of this program, Python, torch and Ray.")
    ] = False,
) -> None:
    """Print the versions, unless a command follows."""
    if version:
        echo(f"patternnet {find_version('patternnet-ray')}")
        echo(f"Python {platform.python_version()}, torch {find_version('torch')}, Ray {find_version('ray')}")
    elif context.invoked_subcommand is None:
        raise UserError("patternnet --", "no command follows", "See patternnet --help.")
    else:
        return
    raise typer.Exit


def make_app(
    commands: Iterable[Command] = COMMANDS.values(), with_options: bool = True, with_help: bool = True
) -> typer.Typer:
    """Return the program.

    Args:
        commands: The commands that it has.
        with_options: Whether they have their options, which the list of commands does not need.
        with_help: Whether options have their help. That of some options imports torch, which takes seconds, and the
            shell does not need it to complete a word.
    """
    app = typer.Typer(
        help="PatternNet and PatternAttribution for large models and datasets, on Ray.",
        pretty_exceptions_enable=False,
        no_args_is_help=True,
    )
    app.callback(invoke_without_command=True)(program)
    for each in commands:
        run = each.function(with_help) if with_options else each.function_without_options()
        app.command(each.name, epilog=each.epilog, context_settings=each.context_settings)(run)
    return app


def main() -> None:
    """Run the program and exit with its status."""
    for number in SIGNALS:  # as Ctrl-C, unless a job commits first
        if signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` does
            signal.signal(number, signal.default_int_handler)
    status = exit_status(sys.argv[1:])
    for number in SIGNALS:  # the status is known; nothing may change it on the way out
        signal.signal(number, signal.SIG_IGN)
    try:
        sys.stdout.flush()
    except OSError as error:
        status = complain(str(to_user_error(error, "standard output", "written")), 2)
    sys.exit(status)


def exit_status(arguments: list[str]) -> int:
    """Run the program and return its exit status. Errors in usage and input are one line on stderr."""
    warnings.filterwarnings("ignore")
    for library in ("torch", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    name = arguments[0] if arguments and arguments[0] in COMMANDS else None
    flags: Mapping[str, str] = COMMANDS[name].flags() if name else {}
    try:
        if COMPLETION in os.environ:
            app = make_app(with_help=False)
        elif name is None or name == submit.name:  # which parses the command that follows it
            app = make_app(with_options=arguments not in WITHOUT_OPTIONS)
        else:
            app = make_app([COMMANDS[name]])
        status = app(arguments, prog_name="patternnet", standalone_mode=False) or 0
        if status == CTRL_C:
            raise KeyboardInterrupt
        return status
    except UserError as error:
        return complain(name_flags(str(error), flags), 2)
    except StoppedShortError as error:
        return complain(str(error), 3)
    except KeyboardInterrupt:
        return complain(INTERRUPTED, 3)
    except OSError as error:  # of this machine: errors of stores and shards become UserErrors where they are raised
        return complain(str(to_user_error(error, str(error.filename or "a file or stream"), "used")), 2)
    except Exception as error:
        if hasattr(error, "format_message"):  # usage errors of the command-line library
            if not (what := error.format_message()):  # no command at all: the help was shown
                return 2
            command = f" {name}" if name else ""
            return complain(f"{what.rstrip('.')}. See patternnet{command} --help.", 2)
        raise


def complain(line: str, exit_status: int) -> int:
    """Print an error and return the exit status."""
    print(f"patternnet: {line}", file=sys.stderr, flush=True)
    return exit_status
