"""What is released: a wheel and a source archive that are whole, checked, and work where nothing else is installed."""

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

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def run(*command: str | Path, where: Path) -> str:
    done = subprocess.run(list(command), cwd=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of this repository that git knows or would add, so that no build output lies among them."""
    copy = tmp_path_factory.mktemp("release") / "checkout"
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", where=ROOT)
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def built(checkout: Path) -> Path:
    """The folder of the source archive, and of the wheel that is built from it."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", checkout.parent / "dist", where=checkout)
    return checkout.parent / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The programs of a new environment that has the wheel, and sees this environment's other packages."""
    environment = wheel.parent.parent / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, where=wheel.parent)
    python = environment / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", wheel]
    run(sys.executable, "-m", "pip", "--python", python, *install, where=wheel.parent)
    # The .pth files of a folder that is named by one are not read: this checkout's own packages are not seen.
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment / "bin"


def test_the_indexs_own_checks_pass(built: Path) -> None:
    assert "PASSED" in run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir(), where=built)


def contents(wheel: Path) -> dict[str, int]:
    """A wheel's files and their checksums."""
    return {entry.filename: entry.CRC for entry in zipfile.ZipFile(wheel).infolist()}


def test_the_source_archive_holds_everything_and_makes_the_checkouts_wheel(
    built: Path, wheel: Path, checkout: Path, tmp_path: Path
) -> None:
    names = tarfile.open(next(built.glob("*.tar.gz"))).getnames()  # noqa: SIM115
    held = {name.partition("/")[2] for name in names}
    beside = {".ci/run", ".gitignore"}
    there = {str(path.relative_to(checkout)) for path in checkout.rglob("*") if path.is_file()}
    built_there = {name for name in there if ".egg-info/" in name or name.startswith("build/")}
    assert there - built_there - beside <= held
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, where=checkout)
    assert contents(tmp_path / wheel.name) == contents(wheel)


def test_the_wheel_holds_data_and_definitions_and_no_tests(wheel: Path, checkout: Path) -> None:
    held = set(contents(wheel))
    packages = ("patterns", "ray_jobs", "cluster")
    there = {str(p.relative_to(checkout)) for name in packages for p in (checkout / name).rglob("*") if p.is_file()}
    assert there <= held
    assert {"patterns/py.typed", "ray_jobs/views/report/report.html.jinja", "cluster/image/Dockerfile"} <= held
    assert {name.partition("/")[0] for name in held} == {*packages, f"patternnet_ray-{VERSION}.dist-info"}
    assert f"patternnet_ray-{VERSION}.dist-info/licenses/LICENSE" in held


def test_the_wheel_works_in_another_environment(installed: Path, tmp_path: Path) -> None:
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
def test_the_wheel_installs_with_its_dependencies_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
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


def test_the_changelog_tells_of_this_version() -> None:
    assert re.search(rf"^## \[{re.escape(VERSION)}\] - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_the_licences_page_is_that_of_the_lock() -> None:
    script: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "licences.py"))
    rows = re.findall(r"^\| (\*\*)?([\w.-]+?)(?:\*\*)? \| (\d\S*) \| (.+) \|$", script["PAGE"].read_text(), re.M)
    assert {name: version for _, name, version, _ in rows} == script["locked"](), "run make lock"
    assert {name for bold, name, _, _ in rows if bold} == {name.lower() for name in script["direct"]()}
    assert [name for _, name, _, licence in rows if licence == script["NONE"]] == ["cuda-toolkit"]
    assert script["licence"]("zennit").startswith("GNU Lesser General Public License v3 or later")
