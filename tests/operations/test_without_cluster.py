"""The commands of docs/operations.md that need no cluster, run during the failures that they fix.

A section's commands are those of its `console` blocks. The test replaces the words in capitals by its own names.
"""

import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from ray_jobs.cli.app import exit_status
from ray_jobs.runs.run_folder import Run
from tests.conftest import make_shards
from tests.operations.terminal import (
    PREPARED,
    SIGNALING,
    Terminal,
    assert_complete,
    blocks,
    commands,
    given,
    late,
    other_version,
    signaling,
)
from tests.ray_jobs.chaos import SlowStorage
from tests.ray_jobs.runs import assert_same_patterns, wait_until

pytestmark = pytest.mark.full


def test_commands_of_a_whole_run_work(terminal: Terminal, plain: list[str], undisturbed: Path) -> None:
    terminal.names["SOME"] = given(plain[:2])
    (_, *trial), run, _ = blocks("The run's life")
    for line in (*trial, *run):
        status, output = terminal.here(line)
        assert status == 0, line + output
        if line.startswith("python"):
            assert float(output) > 0
    assert_complete(terminal, undisturbed)
    assert Path("run/report.html").exists()


def test_stopped_job_is_resumed_by_the_same_command(terminal: Terminal, plain: list[str], undisturbed: Path) -> None:
    terminal.names["SHARDS"] = signaling(plain, Path.cwd(), "TERM")
    looked, same = commands("A job ended with work left")
    status, output = terminal.here(same)
    assert status == 3
    assert "run the same command again to resume" in output
    assert "stopped" in terminal.here(looked)[1]
    assert terminal.here(same)[0] == 0
    assert_complete(terminal, undisturbed)


def test_second_driver_is_rejected_and_a_killed_driver_is_replaced(
    terminal: Terminal, plain: list[str], undisturbed: Path
) -> None:
    terminal.names["SHARDS"] = late(plain, Path.cwd())
    looked, same = commands("The driver was killed")
    driver = subprocess.Popen(
        [sys.executable, "-m", "ray_jobs", *shlex.split(terminal.line(same))[1:], "--workers", "0"]
    )
    wait_until(lambda: "state" in Run("run").progress())
    status, output = terminal.here(same)
    assert status == 2
    assert re.search(r"process \d+ on \S+ works on this run", output)
    driver.kill()
    driver.wait()
    assert "stale: no heartbeat from its driver" in terminal.here(looked)[1]
    Path("gate").touch()
    assert terminal.here(same)[0] == 0
    assert_complete(terminal, undisturbed)


def test_rejected_samples_are_listed_and_used_after_they_are_fixed(terminal: Terminal, model_spec: str) -> None:
    # In float64, because the second round has other batches, which round differently.
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
    status, output = terminal.here(same)
    assert status == 2
    assert re.search(r"samples were rejected.*--max-bad-fraction", output)
    status, output = terminal.here(counted)
    assert "'stage': 'decode'" in output
    for fixed, name in zip(sound, broken):
        shutil.copyfile(fixed, name)
    for line in (same, retry):
        assert terminal.here(line)[0] == 0
    done = json.loads(Path("run/manifest.json").read_text())["fit"]
    assert (done["samples"], done["refused"]) == (160, 0)
    words = f"fit --model {model} --shards {given(sound)} --out sound/run --workers 0"
    assert exit_status(shlex.split(words)) == 0
    assert_same_patterns(Path("run"), Path("sound/run"))


