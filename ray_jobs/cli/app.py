"""The command line: arguments → a job's config; errors → one line and an exit status.

Exit status: 0 done; 2 bad usage or input; 3 stopped short, nothing lost; 1 anything unforeseen.
"""

import logging
import platform
import signal
import sys
import warnings
from typing import Annotated

import typer

from patterns import UserError
from ray_jobs.cli import commands, completion, job_commands
from ray_jobs.cli.arguments import say
from ray_jobs.cli.examples import epilog
from ray_jobs.engine.signals import INTERRUPTED, SIGNALS, StoppedShortError
from ray_jobs.io.file_systems import as_user_error
from ray_jobs.units import version_of

CTRL_C = 130  # what the command-line library makes of Ctrl-C

app = typer.Typer(
    help="PatternNet and PatternAttribution for large models and datasets, on Ray.",
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)


@app.callback(invoke_without_command=True)
def program(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="The versions of this program, Python, torch and Ray.")
    ] = False,
    show_completion: Annotated[
        bool, typer.Option("--show-completion", help="Print what completes words in bash and zsh.")
    ] = False,
    install_completion: Annotated[
        bool, typer.Option("--install-completion", help="Have your bash or zsh complete words from now on.")
    ] = False,
) -> None:
    if version:
        say(f"patternnet {version_of('patternnet-ray')}")
        say(f"Python {platform.python_version()}, torch {version_of('torch')}, Ray {version_of('ray')}")
    elif show_completion or install_completion:
        text = completion.script(context.command)
        say(f"completion: {completion.install(text)} brings it to new shells" if install_completion else text)
    elif context.invoked_subcommand is None:
        raise UserError("patternnet --", "no command follows", "See patternnet --help.")
    else:
        return
    raise typer.Exit


for command in (*job_commands.COMMANDS, *commands.COMMANDS):
    app.command()(command)
# What follows the command that is submitted are its options.
app.command(context_settings={"allow_interspersed_args": False})(commands.submit)

COMMANDS = {command.callback.__name__: command for command in app.registered_commands if command.callback}
for name, registered in COMMANDS.items():
    registered.epilog = epilog(name)


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
        status = complain(str(as_user_error(error, "standard output", "written")), 2)
    sys.exit(status)


def exit_status(arguments: list[str]) -> int:
    """Run the program; gives its exit status. Bad usage and input are one line on stderr."""
    warnings.filterwarnings("ignore")
    for library in ("torch", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        status = app(arguments, prog_name="patternnet", standalone_mode=False) or 0
        if status == CTRL_C:
            raise KeyboardInterrupt
        return status
    except UserError as error:
        return complain(str(error), 2)
    except StoppedShortError as error:
        return complain(str(error), 3)
    except KeyboardInterrupt:
        return complain(INTERRUPTED, 3)
    except OSError as error:  # of this machine: those of stores and shards are UserErrors where they are raised
        return complain(str(as_user_error(error, str(error.filename or "a file or stream"), "used")), 2)
    except Exception as error:
        if hasattr(error, "format_message"):  # the command-line library's own complaints about usage
            if not (what := error.format_message()):  # no command at all: the help was shown
                return 2
            command = f" {arguments[0]}" if arguments[0] in COMMANDS else ""
            return complain(f"{what.rstrip('.')}. See patternnet{command} --help.", 2)
        raise


def complain(line: str, exit_status: int) -> int:
    print(f"patternnet: {line}", file=sys.stderr, flush=True)
    return exit_status
