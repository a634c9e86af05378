"""docs/operations.md: its commands are typed amid the failures that they are for, and its figures are worked out anew.

A section's commands are those of its `console` blocks, as they stand on the page, with a test's own names in the places
of capitals.
"""

import contextlib
import io
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from ray.job_submission import JobSubmissionClient
from torch import nn
from torchvision.models import resnet50

from benchmarks.machine import cost
from benchmarks.timing import vgg16_features
from cluster.local import ROOT, LocalCluster
from cluster.processes import send
from ray_jobs.cli.app import exit_status
from ray_jobs.config import Resources
from ray_jobs.runs.map_files import estimate_bytes_per_sample
from ray_jobs.runs.run_folder import Run
from tests.conftest import make_shards
from tests.ray_jobs.chaos import SlowStorage
from tests.ray_jobs.runs import same_patterns, until

PAGE = (ROOT / "docs" / "operations.md").read_text()
TOKEN = secrets.token_hex(32)
SHARDS, SAMPLES = 4, 6
PREPARED = "--image-size 16 --resize 16 --mean 0.5,0.5,0.5 --std 0.25,0.25,0.25 --batch-size 4"
# Strikes the driver once, the first time that this shard is read.
STRIKING = "'pipe:mkdir {once} 2>/dev/null && kill -{signal} $PPID; cat {shard}'"
# A shard that comes so late that much can happen to its job, and the file at which it does not wait any longer.
LATE = "'pipe:for i in $(seq 1200); do [ -e {gate} ] && break; sleep 0.1; done; cat {shard}'"
# What does not need a cluster, and then is done in this process, since torch takes seconds to import.
JOBS = ("fit", "quality", "explain")
HERE = (*JOBS, "plan", "status", "report")


def section(title: str) -> str:
    """What stands under a title, up to the next."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert found is not None, title
    return found[1]


def blocks(title: str) -> list[list[str]]:
    """The commands of a section, by block."""
    return [block.strip().splitlines() for block in re.findall(r"```console\n(.*?)```", section(title), re.DOTALL)]


def commands(title: str) -> list[str]:
    """The commands of a section, one after the other."""
    return [line for block in blocks(title) for line in block]


def rows(title: str) -> list[list[str]]:
    """The cells of a section's tables, without their heads."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    kept = [line for line, below in zip(lines, [*lines[1:], ""]) if not {line[:4], below[:4]} & {"| --"}]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in kept]


