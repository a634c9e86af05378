"""The monitoring of jobs: Prometheus accepts the files, the metrics exist, and alerts fire for trouble only."""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import ray
import yaml
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from cluster.local import ROOT, LocalCluster
from ray_jobs.config import Resources
from ray_jobs.engine.metrics import COUNTERS, GAUGES
from ray_jobs.jobs.fit.fit import fit
from tests.conftest import make_shards, write_tar
from tests.ray_jobs.runs import make_fit_config

FOLDER, CASES = Path("cluster/monitoring"), Path("tests/cluster/monitoring/rules_test.yml")
DISCOVERY = "http://127.0.0.1:8265/api/prometheus/sd"
JOBS = {f"ray_patternnet_{name}_total" for name in COUNTERS} | {f"ray_patternnet_{name}" for name in GAUGES}
# Metrics of nodes with a GPU only, which this machine may not have.
GPUS = {f"ray_{name}" for name in METRICS_GAUGES if name.startswith(("node_gpu", "node_gram"))}
WORDS = {"and", "or", "unless", "by", "without", "on", "ignoring", "group_left", "group_right", "offset", "bool"}

needs_prometheus = pytest.mark.skipif(
    shutil.which("promtool") is None or shutil.which("prometheus") is None,
    reason="needs prometheus and promtool: apt-get install prometheus",
)


