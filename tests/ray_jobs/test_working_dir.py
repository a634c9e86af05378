"""What `submit` sends: no caches, nothing that is ignored, not too much; and the environment of a project of uv."""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from ray._private.runtime_env.packaging import create_package
from ray.job_submission import JobDetails, JobStatus, JobType

from cluster.local import PATH, ROOT, LocalCluster
from patterns import UserError
from ray_jobs.ops.submit import Submission, exit_status_of
from ray_jobs.ops.working_dir import EXCLUDES, is_uv_project, measure_upload, require_runnable_project
from tests.conftest import make_shards
from tests.ray_jobs.runs import OPTIONS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with code, caches, ignored files and files that Ray's own file ignores."""
    folder = tmp_path / "work"
    for name in (
        "models.py", "data/labels.csv", "data/huge.bin", "logs/a.log", "sub/keep.txt", "sub/drop.tmp", ".git/HEAD",
        ".venv/bin/python", "__pycache__/a.pyc", "sub/__pycache__/b.pyc", ".mypy_cache/x", "secret.env", "é ü.txt",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name * 10)
    (folder / "empty").mkdir()
    (folder / ".gitignore").write_text("*.env\nlogs/\n")
    (folder / "sub" / ".gitignore").write_text("*.tmp\n")
    (folder / ".rayignore").write_text("huge.bin\n")
    return folder


def test_what_is_measured_is_what_ray_packs(folder: Path, tmp_path: Path) -> None:
    upload = measure_upload(str(folder))
    packed = tmp_path / "packed.zip"
    env = Submission(("fit",), str(folder)).runtime_env
    assert env["excludes"] == list(EXCLUDES)
    create_package(str(folder), packed, include_gitignore=True, excludes=env["excludes"])
    with zipfile.ZipFile(packed) as archive:
        files = {info.filename: info.file_size for info in archive.infolist() if not info.is_dir()}
    assert upload.sizes == files
    kept = {"models.py", "data/labels.csv", "sub/keep.txt", "é ü.txt", ".gitignore", "sub/.gitignore", ".rayignore"}
    assert set(files) == kept
    assert packed.stat().st_size <= upload.size + 1000
    assert "7 files" in upload.describe()


