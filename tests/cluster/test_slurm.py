"""The Slurm script, on a real Slurm: three tasks, each a node of Ray."""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local import ROOT
from cluster.processes import processes
from ray_jobs.config import ExplainConfig, Resources
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.jobs.fit.fit import fit
from tests.cluster.slurm import Slurm, missing
from tests.conftest import make_shards
from tests.ray_jobs.runs import LATE, OPTIONS, assert_same_patterns, make_fit_config

SCRIPT = ROOT / "cluster" / "slurm" / "patternnet.sbatch"

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with Slurm(folder) as slurm:
            slurm.environment["PATTERNNET_ENV"] = str(Path(sys.executable).parents[1])
            yield slurm
    finally:
        shutil.rmtree(folder)


def sbatch(slurm: Slurm, folder: Path, *arguments: object, wait: bool = True) -> tuple[int, str]:
    """Submit the script with three tasks; return its exit status and log, or the output of sbatch without `wait`."""
    command = ["sbatch", *(["--wait"] if wait else []), "--parsable", "--ntasks=3", "--ntasks-per-node=3"]
    command += ["--cpus-per-task=1", f"--output={folder}/log", str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, env=slurm.environment, capture_output=True, text=True, check=False, timeout=240)
    log = folder / "log"
    return done.returncode, log.read_text() if wait and log.exists() else done.stdout + done.stderr


@pytest.mark.slow
def test_results_on_slurm_equal_those_of_one_process_and_no_process_is_left(
    slurm: Slurm, model_spec: str, tmp_path: Path
) -> None:
    shards = [str(path) for path in make_shards(tmp_path / "shards", 4, 4)]
    here, there = tmp_path / "here", tmp_path / "there"
    config = make_fit_config(model_spec, shards, here)
    fit(config, Resources(workers=0))
    explain(
        ExplainConfig(model=config.model, patterns=str(here), shards=tuple(shards), out=str(here)), Resources(workers=0)
    )

    given = ["--shards", f"{tmp_path}/shards/train-{{000..003}}.tar", "--batch-size", "4"]
    status, log = sbatch(slurm, tmp_path, "fit", "--model", model_spec, *given, "--out", there, *OPTIONS)
    assert status == 0, log
    assert "fit: 16 samples of 4 shards, 0 rejected" in log
    assert_same_patterns(here, there)
    status, log = sbatch(slurm, tmp_path, "explain", "--patterns", there, *given)
    assert status == 0, log
    for mine in sorted((here / "explanations").glob("*.tar")):
        assert mine.read_bytes() == (there / "explanations" / mine.name).read_bytes()

    slurm.until(lambda: not slurm.output("squeue", "--noheader"))
    assert not [p for p in processes() if "/tmp/ray-1-" in p.title or "/tmp/ray-2-" in p.title]
    assert not list(Path("/tmp").glob("ray-[12]-[012]"))


@pytest.mark.slow
def test_status_of_the_job_is_that_of_the_program(slurm: Slurm, tmp_path: Path) -> None:
    out = tmp_path / "run"
    status, log = sbatch(
        slurm, tmp_path, "fit", "--model", "none:none", "--shards", tmp_path / "none.tar", "--out", out
    )
    assert status == 2
    assert f"patternnet: {tmp_path}/none.tar: the shard does not exist" in log


@pytest.mark.slow
def test_job_out_of_time_commits_and_is_requeued_and_resumed(slurm: Slurm, model_spec: str, tmp_path: Path) -> None:
    shards = [str(path) for path in make_shards(tmp_path / "shards", 3, 4)]
    late = [LATE.format(gate=tmp_path / "gate", shard=shard) for shard in shards[1:]]
    out, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    given = [word for shard in (shards[0], *late) for word in ("--shards", shard)]
    given += ["--allow-pipes", "--out", str(out), "--batch-size", "4", "--workers", "1", "--max-loss", "0s", *OPTIONS]
    status, job = sbatch(slurm, tmp_path, "fit", "--model", model_spec, *given, wait=False)
    assert status == 0, job
    number = job.strip()

    def job_shows(what: str) -> bool:
        return what in slurm.output("scontrol", "show", "job", number)

    slurm.until(lambda: any((out / "moments").glob("part-*")), within=120)  # of the first shard
    slurm.output("scancel", "--batch", "--signal=TERM", number)  # Slurm sends it two minutes before the time limit
    time.sleep(2)
    (tmp_path / "gate").touch()
    slurm.until(lambda: job_shows("Restarts=1"), within=120)
    assert "stopped with 1 of 3 shards left" in (tmp_path / "log").read_text()
    slurm.until(lambda: job_shows("JobState=COMPLETED"), within=400)
    assert "fit: 12 samples of 3 shards, 0 rejected" in (tmp_path / "log").read_text()
    fit(make_fit_config(model_spec, shards, undisturbed), Resources(workers=0))
    assert_same_patterns(out, undisturbed)


def test_sbatch_accepts_the_script_and_rejects_broken_copies(slurm: Slurm, tmp_path: Path) -> None:
    def taken(script: Path) -> bool:
        command = ["sbatch", "--test-only", str(script), "plan"]
        return subprocess.run(command, env=slurm.environment, capture_output=True, check=False).returncode == 0

    assert taken(SCRIPT)
    for found, broken in (
        ("--ntasks-per-node=1", "--ntasks-per-node=some"),
        ("#SBATCH --requeue", "#SBATCH --requeues"),
    ):
        copy = tmp_path / "broken.sbatch"
        copy.write_text(SCRIPT.read_text().replace(found, broken))
        assert not taken(copy), broken


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck: apt-get install shellcheck")
def test_shellcheck_accepts_the_script_and_rejects_broken_copies(tmp_path: Path) -> None:
    def taken(script: Path) -> bool:
        return subprocess.run(["shellcheck", str(script)], capture_output=True, check=False).returncode == 0

    assert taken(SCRIPT)
    for found, broken in (
        ('mkdir -m 700 "$TEMP-$SLURM_PROCID"', "mkdir -m 700 $TEMP-$SLURM_PROCID"),
        ("done\n", ""),
        ('"$@"', "$@"),
    ):
        copy = tmp_path / "broken.sbatch"
        copy.write_text(SCRIPT.read_text().replace(found, broken))
        assert not taken(copy), broken


def test_script_requires_a_token_and_keeps_its_files_private() -> None:
    text = SCRIPT.read_text()
    assert "RAY_AUTH_MODE=token" in text
    assert 'mkdir -m 700 "$TEMP-$SLURM_PROCID"' in text
    assert "srun" in text
    assert all("--no-kill" in line for line in text.splitlines() if line.startswith("srun") and "bash -c node" in line)
