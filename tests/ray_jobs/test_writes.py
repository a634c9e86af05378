"""A fit that dies at any of its file operations loses nothing; the soak tests each operation."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import jpeg, make_shards, write_tar
from tests.ray_jobs.dying import DEAD

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trials(model_spec: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("writes")
    shards = make_shards(folder / "shards", 3, 3, seed=11)
    bad = {"__key__": "cut", "jpg": b"\xff\xd8\xff\xe0 no more"}
    good = {"__key__": "whole", "jpg": jpeg(np.random.default_rng(2))}
    shards.append(str(write_tar(folder / "shards" / "bad.tar", [bad, good])))
    arguments = json.dumps({"model": model_spec, "shards": shards, "folder": str(folder / "run")})
    command = [sys.executable, "-m", "tests.ray_jobs.dying", arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_operations_of_every_type_were_tested(trials: list[dict[str, Any]]) -> None:
    assert all(t["died"] == DEAD for t in trials)
    assert len(trials) >= 80
    whole, torn = ([t["at"] for t in trials if t["torn"] == which] for which in (False, True))
    for name in ("manifest.json", "ledger.json", "progress.json", "patterns.safetensors", "quarantine.parquet"):
        assert any(at.startswith("os.rename") and at.endswith(name) for at in whole), name
        assert any(at.endswith(name) for at in torn), name
    assert any(at.startswith("os.remove part-") for at in whole), "no merged partial was deleted"
    assert sum(at.startswith("open") for at in whole) > 20


def test_same_command_succeeds_after_every_death_and_changes_no_digit(trials: list[dict[str, Any]]) -> None:
    assert [t["at"] for t in trials if t["resumed"] != 0] == []
    for t in trials:
        assert t["after"]["differs"] < 1e-9, t["at"]
        assert (t["after"]["samples"], t["after"]["refused"]) == (10, 1), t["at"]


def test_no_file_is_left_behind(trials: list[dict[str, Any]]) -> None:
    for t in trials:
        after = t["after"]
        assert after["files"] == trials[0]["after"]["files"], t["at"]
        assert after["parts"] == len(after["ledger"]), t["at"]
        assert after["tables"] == sum(part["refused"] > 0 for part in after["ledger"]), t["at"]
