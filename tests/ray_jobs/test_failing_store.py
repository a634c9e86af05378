"""Every command with a store that fails at its n-th operation: one error line, exit status 2, and nothing is lost."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import save_file

from ray_jobs.cli.app import COMMANDS, exit_status
from ray_jobs.engine.ray_tasks import LocalTasks
from ray_jobs.jobs import job_session
from tests.ray_jobs.runs import OPTIONS
from tests.ray_jobs.store import FailingFileSystem

pytestmark = pytest.mark.full

ALONE = ("--workers", "0", "--retries", "0")
FIRST_FAILURES = (1, 3, 8, 20)
URL = "failing://store"
SHARDS = f"{URL}/train-000.tar"
EXPLAIN = ("--patterns", "RUN", "--shards", "SHARD0")
BELOW = "afile/below"  # a folder below a file of this machine
# For every command, each option for a file or folder: in the store, or at an impossible path of this machine.
CASES: dict[str, list[list[str]]] = {
    "fit": [
        ["--model", "MODEL", "--shards", "SHARD0", "--out", f"{URL}/new", *OPTIONS, *ALONE],
        ["--model", "MODEL", "--shards", f"{URL}/train-*.tar", "--out", "one", *OPTIONS, *ALONE],
        ["--model", "MODEL", "--shards", f"@{URL}/list.txt", "--out", "two", *OPTIONS, *ALONE],
        ["--model", "MODEL", "--weights", f"{URL}/w.safetensors", "--shards", "SHARD0", "--out", "w", *OPTIONS, *ALONE],
        ["--model", "MODEL", "--shards", "SHARD0", "--out", BELOW, *OPTIONS, *ALONE],
    ],
    "quality": [
        ["--patterns", f"{URL}/run", "--shards", SHARDS, "--evaluate", "SHARD2", "--out", f"{URL}/quality", *ALONE],
        ["--patterns", "RUN", "--shards", "SHARD2", "--evaluate", f"{URL}/train-001.tar", "--out", "three", *ALONE],
    ],
    "explain": [
        ["--patterns", f"{URL}/run", "--shards", "SHARD0", "--out", "four", *ALONE],
        ["--patterns", "RUN", "--shards", "SHARD0", "--out", f"{URL}/five", *ALONE],
        [*EXPLAIN, "--out", "six", "--target", "ant", "--classes", f"{URL}/c.json", *ALONE],
    ],
    "degrade": [["--patterns", f"{URL}/run", "--shards", "SHARD0", "--out", f"{URL}/seven", "--steps", "2", *ALONE]],
    "evaluate": [
        [
            "--patterns",
            f"{URL}/run",
            "--shards",
            "SHARD0",
            "--out",
            f"{URL}/nine",
            "--measures",
            "class",
            "--patch-size",
            "4",
            "--steps",
            "4",
            *ALONE,
        ]
    ],
    "atlas": [["--patterns", f"{URL}/run", "--shards", "SHARD0", "--out", f"{URL}/ten", *ALONE]],
    "concepts": [["--patterns", f"{URL}/run", "--shards", "SHARD0", "--out", f"{URL}/twelve", *ALONE]],
    "select": [[f"{URL}/run", "class >= 0", "--out", "chosen"], ["RUN", "class >= 0", "--out", BELOW]],
    "export": [[f"{URL}/run", "--to", "coco", "--out", "eleven"], ["RUN", "--to", "coco", "--out", BELOW]],
    "export-model": [[f"{URL}/run", "--to", "e.pt2"], ["RUN", "--to", f"{BELOW}.pt2"]],
    "reproduce": [
        ["--model", "MODEL", "--shards", f"{URL}/train-*.tar", "--evaluate", "SHARD0", "--out", BELOW, *ALONE],
        ["--dataset", "mnist", "--data", BELOW, "--out", "eight", *ALONE],
    ],
    "demo": [["--out", BELOW, "--workers", "0"]],
    "pack": [["nowhere", "packed"], ["IMAGES", BELOW]],
    "plan": [["--model", "MODEL", "--weights", f"{URL}/w.safetensors", *OPTIONS]],
    "merge": [[f"{URL}/run", "RUN2", "--out", f"{URL}/merged"], ["RUN", "RUN2", "--out", BELOW]],
    "status": [[f"{URL}/run"]],
    "solve": [[f"{URL}/run", "--estimators", "filter"]],
    "grid": [[f"{URL}/run", "--random", "1", "--out", "grid.png"], ["RUN", "--random", "1", "--out", f"{BELOW}.png"]],
    "show": [[f"{URL}/run", "s000-0", "--out", "show.png"], ["RUN", "s000-0", "--out", f"{BELOW}.png"]],
    "report": [[f"{URL}/run", "--out", "report.html"], ["RUN", "--out", f"{BELOW}.html"]],
    "doctor": [["--shards", f"{URL}/train-*.tar"]],
    "submit": [["--address", "http://127.0.0.1:9", "--working-dir", "nowhere", "status", "RUN"]],
}


def test_every_command_is_tested() -> None:
    assert sorted(CASES) == sorted(COMMANDS)


@pytest.fixture(scope="module")
def folder(model_spec: str, shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two finished fits and explanations."""
    folder = tmp_path_factory.mktemp("walk")
    keys = [f"s{shard:03d}-{number}" for shard in range(2) for number in range(6)]
    pq.write_table(pa.table({"key": keys, "even": [True, False] * 6}), folder / "labels.parquet")
    common = ["--model", model_spec, "--workers", "0", "--concepts", str(folder / "labels.parquet"), *OPTIONS]
    assert exit_status(["fit", *common, "--shards", shards[0], "--out", str(folder / "run")]) == 0
    assert exit_status(["fit", *common, "--shards", shards[1], "--out", str(folder / "run2")]) == 0
    explain = ["explain", "--patterns", str(folder / "run"), "--shards", shards[0], "--workers", "0"]
    assert exit_status([*explain, "--methods", "gradient", "--output", "npy,parquet"]) == 0
    atlas = ["atlas", "--patterns", str(folder / "run"), "--shards", shards[0], "--workers", "0"]
    assert exit_status([*atlas, "--out", str(folder / "run")]) == 0
    (folder / "afile").write_text("no folder")
    (folder / "images" / "ant").mkdir(parents=True)
    (folder / "images" / "ant" / "a.jpg").write_bytes(b"\xff\xd8\xff")
    path, _, name = model_spec.rpartition(":")
    scope: dict[str, Any] = {}
    exec(Path(path).read_text(), scope)
    save_file(scope[name]().state_dict(), folder / "w.safetensors")
    return folder


