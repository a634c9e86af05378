"""The pages of docs/: their commands run, their links lead somewhere, the API is that of the docstrings."""

import importlib.util
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ray_jobs.cli.app import exit_status

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])


def test_the_tutorial_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def anchors(page: Path) -> set[str]:
    return {
        re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-")
        for h in re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not link.startswith(("http:", "https:")):
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_every_page_is_reached_from_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    assert {page.name for page in PAGES if page.parent.name == "docs"} - {"index.md"} <= set(
        re.findall(r"\((\w[\w-]*\.md)\)", index)
    )


def test_the_api_page_is_that_of_the_docstrings() -> None:
    description = importlib.util.spec_from_file_location("api", ROOT / "docs" / "api.py")
    assert description is not None
    assert description.loader is not None
    module = importlib.util.module_from_spec(description)
    description.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "run python docs/api.py"
