"""Fixtures of the tests of docs/operations.md."""

import shlex
from pathlib import Path

import pytest

from ray_jobs.cli.app import exit_status
from tests.conftest import make_shards
from tests.operations.terminal import PREPARED, SAMPLES, SHARDS, Terminal, given


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_shards(tmp_path_factory.mktemp("plain"), SHARDS, SAMPLES)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("others")
    make_shards(folder, 2, SAMPLES, seed=1)
    return f"{folder}/*.tar"


@pytest.fixture(scope="module")
def undisturbed(model_spec: str, plain: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fit without a failure."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    words = f"--model {model_spec} {PREPARED} --shards {given(plain)} --out {run} --workers 0"
    assert exit_status(["fit", *shlex.split(words)]) == 0
    return run


@pytest.fixture
def terminal(
    model_spec: str, plain: list[str], others: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Terminal:
    monkeypatch.chdir(tmp_path)
    places = {name: tmp_path / name.lower() for name in ("RUN", "TRIAL", "MORE", "MERGED", "MOVED")}
    return Terminal({"MODEL": f"{model_spec} {PREPARED}", "SHARDS": given(plain), "OTHERS": f"'{others}'", **places})