@pytest.fixture
def store(
    folder: Path, shards: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[type[FailingFileSystem]]:
    """Return the class of a store with copies of these files."""
    FailingFileSystem.reset()
    FailingFileSystem.store.clear()
    store = FailingFileSystem()
    for path in (p for p in (folder / "run").rglob("*") if p.is_file()):
        store.pipe_file(f"/store/run/{path.relative_to(folder / 'run')}", path.read_bytes())
    for path in map(Path, shards[:2]):
        store.pipe_file(f"/store/{path.name}", path.read_bytes())
    store.pipe_file("/store/list.txt", b"train-{000..001}.tar\n")
    store.pipe_file("/store/c.json", json.dumps({"0": "ant"}).encode())
    store.pipe_file("/store/w.safetensors", (folder / "w.safetensors").read_bytes())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afile").write_text("no folder")
    monkeypatch.setattr(
        job_session, "connect", lambda _: nullcontext(LocalTasks())
    )  # merge and solve would start a Ray
    yield FailingFileSystem
    FailingFileSystem.reset()


@pytest.mark.parametrize(("name", "number"), [(name, n) for name, cases in CASES.items() for n in range(len(cases))])
def test_failing_store_is_one_error_line(
    name: str,
    number: int,
    store: type[FailingFileSystem],
    folder: Path,
    model_spec: str,
    shards: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = {
        "MODEL": model_spec,
        "SHARD0": shards[0],
        "SHARD2": shards[2],
        "RUN": str(folder / "run"),
        "RUN2": str(folder / "run2"),
        "IMAGES": str(folder / "images"),
    }
    command = [name, *(known.get(word, word) for word in CASES[name][number])]
    remote = any(URL in word for word in command)
    failed = 0
    for fail_at in FIRST_FAILURES:
        store.reset(fail_at)
        capsys.readouterr()
        status = exit_status(command)  # an unexpected error would be raised here
        errors = capsys.readouterr().err
        if status == 0:
            break
        failed += 1
        assert status == 2, errors
        assert sum(line.startswith("patternnet: ") for line in errors.splitlines()) == 1, errors
        assert "Traceback" not in errors
        if not remote or name == "doctor":  # it would start Ray
            break
    assert failed > 0, "the store was not used"
    if remote and name not in ("doctor", "reproduce"):  # doctor would start Ray, and reproduce has no folder to write
        store.reset()
        assert exit_status(command) == 0, "the same command does not resume"
