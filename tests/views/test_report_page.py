"""The page of `patternnet report` in a real browser: no network, and no code from the data is executed."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from selenium.common.exceptions import NoAlertPresentException
from selenium.webdriver import Chrome, ChromeOptions, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select

from ray_jobs.cli.app import exit_status
from ray_jobs.config import ExplainConfig, FitConfig, ModelConfig
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.jobs.quality import compute_medians
from ray_jobs.runs.run_folder import Run
from ray_jobs.views.report import write_report
from tests.conftest import jpeg, write_tar
from tests.ray_jobs.runs import PREPROCESSING
from tests.views.reported import HERE, HOSTILE, MEGABYTES, METHODS, SECONDS, SIX

pytestmark = pytest.mark.slow  # needs Chromium


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("classes") / "classes.json"
    path.write_text(json.dumps(HOSTILE))
    return str(path)


@pytest.fixture(scope="module")
def page(run: Run, classes: str) -> Path:
    path = Path(str(run.folder)) / "report.html"
    assert exit_status(["report", str(run.folder), "--classes", classes]) == 0
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("Chromium or its driver is not installed: apt-get install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("profile")
    for flag in ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking",
                 "disable-dev-shm-usage", f"user-data-dir={profile}", "window-size=1280,1000"):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = Chrome(options, Service(driver))
    yield chrome
    chrome.quit()


@pytest.fixture
def opened(browser: Chrome, page: Path) -> Chrome:
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(page.as_uri())
    return browser


def find(browser: Chrome, selector: str) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, selector)


def shown(browser: Chrome) -> list[str]:
    """Return the keys of the visible samples in order."""
    cards = browser.find_elements(By.CSS_SELECTOR, ".card")
    return [str(card.get_attribute("data-key")) for card in cards if card.is_displayed()]


def choose(browser: Chrome, name: str, value: str) -> None:
    Select(find(browser, f"[name={name}]")).select_by_value(value)


def explained(run: Run) -> list[dict[str, Any]]:
    return pq.read_table(run.folder / "explanations.parquet").to_pylist()


def requests(browser: Chrome) -> list[str]:
    """Return the addresses that were requested since the log was last read."""
    said = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in said if m["method"] == "Network.requestWillBeSent"]


def test_page_loads_without_errors_or_requests(opened: Chrome, page: Path) -> None:
    assert opened.get_log("browser") == []
    asked = [url for url in requests(opened) if not url.startswith("data:image/")]
    assert asked == [page.as_uri()]
    broken = "return [...document.images].filter(i => i.complete && !i.naturalWidth).length"
    assert opened.execute_script(broken) == 0
    assert "http:" not in (text := page.read_text()).replace("http://www.w3.org", "")
    assert "https:" not in text


def test_text_from_the_data_is_not_executed(opened: Chrome, run: Run) -> None:
    with pytest.raises(NoAlertPresentException):
        _ = opened.switch_to.alert
    assert len(opened.find_elements(By.CSS_SELECTOR, "script")) == 1
    assert opened.find_elements(By.CSS_SELECTOR, "[onerror], [onload], [onmouseover], [style], img[src=x]") == []
    rows = explained(run)
    assert sorted(shown(opened)) == sorted(row["key"] for row in rows)
    said = {str(e.get_attribute("textContent")) for e in opened.find_elements(By.CSS_SELECTOR, ".caption b")}
    assert said == {HOSTILE[row["prediction"]] for row in rows}
    for card in opened.find_elements(By.CSS_SELECTOR, ".card"):
        opened.execute_script("arguments[0].click()", card.find_element(By.CSS_SELECTOR, ".enlarge"))
        assert find(opened, "#zoom-title").text == card.get_attribute("data-key")
        find(opened, "#zoom-close").click()
    with pytest.raises(NoAlertPresentException):
        _ = opened.switch_to.alert
    assert opened.get_log("browser") == []


def test_content_security_policy_blocks_injected_scripts(browser: Chrome, page: Path, tmp_path: Path) -> None:
    put = "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'><p id=p style='color: red'>red</p></main>"
    changed = tmp_path / "changed.html"
    changed.write_text(page.read_text().replace("</main>", put))
    browser.get_log("browser")
    browser.get(changed.as_uri())
    assert browser.execute_script("return window.ran") is None
    assert find(browser, "#p").value_of_css_property("color") != "rgba(255, 0, 0, 1)"
    complaints = [entry["message"] for entry in browser.get_log("browser")]
    assert sum("Content Security Policy" in text for text in complaints) >= 3


def test_samples_are_sorted_as_selected(opened: Chrome, run: Run) -> None:
    def surest(row: dict[str, Any]) -> Any:
        return -row["probability"], row["key"]

    def wrong(row: dict[str, Any]) -> bool:
        return row["label"] is not None and row["label"] != row["prediction"]

    orders: dict[str, Callable[[dict[str, Any]], Any]] = {
        "key": lambda row: row["key"],
        "wrong": lambda row: (not wrong(row), surest(row)),
        "surest": surest,
    }
    rows = explained(run)
    assert any(map(wrong, rows))
    assert not all(map(wrong, rows))
    assert shown(opened) == [row["key"] for row in sorted(rows, key=surest)]
    for name, order in orders.items():
        choose(opened, "sort", name)
        assert shown(opened) == [row["key"] for row in sorted(rows, key=order)], name
    choose(opened, "sort", "unsurest")
    assert shown(opened) == [row["key"] for row in sorted(rows, key=surest, reverse=True)]


def test_samples_are_filtered_by_class_and_correctness(opened: Chrome, run: Run) -> None:
    rows = explained(run)

    def keys(text: str, right: bool | None) -> set[str]:
        """Filter the rows of the table independently of the page."""
        named = {r["key"]: [HOSTILE[n] for n in (r["label"], r["prediction"]) if n is not None] for r in rows}
        judged = {r["key"]: None if r["label"] is None else r["label"] == r["prediction"] for r in rows}
        return {
            key
            for key, names in named.items()
            if any(text.lower() in name.lower() for name in names) and (right is None or judged[key] is right)
        }

    field, status = find(opened, "[name=text]"), find(opened, "[role=status]")
    for text in ("SCRIPT", "svg", "no such class", ""):
        for value, right in (("", None), ("yes", True), ("no", False)):
            field.clear()
            field.send_keys(text)
            choose(opened, "right", value)
            assert set(shown(opened)) == keys(text, right), (text, right)
            assert status.text == f"{len(keys(text, right))} of {len(rows)} samples shown"
    assert status.get_attribute("aria-live") == "polite"


def test_methods_can_be_hidden(opened: Chrome) -> None:
    boxes = opened.find_elements(By.CSS_SELECTOR, "[name=method]")
    assert [box.accessible_name for box in boxes] == ["photograph", *METHODS]

    def seen() -> list[bool]:
        return [tile.is_displayed() for tile in opened.find_elements(By.CSS_SELECTOR, ".card:first-child figure")]

    assert seen() == [True] * 4
    boxes[2].send_keys(Keys.SPACE)
    assert seen() == [True, True, False, True]
    assert not any(t.is_displayed() for t in opened.find_elements(By.CSS_SELECTOR, '.card [data-method="2"]'))
    boxes[2].click()
    assert seen() == [True] * 4


def test_sample_is_enlarged_and_closed_by_keyboard(opened: Chrome) -> None:
    keys = shown(opened)
    button = find(opened, ".card .enlarge")
    assert button.accessible_name == f"Enlarge {keys[0]}"
    opened.execute_script("arguments[0].focus()", button)
    said = find(opened, ".card .said")
    opened.execute_async_script("setTimeout(arguments[0], 500)")
    assert said.value_of_css_property("opacity") == "1"
    button.send_keys(Keys.ENTER)
    dialog = find(opened, "dialog")
    assert dialog.is_displayed()
    assert find(opened, "#zoom-title").text == keys[0]
    small, large = find(opened, ".card img"), find(opened, "dialog img")
    assert len(opened.find_elements(By.CSS_SELECTOR, "dialog img")) == 1 + len(METHODS)
    assert large.size["height"] > 2 * small.size["height"]
    opened.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert find(opened, "#zoom-title").text == keys[1]
    opened.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not dialog.is_displayed()
    assert opened.switch_to.active_element.accessible_name == f"Enlarge {keys[1]}"


def test_dark_mode_follows_the_system_or_the_reader(opened: Chrome) -> None:
    def brightness() -> float:
        colour = find(opened, "body").value_of_css_property("background-color")
        return float(np.mean([float(v) for v in colour.partition("(")[2].rstrip(")").split(",")[:3]]))

    def prefer(scheme: str) -> None:
        feature = {"name": "prefers-color-scheme", "value": scheme}
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    prefer("light")
    assert brightness() > 200
    prefer("dark")
    assert brightness() < 50
    button = find(opened, "#theme")
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    assert brightness() > 200
    assert button.get_attribute("aria-pressed") == "false"


def test_page_has_headings_landmarks_and_names_for_screen_readers(opened: Chrome) -> None:
    for tag in ("main", "header", "nav", "footer", "h1"):
        assert len(opened.find_elements(By.CSS_SELECTOR, tag)) == 1, tag
    levels = [int(h.tag_name[1]) for h in opened.find_elements(By.CSS_SELECTOR, "main :is(h2, h3, h4)")]
    assert set(levels) == {2}
    for element in opened.find_elements(
        By.CSS_SELECTOR, "button, input, select, svg[role=img], [role=region], section"
    ):
        if element.is_displayed():
            assert element.accessible_name, element.get_attribute("outerHTML")
    assert all(image.get_attribute("alt") for image in opened.find_elements(By.CSS_SELECTOR, "main img"))
    find(opened, "body").send_keys(Keys.TAB)
    assert opened.switch_to.active_element.text == "Skip to the content"


def test_two_hundred_samples_of_six_methods_load_quickly(browser: Chrome, model_spec: str, tmp_path: Path) -> None:
    size = 160
    shards = [
        str(write_tar(tmp_path / f"{i}.tar", [{"__key__": f"{i}-{k}", "jpg": jpeg(rng, size)} for k in range(51)]))
        for i in range(4)
        for rng in [np.random.default_rng(i)]
    ]
    model = ModelConfig(spec=model_spec, **PREPROCESSING | {"image_size": size, "resize": size})  # type: ignore[arg-type]
    out = str(tmp_path / "run")
    fit(FitConfig(model=model, shards=tuple(shards), out=out, max_samples=20), HERE)
    explain(
        ExplainConfig(model=model, patterns=out, shards=tuple(shards), out=out, methods=SIX, outputs=("png",)), HERE
    )
    page = tmp_path / "report.html"
    (contents,) = write_report(page, [out])
    assert contents.samples is not None
    assert len(contents.samples.cards) == 200
    assert contents.samples.total == 204
    assert 112 <= contents.samples.cards[0].tiles[0].height <= 160
    assert page.stat().st_size < MEGABYTES * 10**6
    took = []
    for _ in range(3):
        browser.get(page.as_uri())
        took.append(browser.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd") / 1000)
    assert len(browser.find_elements(By.CSS_SELECTOR, ".card")) == 200
    assert min(took) < SECONDS, took


def test_runs_are_compared_in_one_table(browser: Chrome, run: Run, bare: Run, tmp_path: Path) -> None:
    page = tmp_path / "both.html"
    assert exit_status(["report", str(run.folder), str(bare.folder), "--samples", "5", "--out", str(page)]) == 0
    browser.get(page.as_uri())
    lines = [row.text.split("\n") for row in browser.find_elements(By.CSS_SELECTOR, ".compared tr")]
    texts = [" ".join(line) for line in lines]
    names = ["/".join(Path(str(one.folder)).parts[-2:]) for one in (run, bare)]
    assert texts[0] == " ".join(names)
    assert "fit: samples 72 18" in texts
    rho = compute_medians(run)
    assert {f"{name} {value:.3f} –" for name, value in rho.items()} <= set(texts)
    areas = run.manifest()["degrade"]["areas"]
    assert {f"{name} {found['area']:.4f} –" for name, found in areas.items()} <= set(texts)
    assert len(browser.find_elements(By.CSS_SELECTOR, ".card")) == 5
    assert [h.text for h in browser.find_elements(By.CSS_SELECTOR, "main h2")] == ["Side by side", *names]
    ids = browser.execute_script("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
