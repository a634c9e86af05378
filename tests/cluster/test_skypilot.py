"""The task for SkyPilot: valid by its schema, with commands that run, and recovery that resumes."""

import copy
import json
import os
import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from jsonschema import Draft202012Validator

from ray_jobs.cli.app import make_app
from ray_jobs.cli.submit import check_usage
from tests.cluster.kubernetes_objects import parsed

ROOT = Path(__file__).parents[2]
TASK: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / "skypilot" / "fit.yaml").read_text())
PAGE = (ROOT / "docs" / "skypilot.md").read_text()
SCHEMA = json.loads((Path(__file__).parent / "schemas" / "skypilot.json").read_text())
TAKEN = ("6380", "8266", "52365")  # by SkyPilot's own Ray


def complaints(task: dict[str, Any]) -> list[str]:
    validator = Draft202012Validator({"$ref": "#/$defs/Task", **SCHEMA})
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(task)]


def test_skypilot_accepts_every_field() -> None:
    assert complaints(TASK) == []


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "misspelt": lambda task: task.update(num_node=4),
    "text for number": lambda task: task.update(num_nodes="4"),
    "misspelt in resources": lambda task: task["resources"].update(use_spots=True),
    "text for flag": lambda task: task["resources"].update(use_spot="yes"),
    "misspelt in recovery": lambda task: task["resources"]["job_recovery"].update(recover_on_exit_code=[3]),
    "status out of range": lambda task: task["resources"]["job_recovery"].update(recover_on_exit_codes=[300]),
    "list for text": lambda task: task.update(run=["patternnet fit"]),
    "number for a variable's name": lambda task: task["envs"].update({"1A": "x"}),
}


@pytest.mark.parametrize("how", WRONG)
def test_invalid_task_is_rejected(how: str) -> None:
    changed = copy.deepcopy(TASK)
    WRONG[how](changed)
    assert complaints(changed)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home folder with stand-ins that record how they are called."""
    (tmp_path / "sky_templates" / "ray").mkdir(parents=True)
    (tmp_path / "patternnet" / "bin").mkdir(parents=True)
    start = tmp_path / "sky_templates" / "ray" / "start_cluster"
    start.write_text('#!/bin/bash\necho "$RAY_CMD|$RAY_AUTH_MODE|$RAY_AUTH_TOKEN|$VIRTUAL_ENV" > ~/started\n')
    program = tmp_path / "patternnet" / "bin" / "patternnet"
    program.write_text("#!/bin/bash\nprintf '%s\\0' \"$@\" > ~/words\nexit ${STATUS:-0}\n")
    for file in (start, program):
        file.chmod(0o755)
    return tmp_path


def run(home: Path, rank: int, status: int = 0) -> int:
    env = {name: str(value) for name, value in TASK["envs"].items()}
    env |= {"HOME": str(home), "PATH": os.environ["PATH"], "SKYPILOT_NODE_RANK": str(rank), "STATUS": str(status)}
    env |= {"SKYPILOT_NUM_NODES": str(TASK["num_nodes"]), "RAY_AUTH_TOKEN": "secret"}
    return subprocess.run(["bash", "-c", TASK["run"]], env=env, check=False).returncode


def test_first_machine_submits_a_valid_fit_to_the_ray_of_skypilots_script(home: Path) -> None:
    assert run(home, rank=0) == 0
    assert (home / "started").read_text() == f"{home}/patternnet/bin/ray|token|secret|\n"
    words = (home / "words").read_text().split("\0")[:-1]
    assert words[:3] == ["submit", "--address", "http://127.0.0.1:8265"]
    context = typer.main.get_command(make_app()).make_context("patternnet", ["submit"])
    check_usage(context, words[3:])
    values = parsed(["patternnet", *words[3:]])
    assert values["out"] == f"{TASK['envs']['DATA']}/runs/vgg16"
    assert values["shards"] == [f"{TASK['envs']['DATA']}/shards/train-{{0000..1023}}.tar"]
    assert values["min_workers"] == TASK["num_nodes"]
    assert values["cpus_per_worker"] <= int(TASK["resources"]["cpus"].rstrip("+"))


def test_other_machines_only_join(home: Path) -> None:
    assert run(home, rank=1) == 0
    assert (home / "started").exists()
    assert not (home / "words").exists()


def test_job_that_stopped_with_work_left_is_recovered_and_bad_input_is_not(home: Path) -> None:
    recovery = TASK["resources"]["job_recovery"]
    assert TASK["resources"]["use_spot"] is True
    assert run(home, rank=0, status=3) in recovery["recover_on_exit_codes"]
    assert run(home, rank=0, status=2) not in recovery["recover_on_exit_codes"]
    assert recovery["max_restarts_on_errors"] == 0


def test_task_holds_no_secret_and_no_port_of_skypilots_own_ray() -> None:
    assert TASK["secrets"] == {"RAY_AUTH_TOKEN": None}
    assert not [port for port in TAKEN if port in TASK["run"] + TASK["setup"]]
    assert all(port in PAGE for port in TAKEN)


def test_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"=={project['version']}'" in TASK["setup"]
    torch, vision = re.findall(r"torch(?:vision)?==[\d.]+", TASK["setup"])
    assert f"{torch} {vision}" in (ROOT / "Makefile").read_text()


def test_commands_of_the_page_name_the_task_and_its_secret() -> None:
    launched = [line for line in PAGE.splitlines() if line.startswith("sky jobs launch")]
    assert launched
    for line in launched:
        assert "cluster/skypilot/fit.yaml" in line
        assert "--secret RAY_AUTH_TOKEN" in line
