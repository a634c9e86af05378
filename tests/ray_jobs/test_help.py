"""The help of every command and its examples, the versions of the program, and completion by TAB."""

import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import ray
import typer

from patterns.attribution import parse_method
from ray_jobs.cli.app import COMMANDS as REGISTERED
from ray_jobs.cli.app import exit_status, make_app
from ray_jobs.units import find_version

PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
PROGRAM: Any = typer.main.get_command(make_app())
COMMANDS = sorted(PROGRAM.commands)
EXAMPLES = {name: each.examples for name, each in REGISTERED.items()}
LINES = [(name, example) for name, examples in EXAMPLES.items() for example in examples]


def parse(words: list[str]) -> Any:
    """Return the context that the program's parser makes of a command line, without running it."""
    context = PROGRAM.make_context("patternnet", list(words))
    name, command, arguments = PROGRAM.resolve_command(context, words)
    return command.make_context(name, arguments, parent=context)


def parse_example(example: str) -> Any:
    """Return the context of an example; of the command that is submitted, if it is `submit`."""
    parsed = parse(shlex.split(example.replace("\\\n", ""))[1:])
    return parse(parsed.params["command"]) if parsed.info_name == "submit" else parsed


def test_every_command_has_examples() -> None:
    assert sorted(EXAMPLES) == COMMANDS
    assert all(1 <= len(examples) <= 3 for examples in EXAMPLES.values())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_a_summary_and_examples_that_fit_80_columns(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    summary = PROGRAM.commands[name].help
    assert summary
    assert "\n" not in summary.strip()
    assert exit_status([name, "--help"]) == 0
    shown = capsys.readouterr().out
    below = [line.rstrip().removeprefix(" ") for line in shown.partition("\n Examples")[2].splitlines()]
    for example in EXAMPLES[name]:
        lines = [f"  {line}" for line in example.splitlines()]
        assert lines == below[below.index(lines[0]) :][: len(lines)]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help_text(name: str) -> None:
    shown = [each for each in PROGRAM.commands[name].params if not getattr(each, "hidden", False)]
    assert [each.name for each in shown if not each.help] == []


@pytest.mark.parametrize(("name", "example"), LINES)
def test_examples_are_accepted_by_the_program(name: str, example: str) -> None:
    program, *words = shlex.split(example.replace("\\\n", ""))
    assert (program, words[0]) == ("patternnet", name)
    assert parse_example(example).info_name in COMMANDS


@pytest.mark.parametrize("example", [example for _, example in LINES if "--methods" in example])
def test_methods_of_examples_exist(example: str) -> None:
    methods = parse_example(example).params["methods"]
    assert methods
    for method in methods:
        parse_method(method)


def test_wrong_option_in_an_example_would_be_noticed() -> None:
    with pytest.raises(Exception, match="No such option: --modell"):
        parse(["fit", "--modell", "x", "--shards", "y", "--out", "z"])


def test_version_is_that_of_the_installed_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["--version"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"patternnet {metadata.version('patternnet-ray')}\n")
    assert f"torch {metadata.version('torch')}, Ray {metadata.version('ray')}" in printed


def type_keys(shell: str, home: Path, keys: str) -> str:
    """Return the arguments of the program after these keys were pressed in an interactive shell. TABs are keys."""
    ours, theirs = pty.openpty()
    env = {"HOME": str(home), "PATH": PATH, "TERM": "dumb", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([shell, "-i"], stdin=theirs, stdout=theirs, stderr=theirs, env=env, cwd=home)
    try:
        os.write(ours, b'patternnet() { echo "<ran:$*>"; }; echo $((40 + 2))ready\n')
        printed, deadline, pressed = "", time.monotonic() + 120, False
        while not (found := re.search(r"<ran:([^$]*?)>", printed)):
            assert time.monotonic() < deadline, printed
            if select.select([ours], [], [], 0.1)[0]:
                printed += os.read(ours, 4096).decode(errors="replace")
            if not pressed and "42ready" in printed:
                os.write(ours, keys.encode())
                pressed = True
        return found[1].strip()
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)


@pytest.mark.full
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_tab_completes_commands_options_and_values(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    env = {**os.environ, "HOME": str(tmp_path), "SHELL": f"/bin/{shell}", "PATH": PATH}
    # The program finds the shell among its ancestors; a shell that has nothing else to do would be replaced by it.
    install = [shell, "-c", "patternnet --install-completion; exit $?"]
    subprocess.run(install, env=env, check=True, capture_output=True)
    (tmp_path / "photographs").mkdir()
    tab = "\t\t" if shell == "zsh" else "\t"  # zsh only loads the completion at the first one
    typed = type_keys(shell, tmp_path, f"patternnet f{tab}--pos\t16 --until\t0.1\n")
    assert typed == "fit --positions 16 --until-converged 0.1"
    assert type_keys(shell, tmp_path, f"patternnet explain --output npy,za{tab}\n").split() == [
        "explain",
        "--output",
        "npy,zarr",
    ]
    assert type_keys(shell, tmp_path, f"patternnet repo{tab}photogr\t\n").rstrip("/") == "report photographs"


def complete(words: str, **env: str) -> list[str]:
    """Return the words that bash is offered."""
    asked = {"_PATTERNNET_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    found = subprocess.run(
        ["patternnet"], env={**os.environ, "PATH": PATH, **asked, **env}, check=True, capture_output=True, text=True
    )
    return found.stdout.split()


def test_completion_leaves_out_deprecated_flags_and_imports_no_torch() -> None:
    words = complete("patternnet explain --")
    assert "--map-size" in words
    assert "--resize" not in words
    profile = subprocess.run(
        ["patternnet"],
        env={
            **os.environ,
            "PATH": PATH,
            "PYTHONPROFILEIMPORTTIME": "1",
            "_PATTERNNET_COMPLETE": "complete_bash",
            "COMP_WORDS": "patternnet explain --",
            "COMP_CWORD": "2",
        },
        check=True,
        capture_output=True,
        text=True,
    )
    assert "typer" in profile.stderr
    assert " torch\n" not in profile.stderr


def test_checkout_that_is_not_installed_has_no_version() -> None:
    """As in a job that runs in a folder sent by `patternnet submit --working-dir`."""
    assert find_version("patternnet-ray-not-installed") == "not installed"
    assert find_version("ray") == ray.__version__
