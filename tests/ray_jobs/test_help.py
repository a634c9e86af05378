"""Help that can be followed: every command's summary and examples, the program's versions, and completion by TAB."""

import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import ray
import typer

from ray_jobs.cli.app import COMMANDS as REGISTERED
from ray_jobs.cli.app import app, exit_status
from ray_jobs.units import find_version

PROGRAM: Any = typer.main.get_command(app)
COMMANDS = sorted(PROGRAM.commands)
EXAMPLES = {name: each.examples for name, each in REGISTERED.items()}


def parse(words: list[str]) -> Any:
    """What the program's own parser makes of a command line, without running it."""
    context = PROGRAM.make_context("patternnet", list(words))
    name, command, arguments = PROGRAM.resolve_command(context, words)
    return command.make_context(name, arguments, parent=context)


def test_all_commands_have_examples_and_no_other_has() -> None:
    assert sorted(EXAMPLES) == COMMANDS


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
    assert 1 <= len(EXAMPLES[name]) <= 3
    for example in EXAMPLES[name]:
        lines = [f"  {line}" for line in example.splitlines()]
        assert lines == below[below.index(lines[0]) :][: len(lines)]


@pytest.mark.parametrize(("name", "example"), [(n, e) for n, examples in EXAMPLES.items() for e in examples])
def test_examples_are_commands_that_the_program_takes(name: str, example: str) -> None:
    program, *words = shlex.split(example.replace("\\\n", ""))
    assert (program, words[0]) == ("patternnet", name) or name == "submit"
    parsed = parse(words)
    assert parsed.info_name == name
    if name == "submit":
        parse(parsed.params["command"])


def test_an_example_with_a_wrong_option_would_be_seen() -> None:
    with pytest.raises(Exception, match="No such option: --modell"):
        parse(["fit", "--modell", "x", "--shards", "y", "--out", "z"])


def test_the_version_is_that_of_the_installed_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["--version"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"patternnet {metadata.version('patternnet-ray')}\n")
    assert f"torch {metadata.version('torch')}, Ray {metadata.version('ray')}" in said


def typed(shell: str, home: Path, keys: str) -> str:
    """What an interactive shell ran in place of the program, once these keys were pressed. TABs are keys."""
    ours, theirs = pty.openpty()
    env = {"HOME": str(home), "PATH": os.environ["PATH"], "TERM": "dumb"}
    process = subprocess.Popen([shell, "-i"], stdin=theirs, stdout=theirs, stderr=theirs, env=env, cwd=home)
    try:
        os.write(ours, b'patternnet() { echo "<ran:$*>"; }; echo $((40 + 2))ready\n')
        said, until, pressed = "", time.monotonic() + 20, False
        while time.monotonic() < until and not (found := re.search(r"<ran:([^$]*?)>", said)):
            if select.select([ours], [], [], 0.1)[0]:
                said += os.read(ours, 4096).decode(errors="replace")
            if not pressed and "42ready" in said:
                os.write(ours, keys.encode())
                pressed = True
        assert found, said
        return found[1].strip()
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_tab_completes_commands_and_options(
    shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", f"/bin/{shell}")
    for _ in range(2):
        assert exit_status(["--install-completion"]) == 0
    assert (tmp_path / f".{shell}rc").read_text().count("source") == 1
    (tmp_path / "photographs").mkdir()
    assert typed(shell, tmp_path, "patternnet f\t--mod\tx --until\t0.1\n") == "fit --model x --until-converged 0.1"
    assert typed(shell, tmp_path, "patternnet repo\tphotogr\t\n").rstrip("/") == "report photographs"


def test_completion_of_another_shell_is_refused(complaint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/usr/bin/fish")
    assert "the shell is 'fish', not bash or zsh" in complaint("--install-completion")


def test_a_checkout_that_is_not_installed_has_no_version_and_runs_all_the_same() -> None:
    """As where a job runs in a folder that `patternnet submit --working-dir` sent."""
    assert find_version("patternnet-ray-not-installed") == "not installed"
    assert find_version("ray") == ray.__version__