def test_too_large_folder_names_its_largest_files(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(bytes(3000))
    (folder / "data" / "more.bin").write_bytes(bytes(2000))
    with pytest.raises(UserError) as caught:
        measure_upload(str(folder), limit=5000)
    assert "weights.bin (2.93 KiB), data/more.bin (1.95 KiB)" in caught.value.what
    assert ".gitignore" in caught.value.remedy


def test_limit_is_that_of_the_job_server(tmp_path: Path, complaint: Callable[..., str]) -> None:
    with (tmp_path / "large.bin").open("wb") as file:
        file.truncate(101 << 20)
    line = complaint("submit", "--address", "http://127.0.0.1:9", "--working-dir", tmp_path, "status", "run")
    assert "at most 100.00 MiB" in line
    assert "large.bin" in line


LOCKED = 'version = 1\n[[package]]\nname = "ray"\nversion = "2.60.0"\n[[package]]\nname = "patternnet-ray"\n'


@pytest.mark.parametrize(
    ("lock", "reason"),
    [
        ("not toml", "not a lock file"),
        ("version = 1", "not a lock file"),
        (LOCKED.replace("patternnet-ray", "other"), "does not depend on patternnet-ray"),
        (LOCKED.replace("2.60.0", "2.50.0"), "Ray 2.50.0, but the cluster runs 2.60.0"),
    ],
)
def test_project_that_cannot_run_is_one_line(tmp_path: Path, lock: str, reason: str) -> None:
    (tmp_path / "uv.lock").write_text(lock)
    assert not is_uv_project(str(tmp_path))
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    assert is_uv_project(str(tmp_path))
    with pytest.raises(UserError, match=reason):
        require_runnable_project(str(tmp_path), "2.60.0")


def test_packages_in_addition_to_a_lock_are_an_error(tmp_path: Path, complaint: Callable[..., str]) -> None:
    (tmp_path / "uv.lock").write_text(LOCKED)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    options = ("--address", "http://127.0.0.1:9", "--working-dir", tmp_path, "--pip", "timm", "status", "run")
    assert "uv add" in complaint("submit", *options)
    assert "answer" in complaint("submit", "--no-uv", *options)


def test_cluster_without_uv_is_an_error() -> None:
    shell = subprocess.run("uv-that-no-machine-has run", shell=True, capture_output=True, check=False)
    job = JobDetails(type=JobType.SUBMISSION, status=JobStatus.FAILED, entrypoint="", driver_exit_code=shell.returncode)
    with pytest.raises(UserError) as error:
        exit_status_of(job, "patternnet-fit-1", uv=True)
    assert (error.value.where, "--no-uv" in error.value.remedy) == ("patternnet-fit-1", True)
    assert exit_status_of(job, "patternnet-fit-1") == 127


MODULE = """
import importlib.metadata, sys
import torch
from torch import nn


def small():
    assert importlib.metadata.version("models-of-a-project") == "0.7"
    assert ".venv" in sys.prefix, sys.prefix  # of the project
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 2))
"""


def write_project(folder: Path, name: str, version: str, module: str, more: str = "") -> None:
    """Write a project with one module, which uv builds without other packages."""
    (folder / "src" / module).mkdir(parents=True)
    (folder / "src" / module / "__init__.py").touch()
    lines = [
        "[build-system]", 'requires = ["uv_build"]', 'build-backend = "uv_build"',
        "[tool.uv.build-backend]", f'module-name = "{module}"',
        "[project]", f'name = "{name}"', f'version = "{version}"', 'requires-python = ">=3.11"', more,
    ]  # fmt: skip
    (folder / "pyproject.toml").write_text("\n".join(lines))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("package", [None, "inflection"], ids=["offline", "PyPI"])
def test_job_and_workers_run_in_the_environment_of_the_lock(package: str | None, tmp_path: Path) -> None:
    """Ray and this project are stand-ins in the lock, because they are large; the real ones come by PYTHONPATH.

    The model also imports a small package of PyPI that only the project's environment has, if uv reaches PyPI.
    """
    project = tmp_path / "project"
    write_project(project / "ray", "ray", ray.__version__, "ray_stand_in")
    write_project(project / "patternnet", "patternnet-ray", "0.2.0", "patternnet_stand_in")
    sources = '[tool.uv.sources]\nray = { path = "ray" }\npatternnet-ray = { path = "patternnet" }'
    needed = json.dumps(["ray", "patternnet-ray", *([package] if package else [])])
    write_project(project, "models-of-a-project", "0.7", "models_of_a_project", f"dependencies = {needed}\n{sources}")
    module = f"import {package}\n{MODULE}" if package else MODULE
    (project / "src" / "models_of_a_project" / "__init__.py").write_text(module)
    uv = {
        "UV_OFFLINE": "0" if package else "1", "UV_PYTHON": sys.executable, "UV_PYTHON_DOWNLOADS": "never",
        "UV_NO_CONFIG": "1", "UV_CACHE_DIR": str(tmp_path / "cache"), "PATH": PATH,
        "PYTHONPATH": f"{ROOT}:{Path(ray.__file__).parents[1]}",
    }  # fmt: skip
    locked = subprocess.run(
        ["uv", "lock"], cwd=project, env=os.environ | uv, capture_output=True, text=True, check=False
    )
    if package and locked.returncode:
        pytest.skip(f"uv does not reach PyPI: {locked.stderr}")
    assert locked.returncode == 0, locked.stderr
    assert package is None or importlib.util.find_spec(package) is None, "the package is not only in the project"
    shards = make_shards(tmp_path / "shards", 2, 4)
    with LocalCluster(nodes=1, cpus=2, dashboard=True) as cluster:
        command = [sys.executable, "-m", "ray_jobs", "submit", "--address", cluster.dashboard]
        command += ["--working-dir", str(project), *[word for name in uv for word in ("--env", name)]]
        command += ["fit", "--model", "models_of_a_project:small", *OPTIONS, "--out", str(tmp_path / "run")]
        command += [word for shard in shards for word in ("--shards", shard)]
        env = {**os.environ, **uv, **cluster.environment}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sending" in done.stdout
    assert (tmp_path / "run" / "patterns.safetensors").exists()
