"""The pages of docs/: commands run, links are valid, the site builds, and the API page equals the docstrings."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ray_jobs.cli.app import exit_status

ROOT = Path(__file__).parents[1]
ELSEWHERE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "cluster/image/README.md")
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / name for name in ELSEWHERE)])


@pytest.mark.ray  # `solve` starts Ray
def test_commands_of_the_tutorial_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    commands = "".join(re.findall(r"```console\n(.*?)```", text, re.DOTALL)).splitlines()
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(code)
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(40):
            image = Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8))
            image.save(tmp_path / "photos" / label / f"{number}.jpg")
    assert {line.split()[1] for line in commands} >= {"pack", "plan", "fit", "quality", "solve", "explain", "degrade"}
    for line in commands:
        assert exit_status(shlex.split(line)[1:]) == 0, line
    assert pq.read_metadata("run/explanations.parquet").num_rows == 80
    assert all(Path("run", name).exists() for name in ("quality.png", "grid.png", "report.html", "degradation.png"))


def list_anchors(page: Path) -> set[str]:
    return {
        re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-")
        for h in re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_are_valid(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not link.startswith(("http:", "https:")):
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), link
            assert not anchor or anchor in list_anchors(target), link


def test_index_links_to_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    assert {page.name for page in PAGES if page.parent.name == "docs"} - {"index.md"} <= set(
        re.findall(r"\((\w[\w-]*\.md)\)", index)
    )


@pytest.mark.full
def test_site_builds_in_strict_mode_with_every_page(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    names = {page.stem for page in PAGES if page.parent.name == "docs"} | {"changelog", "contributing", "image"}
    assert {f"{name}.html" for name in names} <= {path.name for path in tmp_path.iterdir()}
    loaded = re.findall(
        r'(?:src|href)="(?:https?:)?//[^"]+\.(?:js|css|woff2?)"', (tmp_path / "tutorial.html").read_text()
    )
    assert loaded == []


def test_api_page_equals_the_docstrings() -> None:
    description = importlib.util.spec_from_file_location("api", ROOT / "docs" / "api.py")
    assert description is not None
    assert description.loader is not None
    module = importlib.util.module_from_spec(description)
    description.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "run python docs/api.py"