def test_failing_shard_is_skipped_and_used_after_it_is_fixed(
    terminal: Terminal, plain: list[str], undisturbed: Path
) -> None:
    mine = [str(shutil.copy(shard, Path.cwd())) for shard in plain]
    whole = Path(mine[1]).read_bytes()
    Path(mine[1]).write_bytes(whole[: len(whole) // 2])
    terminal.names["SHARDS"] = f"{given(mine)} --retries 0"
    without, same = commands("Shards fail")
    status, output = terminal.here(same)
    assert status == 3
    assert "--max-bad-shards 1" in output
    assert terminal.here(without)[0] == 0
    assert list(json.loads(Path("run/manifest.json").read_text())["fit"]["missing"]) == [mine[1]]
    Path(mine[1]).write_bytes(whole)
    assert terminal.here(same)[0] == 0
    assert_complete(terminal, undisturbed)


def test_time_spent_waiting_for_data_is_reported_and_resources_may_change(
    terminal: Terminal, plain: list[str], undisturbed: Path
) -> None:
    folder = Path(plain[0]).parent
    signal_once = SIGNALING.format(once=Path.cwd() / "signaled", signal="TERM", shard=plain[2])
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SlowStorage, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    far = [f"http://127.0.0.1:{server.server_port}/{Path(shard).name}" for shard in plain]
    terminal.names["SHARDS"] = given([far[0], far[1], signal_once, far[3]])
    (same,) = commands("Workers wait for data")
    SlowStorage.delay = 0.5
    status, output = terminal.here(same.replace(" --cpus-per-worker 1", ""))
    assert status == 3
    shares = [int(share) for share in re.findall(r"(\d+)% waiting for data", output)]
    assert shares[-1] > 50, output
    SlowStorage.delay = 0.0  # the same addresses now answer quickly
    assert terminal.here(same)[0] == 0
    server.shutdown()
    server.server_close()
    assert_complete(terminal, undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a small disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], check=False).returncode:
        pytest.skip("needs the permission to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_full_disk_ends_a_job_that_resumes_after_space_is_freed(
    terminal: Terminal, small_disk: Path, undisturbed: Path
) -> None:
    terminal.names["RUN"] = small_disk / "run"
    looked, same = commands("The disk is full")
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        file.write(bytes((2 << 20) - (16 << 10)))
    status, output = terminal.here(same)
    assert status == 2
    assert "No space left on device" in output
    status, output = terminal.here(looked)
    assert re.search(r"(9\d|100)%", output), output
    filler.unlink()
    assert terminal.here(same)[0] == 0
    assert_complete(terminal, undisturbed)


def test_changed_option_is_named_and_the_manifest_has_the_first_one(
    terminal: Terminal, plain: list[str], undisturbed: Path
) -> None:
    terminal.names["SHARDS"] = signaling(plain, Path.cwd(), "TERM")
    looked, same = commands("A wrong option on resume")
    assert terminal.here(same)[0] == 3
    status, output = terminal.here(f"{same} --batch-size 64")
    assert status == 2
    assert "this fit was begun with batch_size 4, now 64" in output
    assert json.loads(terminal.here(looked)[1])["batch_size"] == 4
    assert terminal.here(same)[0] == 0
    assert_complete(terminal, undisturbed)


def test_moved_folder_is_resumed_and_its_explanations_need_a_link(
    terminal: Terminal, plain: list[str], undisturbed: Path, others: str
) -> None:
    terminal.names["SHARDS"] = signaling(plain, Path.cwd(), "TERM")
    (move, same, explain), (link, explain_again) = blocks("A run's folder was moved")
    assert terminal.here(same.replace("MOVED", "RUN"))[0] == 3
    for line in (move, same, explain):
        status, output = terminal.here(line)
        assert status == 0, output
    assert_complete(terminal, undisturbed, "MOVED")
    back = terminal.here("mv MOVED RUN")
    assert back[0] == 0
    status, output = terminal.here(explain.replace("MOVED", "RUN"))
    assert status == 2
    assert "this explain was begun with patterns" in output
    shutil.rmtree("run/explanations")
    manifest = json.loads(Path("run/manifest.json").read_text())
    del manifest["explain"]
    Path("run/manifest.json").write_text(json.dumps(manifest))
    assert terminal.here(explain_again)[0] == 0
    for line in (move, link, explain_again):
        status, output = terminal.here(line)
        assert status == 0, output


def test_deleted_files_affect_only_the_commands_that_the_page_names(
    terminal: Terminal, plain: list[str], undisturbed: Path
) -> None:
    terminal.names["SHARDS"] = signaling(plain, Path.cwd(), "TERM")
    _, same = commands("The driver was killed")
    assert terminal.here(same)[0] == 3
    for part in Path("run/moments").glob("part-*"):
        part.unlink()
    status, output = terminal.here(same)
    assert status == 2
    assert "no such file" in output
    shutil.rmtree("run/moments")
    assert terminal.here(same)[0] == 0
    assert_complete(terminal, undisturbed)
    for file in ("patterns.parquet", "progress.json"):
        Path("run", file).unlink()
    shutil.rmtree("run/moments")
    *_, explain, report = blocks("The run's life")[1]
    for line in (same, explain, report):
        assert terminal.here(line)[0] == 0


def versions() -> str:
    return str(json.loads(Path("run/manifest.json").read_text())["versions"]["patternnet-ray"])


@pytest.mark.slow
def test_fit_is_resumed_by_another_version_and_by_the_first_one(
    terminal: Terminal, plain: list[str], undisturbed: Path
) -> None:
    strikes = [SIGNALING.format(once=Path.cwd() / f"signaled-{n}", signal="TERM", shard=plain[n]) for n in (1, 2)]
    terminal.names["SHARDS"] = given([plain[0], *strikes, plain[3]])
    version, same = commands("Upgrade")
    assert terminal.here(same)[0] == 3
    own = versions()
    newer = replace(terminal, env=other_version(Path.cwd() / "newer"))
    status, output = newer(version, f"{same} --workers 0")
    assert status == 3, output
    assert output.startswith("patternnet 9.9")
    assert versions() == "9.9"
    assert terminal.here(same)[0] == 0
    assert versions() == own
    assert_complete(terminal, undisturbed)