@dataclass
class Terminal:
    """Where the page's commands are typed. names: what stands in the places of capitals."""

    names: dict[str, object]
    cluster: LocalCluster | None = None
    env: dict[str, str] = field(default_factory=dict)

    def line(self, command: str) -> str:
        """A command with this test's names."""
        names = {**self.names, **({"http://HEAD:8265": self.cluster.dashboard} if self.cluster else {})}
        return re.sub("|".join(rf"(?<!\w){re.escape(n)}\b" for n in names), lambda m: str(names[m[0]]), command)

    def here(self, command: str) -> tuple[int, str]:
        """Type a command that needs no cluster. Gives its exit status and all that it says."""
        line, said = shlex.split(self.line(command)), io.StringIO()
        if line[0] != "patternnet" or line[1] not in HERE:
            process = self.typed(command)
            return process.wait(), process.communicate()[0]
        alone = ["--workers", "0"] if line[1] in JOBS else []
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = exit_status([*line[1:], *alone])
        return status, said.getvalue()

    def typed(self, *given: str) -> subprocess.Popen[str]:
        """Type commands into a shell, and do not wait for them."""
        attached = self.cluster.environment if self.cluster else {}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", "-c", "\n".join(["set -e", *map(self.line, given)])],
            env={**os.environ, **attached, "PATH": path, **self.env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __call__(self, *given: str) -> tuple[int, str]:
        """Type commands into a shell. Gives the exit status and all that was said."""
        process = self.typed(*given)
        said, _ = process.communicate(timeout=300)
        return process.returncode, said


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_shards(tmp_path_factory.mktemp("plain"), SHARDS, SAMPLES)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("others")
    make_shards(folder, 2, SAMPLES, seed=1)
    return f"{folder}/*.tar"


def given(shards: list[str]) -> str:
    """Shards as they stand behind `--shards`; those that are commands quoted."""
    return " --shards ".join(shards) + " --allow-pipes"


@pytest.fixture(scope="module")
def undisturbed(model_spec: str, plain: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fit that nothing happens to."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    words = f"--model {model_spec} {PREPARED} --shards {given(plain)} --out {run} --workers 0"
    assert exit_status(["fit", *shlex.split(words)]) == 0
    return run


@pytest.fixture
def terminal(
    model_spec: str, plain: list[str], others: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Terminal:
    monkeypatch.chdir(tmp_path)
    places = {name: tmp_path / name.lower() for name in ("RUN", "TRIAL", "MORE", "MERGED", "MOVED")}
    return Terminal({"MODEL": f"{model_spec} {PREPARED}", "SHARDS": given(plain), "OTHERS": f"'{others}'", **places})


def struck(plain: list[str], folder: Path, name: str) -> str:
    """Shards of which the third sends the driver a signal, once."""
    striking = STRIKING.format(once=folder / "struck", signal=name, shard=plain[2])
    return given([*plain[:2], striking, *plain[3:]])


def late(plain: list[str], folder: Path) -> str:
    """Shards of which the third comes when there is a file `gate` in a folder."""
    return given([*plain[:2], LATE.format(gate=folder / "gate", shard=plain[2]), *plain[3:]])


def finished(terminal: Terminal, undisturbed: Path, name: str = "RUN") -> None:
    """The run is complete, with the patterns of the fit that nothing happened to."""
    run = Path(str(terminal.names[name]))
    done = json.loads((run / "manifest.json").read_text())["fit"]
    assert (done["status"], done["samples"], done["missing"]) == ("complete", SHARDS * SAMPLES, {})
    same_patterns(run, undisturbed)


# What the page says


def test_every_alert_points_at_a_section_and_says_its_title() -> None:
    groups = yaml.safe_load((ROOT / "cluster" / "monitoring" / "rules.yml").read_text())["groups"]
    alerts = [rule["annotations"] for group in groups for rule in group["rules"] if "alert" in rule]
    assert len(alerts) == 6
    for told in alerts:
        page, _, anchor = told["runbook"].partition("#")
        (title,) = re.findall(r'"([^"]+)"\.$', told["description"].strip())
        assert page == "docs/operations.md"
        assert anchor == title.lower().replace(" ", "-")
        assert blocks(title), title


def test_the_worked_example_adds_up() -> None:
    told = {name: float(value) for name, value in rows("A worked example")}
    machine_hours = 1e6 / (3600 * told["rate"]) * (1 + told["redone"])
    spot = told["spot, share of hours"]
    price = spot * told["spot price, an hour"] + (1 - spot) * told["full price, an hour"]
    compute = machine_hours * price + machine_hours / told["machines"] * told["head price, an hour"]
    storage = told["GB written"] * told["months"] * told["price of a GB a month"]
    egress = 1e6 * told["bytes an image"] / 1e9 * told["price of a GB of egress"]
    assert told["hours"] == pytest.approx(machine_hours, abs=5e-4)
    for name, value in {"price": price, "compute": compute, "storage": storage, "egress": egress}.items():
        assert told[name] == pytest.approx(value, abs=5e-3), name
    assert told["cost"] == pytest.approx(compute + storage + egress, abs=5e-3)


def benchmark(page: str, row: str) -> tuple[float, float]:
    """A row's ratio, and its share of the roofline."""
    text = (ROOT / "docs" / page).read_text()
    found = re.search(rf"^\| {re.escape(row)} \|[^|]*\| ([\d.]+)[^|]*\|[^|]*\| (\d+)% \|", text, re.MULTILINE)
    assert found is not None, row
    return float(found[1]), float(found[2]) / 100


def rate(model: str, flops: float, page: str, what: str) -> float:
    """Images a second that a page's ratios and shares come to, for so many products an image."""
    gflops = float(re.findall(r"\(([\d.]+) GFLOP/s\)", (ROOT / "docs" / page).read_text())[0])
    _, share = benchmark(page, f"{model}: forward")
    ratio, _ = benchmark(page, f"{model}: {what}")
    return share * gflops * 1e9 / flops / ratio


def test_rates_are_what_the_benchmarks_come_to() -> None:
    models: dict[str, nn.Module] = {"VGG-16": vgg16_features(), "ResNet-50": resnet50()}
    with torch.inference_mode():
        flops = {n: cost(partial(m.eval(), torch.zeros(1, 3, 224, 224))).flops for n, m in models.items()}
    table = {cells[0]: cells[1:] for cells in rows("Cost")}
    assert len(table) == 3
    for what, told in table.items():
        for model, value in zip(models, told):
            assert float(value) == pytest.approx(rate(model, flops[model], "benchmarks-gpu.md", what), rel=2e-3)
    said = " ".join(section("Cost").split())
    for model in models:
        (value,) = re.findall(rf"([\d.]+)(?: images a second)? of {model}\b", said)
        expected = rate(model, flops[model], "benchmarks.md", "fit, all estimators")
        assert float(value) == pytest.approx(expected, abs=0.05)


def test_bytes_of_an_explanation_are_what_the_job_says() -> None:
    whole = estimate_bytes_per_sample({"gradient": (3, 224, 224)}, ("npy", "png", "parquet", "zarr"))
    small = estimate_bytes_per_sample({"gradient": (1, 56, 56)}, ("parquet",))
    told = " ".join(section("Disk").split())
    for kind, size in {**whole, "`--reduce-channels sum --map-size 56`": small["parquet"]}.items():
        assert re.search(rf"{re.escape(kind)}`? (at most )?{size:,}", told), kind


@pytest.mark.slow
def test_memory_of_the_models_is_what_plan_says(terminal: Terminal) -> None:
    models = [cells for cells in rows("Memory") if "torchvision:" in cells[0]]
    assert len(models) == 3
    for spec, every, default, beside in models:
        for estimators, size in (("", every), ("--estimators default", default)):
            plan = f"patternnet plan --model {spec.strip('`')} --weights random --batch-size 64 {estimators}"
            status, said = terminal.here(plan)
            assert status == 0
            assert f"moments of {size} in" in said
            assert f"about {beside}" in said


def test_what_may_differ_on_resuming_is_all_that_belongs_to_the_machines() -> None:
    (listed,) = re.findall(r"These may\s+differ: (.*?); where", section("The run's life"), re.DOTALL)
    assert set(re.findall(r"`--([\w-]+)`", listed)) == {each.name.replace("_", "-") for each in fields(Resources)}


# What it tells to type, without a cluster


def test_a_run_from_its_trial_to_its_report(terminal: Terminal, plain: list[str], undisturbed: Path) -> None:
    terminal.names["SOME"] = given(plain[:2])
    (_, *trial), run, _ = blocks("The run's life")
    for line in (*trial, *run):
        status, said = terminal.here(line)
        assert status == 0, line + said
        if line.startswith("python"):
            assert float(said) > 0
    finished(terminal, undisturbed)
    assert Path("run/report.html").exists()


def test_a_job_that_ended_with_work_left_goes_on(terminal: Terminal, plain: list[str], undisturbed: Path) -> None:
    terminal.names["SHARDS"] = struck(plain, Path.cwd(), "TERM")
    looked, same = commands("A job ended with work left")
    status, said = terminal.here(same)
    assert status == 3
    assert "run the same command again to resume" in said
    assert "stopped" in terminal.here(looked)[1]
    assert terminal.here(same)[0] == 0
    finished(terminal, undisturbed)


def test_a_second_driver_is_refused_and_a_killed_one_followed(
    terminal: Terminal, plain: list[str], undisturbed: Path
) -> None:
    terminal.names["SHARDS"] = late(plain, Path.cwd())
    looked, same = commands("The driver was killed")
    driver = subprocess.Popen(
        [sys.executable, "-m", "ray_jobs", *shlex.split(terminal.line(same))[1:], "--workers", "0"]
    )
    until(lambda: "state" in Run("run").progress())
    status, said = terminal.here(same)
    assert status == 2
    assert re.search(r"process \d+ on \S+ works on this run", said)
    driver.kill()
    driver.wait()
    assert "stale: no heartbeat from its driver" in terminal.here(looked)[1]
    Path("gate").touch()
    assert terminal.here(same)[0] == 0
    finished(terminal, undisturbed)


def test_refused_samples_are_named_and_taken_up_once_they_are_mended(terminal: Terminal, model_spec: str) -> None:
    # In float64, since the batches of a second round are others, and round otherwise.
    terminal.names["MODEL"] = model = f"{model_spec} {PREPARED} --precision float64"
    sound, broken = make_shards(Path("sound"), 4, 40), make_shards(Path("broken"), 4, 40)
    for name in broken:
        path = Path(name)
        data = bytearray(path.read_bytes())
        marks = [m.start() for m in re.finditer(rb"\xff\xd8\xff\xe0", data)]
        for at in marks[: 3 * len(marks) // 4]:
            data[at : at + 4] = b"none"
        path.write_bytes(data)
    counted, same, retry = commands("Many samples are rejected")
    terminal.names["SHARDS"] = given(broken)
    status, said = terminal.here(same)
    assert status == 2
    assert re.search(r"samples were rejected.*--max-bad-fraction", said)
    status, said = terminal.here(counted)
    assert "'stage': 'decode'" in said
    for mended, name in zip(sound, broken):
        shutil.copyfile(mended, name)
    for line in (same, retry):
        assert terminal.here(line)[0] == 0
    done = json.loads(Path("run/manifest.json").read_text())["fit"]
    assert (done["samples"], done["refused"]) == (160, 0)
    words = f"fit --model {model} --shards {given(sound)} --out sound/run --workers 0"
    assert exit_status(shlex.split(words)) == 0
    same_patterns(Path("run"), Path("sound/run"))


def test_a_failing_shard_is_left_out_and_taken_up_once_it_is_mended(
    terminal: Terminal, plain: list[str], undisturbed: Path
) -> None:
    mine = [str(shutil.copy(shard, Path.cwd())) for shard in plain]
    whole = Path(mine[1]).read_bytes()
    Path(mine[1]).write_bytes(whole[: len(whole) // 2])
    terminal.names["SHARDS"] = f"{given(mine)} --retries 0"
    without, same = commands("Shards fail")
    status, said = terminal.here(same)
    assert status == 3
    assert "--max-bad-shards 1" in said
    assert terminal.here(without)[0] == 0
    assert list(json.loads(Path("run/manifest.json").read_text())["fit"]["missing"]) == [mine[1]]
    Path(mine[1]).write_bytes(whole)
    assert terminal.here(same)[0] == 0
    finished(terminal, undisturbed)


def test_waiting_for_data_is_said_and_resources_change_midway(
    terminal: Terminal, plain: list[str], undisturbed: Path
) -> None:
    folder, striking = Path(plain[0]).parent, STRIKING.format(once=Path.cwd() / "struck", signal="TERM", shard=plain[2])
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SlowStorage, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    far = [f"http://127.0.0.1:{server.server_port}/{Path(shard).name}" for shard in plain]
    terminal.names["SHARDS"] = given([far[0], far[1], striking, far[3]])
    (same,) = commands("Workers wait for data")
    SlowStorage.delay = 0.5
    status, said = terminal.here(same.replace(" --cpus-per-worker 1", ""))
    assert status == 3
    shares = [int(share) for share in re.findall(r"(\d+)% waiting for data", said)]
    assert shares[-1] > 50, said
    SlowStorage.delay = 0.0  # a nearer place under the same names
    assert terminal.here(same)[0] == 0
    server.shutdown()
    server.server_close()
    finished(terminal, undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk with little room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], check=False).returncode:
        pytest.skip("no right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_a_job_that_goes_on_once_there_is_room(
    terminal: Terminal, small_disk: Path, undisturbed: Path
) -> None:
    terminal.names["RUN"] = small_disk / "run"
    looked, same = commands("The disk is full")
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        file.write(bytes((2 << 20) - (16 << 10)))
    status, said = terminal.here(same)
    assert status == 2
    assert "No space left on device" in said
    status, said = terminal.here(looked)
    assert re.search(r"(9\d|100)%", said), said
    filler.unlink()
    assert terminal.here(same)[0] == 0
    finished(terminal, undisturbed)


def test_a_wrong_option_is_named_and_the_folder_says_the_right_one(
    terminal: Terminal, plain: list[str], undisturbed: Path
) -> None:
    terminal.names["SHARDS"] = struck(plain, Path.cwd(), "TERM")
    looked, same = commands("A wrong option on resume")
    assert terminal.here(same)[0] == 3
    status, said = terminal.here(f"{same} --batch-size 64")
    assert status == 2
    assert "this fit was begun with batch_size 4, now 64" in said
    assert json.loads(terminal.here(looked)[1])["batch_size"] == 4
    assert terminal.here(same)[0] == 0
    finished(terminal, undisturbed)


def test_a_moved_folder_goes_on_and_its_explanations_by_a_link(
    terminal: Terminal, plain: list[str], undisturbed: Path, others: str
) -> None:
    terminal.names["SHARDS"] = struck(plain, Path.cwd(), "TERM")
    (move, same, explain), (link, explain_again) = blocks("A run's folder was moved")
    assert terminal.here(same.replace("MOVED", "RUN"))[0] == 3
    for line in (move, same, explain):
        status, said = terminal.here(line)
        assert status == 0, said
    finished(terminal, undisturbed, "MOVED")
    back = terminal.here("mv MOVED RUN")
    assert back[0] == 0
    status, said = terminal.here(explain.replace("MOVED", "RUN"))
    assert status == 2
    assert "this explain was begun with patterns" in said
    shutil.rmtree("run/explanations")
    manifest = json.loads(Path("run/manifest.json").read_text())
    del manifest["explain"]
    Path("run/manifest.json").write_text(json.dumps(manifest))
    assert terminal.here(explain_again)[0] == 0
    for line in (move, link, explain_again):
        status, said = terminal.here(line)
        assert status == 0, said


def test_what_may_be_deleted_is_missed_by_what_the_page_says_alone(
    terminal: Terminal, plain: list[str], undisturbed: Path
) -> None:
    terminal.names["SHARDS"] = struck(plain, Path.cwd(), "TERM")
    _, same = commands("The driver was killed")
    assert terminal.here(same)[0] == 3
    for part in Path("run/moments").glob("part-*"):
        part.unlink()
    status, said = terminal.here(same)
    assert status == 2
    assert "no such file" in said
    shutil.rmtree("run/moments")
    assert terminal.here(same)[0] == 0
    finished(terminal, undisturbed)
    for file in ("patterns.parquet", "progress.json"):
        Path("run", file).unlink()
    shutil.rmtree("run/moments")
    *_, explain, report = blocks("The run's life")[1]
    for line in (same, explain, report):
        assert terminal.here(line)[0] == 0


def other_version(folder: Path) -> dict[str, str]:
    """The environment of another version of this program, with the same options."""
    for name in ("patterns", "ray_jobs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "patternnet_ray-9.9.dist-info").mkdir()
    (folder / "patternnet_ray-9.9.dist-info" / "METADATA").write_text("Name: patternnet-ray\nVersion: 9.9\n")
    return {"PYTHONPATH": str(folder)}


def versions() -> str:
    return str(json.loads(Path("run/manifest.json").read_text())["versions"]["patternnet-ray"])


@pytest.mark.slow
def test_a_fit_goes_on_with_another_version_and_back_again(
    terminal: Terminal, plain: list[str], undisturbed: Path
) -> None:
    strikes = [STRIKING.format(once=Path.cwd() / f"struck-{n}", signal="TERM", shard=plain[n]) for n in (1, 2)]
    terminal.names["SHARDS"] = given([plain[0], *strikes, plain[3]])
    told, same = commands("Upgrade")
    assert terminal.here(same)[0] == 3
    own = versions()
    newer = replace(terminal, env=other_version(Path.cwd() / "newer"))
    status, said = newer(told, f"{same} --workers 0")
    assert status == 3, said
    assert said.startswith("patternnet 9.9")
    assert versions() == "9.9"
    assert terminal.here(same)[0] == 0
    assert versions() == own
    finished(terminal, undisturbed)


# What it tells to type on a cluster


def ready(cluster: LocalCluster) -> None:
    """Wait until a cluster takes jobs: its dashboard answers before there is an agent that does."""
    client, begun = JobSubmissionClient(cluster.dashboard, headers={"Authorization": f"Bearer {TOKEN}"}), []

    def taken() -> bool:
        with contextlib.suppress(RuntimeError):
            begun.append(client.submit_job(entrypoint="true"))
        return bool(begun)

    until(taken)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(nodes=2, cpus=1, dashboard=True, token=TOKEN) as cluster:
        ready(cluster)
        yield cluster


@pytest.fixture
def away(terminal: Terminal, cluster: LocalCluster, plain: list[str], tmp_path: Path) -> Terminal:
    """A terminal from which jobs are sent to the cluster, whose third shard comes late."""
    terminal.names["SHARDS"] = late(plain, tmp_path)
    terminal.cluster = cluster
    return terminal


def sent(process: subprocess.Popen[str]) -> str:
    """The name of the job that `patternnet submit` sends, or finds."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert re.match(r"patternnet-\S+: (sent|found at work)", line), line + process.stdout.read()
    return line.partition(":")[0]


def at_work(terminal: Terminal) -> bool:
    """Whether a worker has begun with the shard that comes late."""
    path = Path(str(terminal.names["RUN"])) / "progress.json"
    workers = json.loads(path.read_text()).get("workers", ()) if path.exists() else ()
    return any("pipe:" in str(worker["shard"]) for worker in workers)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=300)
    return process.returncode, said


@pytest.mark.slow
def test_a_token_is_asked_for_and_its_file_does(away: Terminal, undisturbed: Path) -> None:
    export, same = commands("The token is wrong or missing")
    away.env = {"RAY_AUTH_TOKEN": "f" * 64}
    status, said = away(same)
    assert status == 2
    assert "the cluster asks for a token" in said
    Path("ray-token").write_text(TOKEN)
    Path("gate").touch()
    status, said = away("unset RAY_AUTH_MODE RAY_AUTH_TOKEN", export, same)
    assert status == 0, said
    finished(away, undisturbed)


@pytest.mark.slow
def test_a_submission_that_slept_and_one_that_was_killed_lose_nothing(away: Terminal, undisturbed: Path) -> None:
    (same,) = commands("The laptop slept")
    first = away.typed(f"exec {same}")
    name = sent(first)
    until(lambda: at_work(away))
    first.send_signal(signal.SIGSTOP)
    second = away.typed(f"exec {same}")
    assert sent(second) == name
    second.kill()
    second.wait()
    Path("gate").touch()
    until(Path("run/patterns.safetensors").exists)
    first.send_signal(signal.SIGCONT)
    status, said = ended(first)
    assert status == 0, said
    assert said.count(f"fit: {SHARDS * SAMPLES} samples") == 1
    finished(away, undisturbed)


@pytest.mark.slow
def test_a_job_that_stands_still_goes_on_once_its_hung_worker_is_ended(away: Terminal, undisturbed: Path) -> None:
    (looked, nodes), (end,) = blocks("A job stands still")
    (same,) = commands("The laptop slept")
    job = away.typed(same)
    sent(job)
    until(lambda: at_work(away))
    assert away.cluster is not None
    send(signal.SIGSTOP, [p.pid for p in away.cluster.workers() if "Worker.work" in p.title])
    Path("gate").touch()
    for line in (looked, nodes):
        status, said = away(line)
        assert status == 0, said
        if line == looked:
            (away.names["PID"],) = re.findall(r"/(\d+): .* at pipe:", said)
    assert away(end)[0] == 0
    status, said = ended(job)
    assert status == 0, said
    finished(away, undisturbed)


@pytest.mark.slow
def test_a_stopped_job_commits_before_it_ends(away: Terminal, undisturbed: Path) -> None:
    (stop,), (same,) = blocks("A run must be stopped")
    job = away.typed(same)
    away.names["JOB"] = sent(job)
    until(lambda: at_work(away))
    stopping = away.typed(stop)
    time.sleep(5)  # more than the three seconds that Ray gives else
    Path("gate").touch()
    assert ended(stopping)[0] == 0
    status, said = ended(job)
    assert status == 3, said
    ledger = json.loads(Path("run/moments/ledger.json").read_text())
    assert sum(part["samples"] for part in ledger["parts"]) >= 3 * SAMPLES
    status, said = away(same)
    assert status == 0, said
    finished(away, undisturbed)


@pytest.mark.slow
def test_lost_nodes_need_no_command(away: Terminal, undisturbed: Path) -> None:
    (same,) = commands("The laptop slept")
    job = away.typed(same)
    sent(job)
    until(lambda: at_work(away))
    assert away.cluster is not None
    away.cluster.kill_node(max(away.cluster.nodes))
    added = away.cluster.add_node()
    Path("gate").touch()
    status, said = ended(job)
    assert status == 0, said
    assert added.number in away.cluster.nodes
    finished(away, undisturbed)


@pytest.mark.slow
def test_other_versions_are_named_until_their_node_is_gone(away: Terminal) -> None:
    told, doctor = commands("Versions differ")
    assert away.cluster is not None
    other = away.cluster.add_node(env=other_version(Path.cwd() / "other"))
    status, said = away("cd /", told, doctor)  # Ray's workers look first where their driver was started
    assert status == 2
    assert re.search(r"patternnet-ray 9\.9, but \S+ here", said), said
    away.cluster.kill_node(other.number)
    until(lambda: away("cd /", doctor)[0] == 0)  # once Ray takes the node for lost


@pytest.mark.slow
def test_a_cluster_is_examined_and_a_trial_merged_with_the_rest(
    terminal: Terminal, cluster: LocalCluster, plain: list[str], undisturbed: Path
) -> None:
    terminal.names |= {"SOME": given(plain[:2]), "REST": given(plain[2:])}
    (doctor, _, trial, _), _, (more, merge) = blocks("The run's life")
    for line in (trial, more):
        assert terminal.here(line)[0] == 0
    for line in (doctor, merge):
        status, said = replace(terminal, cluster=cluster)(line)
        assert status == 0, said
    finished(terminal, undisturbed, "MERGED")


@pytest.mark.slow
def test_after_the_head_was_lost_another_cluster_goes_on(
    terminal: Terminal, plain: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    terminal.names["SHARDS"] = late(plain, tmp_path)
    looked, same = commands("The head was lost")
    with LocalCluster(nodes=2, cpus=1, dashboard=True, token=TOKEN) as first:
        ready(first)
        terminal.cluster = first
        job = terminal.typed(f"exec {same}")
        sent(job)
        until(lambda: at_work(terminal))
        first.kill_node(0)
        until(lambda: "stale" in terminal(looked)[1])  # a driver may outlive its head for a minute
    job.kill()
    job.wait()
    Path("gate").touch()
    with LocalCluster(nodes=2, cpus=1, dashboard=True, token=TOKEN) as second:
        ready(second)
        terminal.cluster = second
        status, said = terminal(same)
        assert status == 0, said
    finished(terminal, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("title", ["Workers are lost again and again", "The out-of-memory killer"])
def test_a_job_whose_workers_were_killed_for_memory_goes_on_with_other_nodes(terminal: Terminal, title: str) -> None:
    (same,) = commands(title)
    # In float64, since a worker of two CPUs takes two threads, and these round otherwise.
    terminal.names["MODEL"] = f"{terminal.names['MODEL']} --precision float64"
    assert terminal.here("patternnet fit --model MODEL --shards SHARDS --out TRIAL")[0] == 0
    with LocalCluster(nodes=1, cpus=0, dashboard=True, token=TOKEN) as cluster:
        terminal.cluster = cluster
        # Every worker there is one too many: the machine's use counts, which no test should raise to 95 %.
        small = cluster.add_node(env={"RAY_memory_usage_threshold": "0.001"}, num_cpus=2)
        ready(cluster)
        status, said = terminal(same.replace(" --cpus-per-worker 2", ""))
        assert status != 0
        assert re.search("(?i)memory", said), said
        cluster.kill_node(small.number)
        cluster.add_node(num_cpus=2)
        status, said = terminal(same)
        assert status == 0, said
    finished(terminal, Path(str(terminal.names["TRIAL"])))
