"""The pages of docs/ show the tables of docs/results/."""

import json
from pathlib import Path

import pytest

from benchmarks.pages import DOCS, Table, include, included, load_table, save_results

RESULTS = sorted(path.stem for path in (DOCS / "results").glob("*.json"))
PAGES = {page.name: included(page.read_text()) for page in sorted(DOCS.glob("*.md"))}


def test_every_table_of_a_page_is_rendered_from_its_result() -> None:
    names = [marker for blocks in PAGES.values() for marker in blocks if marker.startswith("results:")]
    assert len(names) == len(set(names)) > 0
    for page, blocks in PAGES.items():
        for marker, block in blocks.items():
            source, _, name = marker.partition(":")
            if source == "results":
                table = load_table(DOCS, name)
                assert table is not None, name
                assert block == table.render(), (page, name)


@pytest.mark.parametrize("name", RESULTS)
def test_every_result_with_a_table_is_in_a_page(name: str) -> None:
    if load_table(DOCS, name) is not None:
        assert [page for page, blocks in PAGES.items() if f"results:{name}" in blocks]


def test_saved_result_replaces_the_table_of_its_page_and_nothing_else(tmp_path: Path) -> None:
    page = (
        "Before.\n\n<!-- results:a begin -->\n\nold\n\n<!-- results:a end -->\nBetween.\n\n<!-- results:b begin -->\n\n"
    )
    page += "kept\n\n<!-- results:b end -->\n"
    (tmp_path / "page.md").write_text(page)
    table = Table({"method": "", "error": "{:.2f} ± {:.2f}", "n": "{}"}, [["linear", [0.5, 0.125], 3], ["x", "", 4]])
    save_results(tmp_path, "a", table, seconds=1.5)
    rendered = "| method | error | n |\n| --- | --- | --- |\n| linear | 0.50 ± 0.12 | 3 |\n| x |  | 4 |"
    assert (tmp_path / "page.md").read_text() == page.replace("old", rendered)
    assert load_table(tmp_path, "a") == table
    assert json.loads((tmp_path / "results" / "a.json").read_text())["values"] == {"seconds": 1.5}


def test_result_without_a_table_changes_no_page(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("<!-- results:a begin -->\n\nold\n\n<!-- results:a end -->\n")
    save_results(tmp_path, "a", seconds=1.5)
    assert "old" in (tmp_path / "page.md").read_text()
    assert load_table(tmp_path, "a") is None


def test_included_block_is_found_by_its_marker(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("<!-- source:f begin -->\n\n\n\n<!-- source:f end -->\n")
    include(tmp_path, "source:f", "```python\npass\n```")
    assert included((tmp_path / "page.md").read_text()) == {"source:f": "```python\npass\n```"}
