"""The figures of docs/operations.md are computed again from the code and the benchmarks."""

import re
from functools import partial

import pytest
import torch
import yaml
from torch import nn
from torchvision.models import resnet50

from benchmarks.machine import measure_cost
from benchmarks.timing import vgg16_features
from cluster.local import ROOT
from ray_jobs.config import Resources
from ray_jobs.config.option import options_of
from ray_jobs.runs.map_files import estimate_bytes_per_sample
from tests.operations.terminal import Terminal, blocks, rows, section


def test_every_alert_links_to_a_section_and_names_its_title() -> None:
    groups = yaml.safe_load((ROOT / "cluster" / "monitoring" / "rules.yml").read_text())["groups"]
    alerts = [rule["annotations"] for group in groups for rule in group["rules"] if "alert" in rule]
    assert len(alerts) == 6
    for alert in alerts:
        page, _, anchor = alert["runbook"].partition("#")
        (title,) = re.findall(r'"([^"]+)"\.$', alert["description"].strip())
        assert page == "docs/operations.md"
        assert anchor == title.lower().replace(" ", "-")
        assert blocks(title), title


def test_the_worked_example_adds_up() -> None:
    values = {name: float(value) for name, value in rows("A worked example")}
    machine_hours = 1e6 / (3600 * values["rate"]) * (1 + values["redone"])
    spot = values["spot, share of hours"]
    price = spot * values["spot price, an hour"] + (1 - spot) * values["full price, an hour"]
    compute = machine_hours * price + machine_hours / values["machines"] * values["head price, an hour"]
    storage = values["GB written"] * values["months"] * values["price of a GB a month"]
    egress = 1e6 * values["bytes an image"] / 1e9 * values["price of a GB of egress"]
    assert values["hours"] == pytest.approx(machine_hours, abs=5e-4)
    for name, value in {"price": price, "compute": compute, "storage": storage, "egress": egress}.items():
        assert values[name] == pytest.approx(value, abs=5e-3), name
    assert values["cost"] == pytest.approx(compute + storage + egress, abs=5e-3)


def benchmark(page: str, row: str) -> tuple[float, float]:
    """Return a row's ratio and its fraction of the roofline."""
    text = (ROOT / "docs" / page).read_text()
    found = re.search(rf"^\| {re.escape(row)} \|[^|]*\| ([\d.]+)[^|]*\|[^|]*\| (\d+)% \|", text, re.MULTILINE)
    assert found is not None, row
    return float(found[1]), float(found[2]) / 100


def rate(model: str, flops: float, page: str, what: str) -> float:
    """Return the images per second that follow from a page's ratios, for a model with this number of products."""
    gflops = float(re.findall(r"\(([\d.]+) GFLOP/s\)", (ROOT / "docs" / page).read_text())[0])
    _, share = benchmark(page, f"{model}: forward")
    ratio, _ = benchmark(page, f"{model}: {what}")
    return share * gflops * 1e9 / flops / ratio


@pytest.mark.full
def test_rates_follow_from_the_benchmarks() -> None:
    models: dict[str, nn.Module] = {"VGG-16": vgg16_features(), "ResNet-50": resnet50()}
    with torch.inference_mode():
        flops = {n: measure_cost(partial(m.eval(), torch.zeros(1, 3, 224, 224))).flops for n, m in models.items()}
    table = {cells[0]: cells[1:] for cells in rows("Cost")}
    assert len(table) == 3
    for what, values in table.items():
        for model, value in zip(models, values):
            assert float(value) == pytest.approx(rate(model, flops[model], "benchmarks-gpu.md", what), rel=2e-3)
    text = " ".join(section("Cost").split())
    for model in models:
        (value,) = re.findall(rf"([\d.]+)(?: images a second)? of {model}\b", text)
        expected = rate(model, flops[model], "benchmarks.md", "fit, all estimators")
        assert float(value) == pytest.approx(expected, abs=0.05)


def test_bytes_of_an_explanation_equal_the_jobs_estimate() -> None:
    whole = estimate_bytes_per_sample({"gradient": (3, 224, 224)}, ("npy", "png", "parquet", "zarr"))
    small = estimate_bytes_per_sample({"gradient": (1, 56, 56)}, ("parquet",))
    text = " ".join(section("Disk").split())
    for kind, size in {**whole, "`--reduce-channels sum --map-size 56`": small["parquet"]}.items():
        assert re.search(rf"{re.escape(kind)}`? (at most )?{size:,}", text), kind


@pytest.mark.slow
def test_memory_of_the_models_equals_the_output_of_plan(terminal: Terminal) -> None:
    models = [cells for cells in rows("Memory") if "torchvision:" in cells[0]]
    assert len(models) == 3
    for spec, every, default, rest in models:
        for estimators, size in (("", every), ("--estimators default", default)):
            plan = f"patternnet plan --model {spec.strip('`')} --weights random --batch-size 64 {estimators}"
            status, output = terminal.here(plan)
            assert status == 0
            assert f"moments of {size} in" in output
            assert f"about {rest}" in output


def test_options_that_may_change_on_resumption_are_the_resources() -> None:
    (listed,) = re.findall(r"These may\s+differ: (.*?); where", section("The run's life"), re.DOTALL)
    assert set(re.findall(r"`--([\w-]+)`", listed)) == {name.replace("_", "-") for name in options_of(Resources)}
