"""The release: a complete wheel and source archive that work in an empty environment."""

import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def run(*command: str | Path, where: Path) -> str:
    done = subprocess.run(list(command), cwd=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git tracks or would add, without build output."""
    copy = tmp_path_factory.mktemp("release") / "checkout"
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", where=ROOT)
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def built(checkout: Path) -> Path:
    """The folder with the source archive and the wheel that is built from it."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", checkout.parent / "dist", where=checkout)
    return checkout.parent / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The programs of a new environment with the wheel and this environment's other packages."""
    environment = wheel.parent.parent / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, where=wheel.parent)
    python = environment / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", wheel]
    run(sys.executable, "-m", "pip", "--python", python, *install, where=wheel.parent)
    # The .pth files of a folder that is named by another .pth file are not read, so the checkout is not importable.
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment / "bin"


def test_checks_of_the_package_index_pass(built: Path) -> None:
    assert "PASSED" in run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir(), where=built)


def contents(wheel: Path) -> dict[str, int]:
    """Return the checksums of a wheel's files."""
    return {entry.filename: entry.CRC for entry in zipfile.ZipFile(wheel).infolist()}


def test_source_archive_is_complete_and_builds_the_same_wheel(
    built: Path, wheel: Path, checkout: Path, tmp_path: Path
) -> None:
    names = tarfile.open(next(built.glob("*.tar.gz"))).getnames()  # noqa: SIM115
    held = {name.partition("/")[2] for name in names}
    not_packaged = {".ci/run", ".gitignore"}
    there = {str(path.relative_to(checkout)) for path in checkout.rglob("*") if path.is_file()}
    built_there = {name for name in there if ".egg-info/" in name or name.startswith("build/")}
    assert there - built_there - not_packaged <= held
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, where=checkout)
    assert contents(tmp_path / wheel.name) == contents(wheel)


def test_wheel_contains_data_and_definitions_and_no_tests(wheel: Path, checkout: Path) -> None:
    held = set(contents(wheel))
    packages = ("patterns", "ray_jobs", "cluster")
    there = {str(p.relative_to(checkout)) for name in packages for p in (checkout / name).rglob("*") if p.is_file()}
    assert there <= held
    assert {"patterns/py.typed", "ray_jobs/views/report/report.html.jinja", "cluster/image/Dockerfile"} <= held
    assert {name.partition("/")[0] for name in held} == {*packages, f"patternnet_ray-{VERSION}.dist-info"}
    assert f"patternnet_ray-{VERSION}.dist-info/licenses/LICENSE" in held


def test_wheel_works_in_another_environment(installed: Path, tmp_path: Path) -> None:
    assert run(installed / "patternnet", "--version", where=tmp_path).startswith(f"patternnet {VERSION}\n")
    looks = """
import runpy, sys
from importlib.resources import files
import patterns
print(patterns.__file__, "ray" in sys.modules, "webdataset" in sys.modules)
for name in ("ray_jobs/views/report/report.css", "patterns/py.typed", "cluster/image/requirements-cuda.txt"):
    package, _, rest = name.partition("/")
    print((files(package) / rest).is_file())
sys.argv = ["ray_jobs", "fit", "--help"]
runpy.run_module("ray_jobs", run_name="__main__")
"""
    of_patterns, *found = run(installed / "python", "-c", looks, where=tmp_path).splitlines()
    assert re.fullmatch(rf"{re.escape(str(installed.parent))}.* False False", of_patterns)
    assert found[:3] == ["True"] * 3
    assert "Examples" in "\n".join(found)


@pytest.mark.slow
def test_wheel_installs_with_its_dependencies_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "empty", where=tmp_path)
    programs = tmp_path / "empty" / "bin"
    run(programs / "pip", "install", "--quiet", f"{wheel}[s3,timm,zarr,serve]", where=tmp_path)
    run(programs / "pip", "check", where=tmp_path)
    assert run(programs / "patternnet", "--version", where=tmp_path).startswith(f"patternnet {VERSION}\n")
    planned = run(
        programs / "patternnet", "plan", "--model", "timm:resnet18", "--weights", "random", where=tmp_path
    )  # fmt: skip
    assert "operators; moments of" in planned
    shutil.rmtree(tmp_path / "empty")


def test_changelog_has_an_entry_for_this_version() -> None:
    assert re.search(rf"^## \[{re.escape(VERSION)}\] - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_licenses_page_matches_the_lock() -> None:
    script: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "licences.py"))
    rows = re.findall(r"^\| (\*\*)?([\w.-]+?)(?:\*\*)? \| (\d\S*) \| (.+) \|$", script["PAGE"].read_text(), re.M)
    assert {name: version for _, name, version, _ in rows} == script["read_lock"](), "run make lock"
    assert {name for bold, name, _, _ in rows if bold} == {name.lower() for name in script["read_dependencies"]()}
    assert [name for _, name, _, licence in rows if licence == script["NONE"]] == ["cuda-toolkit"]
    assert script["read_license"]("zennit").startswith("GNU Lesser General Public License v3 or later")