def rules(root: Path) -> list[dict[str, Any]]:
    """Return all recording and alerting rules."""
    groups = yaml.safe_load((root / FOLDER / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard(root: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((root / FOLDER / "dashboard.json").read_text())
    return loaded


def shown(root: Path) -> list[str]:
    """Return the dashboard's expressions with Grafana's variables replaced, for every run and job."""
    raw = [target["expr"] for panel in dashboard(root)["panels"] for target in panel.get("targets", [])]
    return [
        expr.replace("$run", ".*").replace("$job", ".*").replace("$__rate_interval", "1m")  # for 15 s between scrapes
        for expr in raw
    ]


def metrics_of(expression: str) -> set[str]:
    """Return the metrics in an expression."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]|\b(by|on|without|ignoring)\s*\([^)]*\)', " ", expression)
    return set(re.findall(r"\b[a-z_][\w:]*\b(?!\s*\()", bare, re.IGNORECASE)) - WORDS


def unknown_metrics(root: Path, exported: set[str]) -> set[str]:
    """Return metrics of the rules and the dashboard that neither a job, Ray nor a recording rule provides."""
    recorded = {rule["record"] for rule in rules(root) if "record" in rule}
    asked = [target["query"]["query"] for target in dashboard(root)["templating"]["list"] if target["type"] == "query"]
    variables = {name for query in asked for name in re.findall(r"label_values\((\w+)", query)}
    named = set().union(*(metrics_of(rule["expr"]) for rule in rules(root)), *map(metrics_of, shown(root)), variables)
    return named - recorded - JOBS - GPUS - exported


def unknown_fields(root: Path) -> list[str]:
    """Return fields of the dashboard that are lost when Grafana's own models read and write it."""
    pytest.importorskip("grafana_foundation_sdk", reason="needs grafana-foundation-sdk: Grafana's schema")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    def dropped(given: Any, kept: Any, at: str) -> Iterator[str]:
        if isinstance(given, dict) and isinstance(kept, dict):
            for key, value in given.items():
                yield from dropped(value, kept.get(key), f"{at}.{key}")
        elif isinstance(given, list) and isinstance(kept, list):
            for number, (one, other) in enumerate(zip(given, kept, strict=True)):
                yield from dropped(one, other, f"{at}[{number}]")
        elif given != kept:
            yield at

    register_default_plugins()
    given = dashboard(root)
    return list(dropped(given, json.loads(JSONEncoder().encode(Dashboard.from_json(given))), ""))


def promtool(*arguments: str | Path) -> str:
    """Return the errors of promtool; empty if there are none."""
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def rejected_by_prometheus(root: Path, scratch: Path) -> str:
    """Return what Prometheus rejects in the configuration, the rules and the dashboard's expressions."""
    made = [{"record": "shown", "expr": expr} for expr in shown(root)]
    (scratch / "shown.yml").write_text(yaml.safe_dump({"groups": [{"name": "shown", "rules": made}]}))
    return promtool("check", "config", root / FOLDER / "prometheus.yml") + promtool(
        "check", "rules", scratch / "shown.yml"
    )


def wrong_alerts(root: Path) -> str:
    """Return the known cases for which the alerts are wrong."""
    return promtool("test", "rules", root / CASES)


@pytest.fixture(scope="module")
def page(
    local_ray: None, model_spec: str, shards: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, float]:
    """Metrics that a real node exports after a fit that skipped one of its three shards."""
    folder = tmp_path_factory.mktemp("watched")
    bad = write_tar(folder / "bad.tar", [{"__key__": "cut", "jpg": b"\xff\xd8\xff\xe0 no more"}])
    (folder / "cut.tar").write_bytes(Path(shards[0]).read_bytes()[:3000])
    given = [f"{folder}/cut.tar", shards[0], str(bad)]  # samples before a failure are processed again
    fit(make_fit_config(model_spec, given, folder / "run"), Resources(workers=0, retries=0, max_bad_shards=1))
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    seen: dict[str, float] = {}
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with urlopen(address) as answer:
            lines = answer.read().decode().splitlines()
        seen |= {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if x.startswith("ray_"))}
        if len(of_run(seen)) == 8 and {"ray_node_cpu_utilization", "ray_object_store_used_memory"} <= names(seen):
            break
        time.sleep(1)
    return seen


def names(page: dict[str, float]) -> set[str]:
    return {series.partition("{")[0] for series in page}


def of_run(page: dict[str, float]) -> dict[str, float]:
    """Return a run's own metrics, except the waiting time, which may be absent."""
    own = {series: value for series, value in page.items() if "/watched0/run" in series and "waiting" not in series}
    return {series.partition("{")[0].removeprefix("ray_patternnet_"): value for series, value in own.items()}


@needs_prometheus
def test_prometheus_accepts_configuration_rules_and_expressions(tmp_path: Path) -> None:
    assert rejected_by_prometheus(ROOT, tmp_path) == ""


@needs_prometheus
def test_alerts_fire_for_jobs_in_trouble_only() -> None:
    assert wrong_alerts(ROOT) == ""
    alerts = {rule["alert"] for rule in rules(ROOT) if "alert" in rule}
    assert alerts == set(re.findall(r'alertname="(\w+)"', (ROOT / CASES).read_text()))


def test_every_alert_has_a_summary_a_severity_and_a_runbook() -> None:
    for rule in rules(ROOT):
        if "alert" in rule:
            assert set(rule["annotations"]) == {"summary", "description", "runbook"}
            assert rule["labels"]["severity"] in ("warning", "critical")
            section = re.findall(r'See docs/operations.md, "([^"]*)".$', rule["annotations"]["description"])
            assert rule["annotations"]["runbook"] == f"docs/operations.md#{section[0].lower().replace(' ', '-')}"


def test_every_queried_metric_is_exported(page: dict[str, float]) -> None:
    assert unknown_metrics(ROOT, names(page)) == set()


def test_finished_job_with_a_skipped_shard_has_no_shards_left(page: dict[str, float]) -> None:
    done = {"samples_total": 6, "refused_total": 1, "shards_total": 2, "failures_total": 1}
    assert of_run(page).items() >= (done | {"shards_left": 0, "workers": 1}).items()


def test_grafana_keeps_every_field_of_the_dashboard() -> None:
    assert unknown_fields(ROOT) == []


@needs_prometheus
@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("rules.yml", "ray_patternnet_lost_workers_total", "ray_patternnet_lost_worker_total"),
        ("rules.yml", "increase(run_job:patternnet_failures:sum", "increase(run_job:patternnet_failure:sum"),
        ("rules.yml", "max by (run, job) (last", "max by run, job (last"),
        ("rules.yml", "max > 0 unless increase(run_job:patternnet_samples:sum[5m]) > 0", "max > 0"),
        ("rules.yml", "shards_left:max > 0 unless incr", "shards_left:max >= 0 unless incr"),
        ("rules.yml", "(ray_patternnet_failures_total) or 0 * run_job:patternnet_shards_left:max",
         "(ray_patternnet_failures_total)"),
        ("rules.yml", "[1h]) > 0 unless run_job:patternnet_shards_left:max", "[1h]) > 0"),
        ("rules.yml", "share10m > 0.5", "share10m > 0.1"),
        ("prometheus.yml", "honor_labels", "honour_labels"),
        ("dashboard.json", "ray_node_gram_used", "ray_node_gpu_ram_used"),
        ("dashboard.json", "ray_node_mem_total", "ray_node_memory_total"),
        ("dashboard.json", "rate(ray_patternnet_samples_total", "rate(ray_patternnet_samples"),
        ("dashboard.json", "sum by (worker) (rate(", "sum by worker (rate("),
        ("dashboard.json", "legendFormat", "legend"),
        ("dashboard.json", "fillOpacity", "fill"),
    ],
)  # fmt: skip
def test_broken_copy_is_detected(page: dict[str, float], tmp_path: Path, file: str, old: str, new: str) -> None:
    shutil.copytree(ROOT / FOLDER, tmp_path / FOLDER)
    (tmp_path / CASES).parent.mkdir(parents=True)
    shutil.copy(ROOT / CASES, tmp_path / CASES)
    text = (tmp_path / FOLDER / file).read_text()
    assert old in text
    (tmp_path / FOLDER / file).write_text(text.replace(old, new))
    assert (
        unknown_metrics(tmp_path, names(page))
        or unknown_fields(tmp_path)
        or rejected_by_prometheus(tmp_path, tmp_path)
        or wrong_alerts(tmp_path)
    )


