"""The pages of an atlas: what they say, and in a real browser that nothing is loaded and no data are executed."""

import json
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from selenium.common.exceptions import NoAlertPresentException
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By

from patterns import UserError
from ray_jobs.cli.app import exit_status
from ray_jobs.config import AtlasConfig, FitConfig, ModelConfig
from ray_jobs.jobs.atlas.atlas import atlas
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.views.atlas import write_atlas
from tests.conftest import jpeg, write_tar
from tests.ray_jobs.runs import PREPROCESSING
from tests.views.reported import HERE, HOSTILE
from tests.views.test_report_page import browser  # noqa: F401 - a fixture

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def run(model_spec: str, shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an atlas of samples with malicious keys."""
    folder, rng = tmp_path_factory.mktemp("atlas"), np.random.default_rng(5)
    samples = [
        {"__key__": f"{k:02d} {HOSTILE[k % 4].replace('/', '')}", "jpg": jpeg(rng), "cls": b"%d" % (k % 5)}
        for k in range(40)
    ]
    shard = str(write_tar(folder / "hostile.tar", samples))
    model = ModelConfig(spec=model_spec, **PREPROCESSING)  # type: ignore[arg-type]
    fit(FitConfig(model=model, shards=tuple(shards), out=str(folder / "fit")), HERE)
    config = AtlasConfig(
        model=model, patterns=str(folder / "fit"), shards=(shard,), out=str(folder / "run"), pooled=7, target="label"
    )
    return Path(str(atlas(config, HERE).folder))


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("classes") / "classes.json"
    path.write_text(json.dumps(HOSTILE))
    return str(path)


def test_page_has_a_section_for_each_class_with_alternative_texts(run: Path, classes: str) -> None:
    assert write_atlas(run / "atlas.html", str(run), classes) == 1
    page = (run / "atlas.html").read_text()
    numbers = pq.read_table(run / "classes.parquet")["class"].to_pylist()
    assert all(f'<section id="class-{number}"' in page for number in numbers)
    assert page.count("<img") == page.count(' alt="')
    assert 'alt=""' not in page
    for hostile in HOSTILE[:3]:
        assert hostile not in page


def test_many_classes_have_a_page_each(run: Path, classes: str, tmp_path: Path) -> None:
    numbers = pq.read_table(run / "classes.parquet")["class"].to_pylist()
    assert write_atlas(tmp_path / "atlas.html", str(run), classes, max_sections=1) == 1 + len(numbers)
    index = (tmp_path / "atlas.html").read_text()
    for number in numbers:
        assert f'href="atlas-classes/{number}.html"' in index
        assert 'href="../atlas.html"' in (tmp_path / f"atlas-classes/{number}.html").read_text()


def test_folder_without_an_atlas_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        write_atlas(tmp_path / "atlas.html", str(tmp_path))
    assert caught.value.where == str(tmp_path)
    assert "no finished atlas" in caught.value.what


@pytest.mark.slow
def test_page_works_in_a_browser_without_network_and_with_the_keyboard(
    run: Path,
    classes: str,
    browser: Chrome,  # noqa: F811
) -> None:
    write_atlas(run / "atlas.html", str(run), classes)
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get((run / "atlas.html").as_uri())
    with pytest.raises(NoAlertPresentException):
        browser.switch_to.alert.accept()
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in requests if m["method"] == "Network.requestWillBeSent"]
    assert all(url.startswith(("file:", "data:")) for url in urls)
    search = browser.find_element(By.ID, "class-search")
    rows = browser.find_elements(By.CSS_SELECTOR, "#classes-table tbody tr")
    search.send_keys("no class has this name")
    assert not any(row.is_displayed() for row in rows)
    assert browser.find_element(By.ID, "class-count").text.startswith("0 of")
    search.clear()
    search.send_keys(" ", Keys.BACKSPACE)
    assert all(row.is_displayed() for row in rows)
    body = browser.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.HOME)
    browser.execute_script("document.activeElement.blur()")
    body.send_keys(Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("class") == "skip"


@pytest.mark.slow
def test_index_of_a_thousand_classes_opens_within_two_seconds(
    run: Path,
    tmp_path: Path,
    browser: Chrome,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray_jobs.views.atlas.contents import Atlas

    original = Atlas.views

    def repeated(self: Atlas, pictures: object):  # type: ignore[no-untyped-def]
        found = list(original(self, pictures))  # type: ignore[arg-type]
        yield from (found[k % len(found)] for k in range(1000))

    monkeypatch.setattr(Atlas, "views", repeated)
    write_atlas(tmp_path / "atlas.html", str(run), max_sections=1)
    begun = time.monotonic()
    browser.get((tmp_path / "atlas.html").as_uri())
    assert len(browser.find_elements(By.CSS_SELECTOR, "#classes-table tbody tr")) == 1000
    assert time.monotonic() - begun < 2


@pytest.mark.slow
def test_command_writes_the_page(run: Path, tmp_path: Path) -> None:
    section = json.loads((run / "manifest.json").read_text())["atlas"]["options"]
    command = ["atlas", "--patterns", section["patterns"], "--shards", *section["shards"], "--out", str(run)]
    assert (
        exit_status(
            [*command, "--pooled", "7", "--target", "label", "--page", str(tmp_path / "it.html"), "--workers", "0"]
        )
        == 0
    )
    assert (tmp_path / "it.html").exists()