class Prometheus:
    """A real Prometheus on the loopback interface; the folder holds its configuration and data."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address={self.address}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=(folder / "log").open("w"),
        )

    def get(self, path: str, **query: object) -> Any:
        """Return the answer of the API."""
        with urlopen(f"http://{self.address}/api/v1/{path}?{urlencode(query)}") as answer:
            return json.load(answer)["data"]

    def ever(self, expression: str, since: float) -> list[Any]:
        """Return the series of an expression that have had a value since a time."""
        times = {"start": since, "end": time.time(), "step": 5}
        found: list[Any] = self.get("query_range", query=expression, **times)["result"]
        return found

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def wait_for_healthy_nodes(prometheus: Prometheus, nodes: int) -> None:
    """Wait until the metrics of this number of Ray nodes were scraped."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(URLError):
            if len(prometheus.get("query", query="ray_node_cpu_count")["result"]) == nodes:
                return
        time.sleep(1)
    raise TimeoutError(f"Prometheus does not see {nodes} nodes: {prometheus.get('targets')}")


@needs_prometheus
@pytest.mark.slow
def test_prometheus_discovers_nodes_and_records_a_job_without_an_alert_after_its_end(
    model_spec: str, tmp_path: Path
) -> None:
    shards = make_shards(tmp_path / "shards", 40, 100)
    write_tar(tmp_path / "shards" / "train-990.tar", [{"__key__": "cut", "jpg": b"\xff\xd8\xff\xe0 no more"}])
    (tmp_path / "shards" / "train-991.tar").write_bytes(Path(shards[0]).read_bytes()[:3000])
    token = secrets.token_hex(32)
    watching = tmp_path / "monitoring"
    shutil.copytree(ROOT / FOLDER, watching)
    (watching / "ray-token").write_text(token)
    command = [sys.executable, "-m", "ray_jobs", "fit", "--model", model_spec, "--out", f"{tmp_path}/run"]
    command += ["--shards", f"{tmp_path}/shards/*.tar", "--batch-size", "4", "--max-bad-shards", "1", "--retries", "1"]
    command += ["--image-size", "128", "--resize", "128", "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"]
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(LocalCluster(nodes=2, cpus=1, dashboard=True, token=token))
        config = (watching / "prometheus.yml").read_text()
        assert DISCOVERY in config
        at = f"{cluster.dashboard}/api/prometheus/sd"
        (watching / "prometheus.yml").write_text(config.replace(DISCOVERY, at))
        prometheus = Prometheus(watching)
        stack.callback(prometheus.close)
        wait_for_healthy_nodes(prometheus, 2)
        begun = time.time()
        env = {**os.environ, **cluster.environment, "OMP_NUM_THREADS": "1"}
        job = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
        while not (working := [p for p in cluster.workers() if "MomentsWorker.work" in p.title]):
            assert job.poll() is None, job.communicate()
            time.sleep(0.5)
        os.kill(working[0].pid, signal.SIGKILL)
        _, said = job.communicate(timeout=240)
        assert job.returncode == 0, said
        time.sleep(30)  # two scrapes after its end
        took = time.time() - begun

        found = {expression: prometheus.ever(expression, begun) for expression in shown(ROOT)}
        empty = {expression for expression, series in found.items() if not series}
        assert not {expression for expression in empty if not metrics_of(expression) & GPUS}, took
        for rule in rules(ROOT):
            series = prometheus.ever(rule["expr"], begun)
            assert series or "alert" in rule, rule["record"]
            assert all(s["metric"]["job"] == "fit" for s in series), series
            assert all(s["metric"]["run"] == f"{tmp_path}/run" for s in series), series

        last = prometheus.get("query", query="last_over_time(run_job:patternnet_shards_left:max[5m])")["result"]
        assert [series["value"][1] for series in last] == ["0"], said
        (seen,) = prometheus.get("query", query="run_job:patternnet_samples:sum")["result"]
        counted = json.loads((tmp_path / "run" / "manifest.json").read_text())["fit"]["samples"]
        assert float(seen["value"][1]) >= counted == 4000
        assert prometheus.get("alerts")["alerts"] == []
        states = [r["health"] for group in prometheus.get("rules")["groups"] for r in group["rules"]]
        assert set(states) == {"ok"}
