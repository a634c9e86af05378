"""Jobs that reject their samples: status 2 at their end and at every further call, with the reason."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ray_jobs.cli.app import exit_status
from tests.conftest import jpeg, make_shards, write_tar
from tests.ray_jobs.runs import OPTIONS

Complaint = Callable[..., str]


@pytest.fixture(scope="module")
def fitted(model_spec: str, shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("fitted") / "run")
    given = [word for shard in shards[:2] for word in ("--shards", shard)]
    assert exit_status(["fit", "--model", model_spec, *given, "--out", out, "--workers", "0", *OPTIONS]) == 0
    return out


def shard(path: Path, good: int, bad: int) -> str:
    images = [jpeg(np.random.default_rng(i)) for i in range(good)] + [b"no image"] * bad
    return str(write_tar(path, [{"__key__": f"{path.stem}-{i}", "jpg": data} for i, data in enumerate(images)]))


def command(job: str, model: str, fitted: str, bad: str, other: str) -> list[str]:
    """A job over one shard; quality needs another one, which is sound."""
    if job == "fit":
        return ["fit", "--model", model, "--shards", bad, *OPTIONS]
    words = [job, "--patterns", fitted, "--shards", bad]
    extra = {"quality": ["--evaluate", other], "degrade": ["--steps", "2"], "explain": ["--methods", "gradient"]}
    return [*words, *extra[job]]


@pytest.mark.parametrize("job", ["fit", "explain", "degrade", "quality"])
def test_a_job_that_used_no_sample_fails_whatever_is_allowed(
    job: str, model_spec: str, fitted: str, tmp_path: Path, complaint: Complaint
) -> None:
    (other,) = make_shards(tmp_path / "other", 1, 6, seed=9)
    words = command(job, model_spec, fitted, shard(tmp_path / "bad.tar", 0, 3), other)
    words += ["--out", str(tmp_path / "out"), "--workers", "0", "--max-bad-fraction", "1"]
    for _ in range(2):  # the second finds nothing left to do
        said = complaint(*words)
        assert "none of the 3 samples" in said
        assert "bad-0: not an image" in said
    assert len(pq.read_table(tmp_path / "out" / "quarantine.parquet")) == 3
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())[job]["status"] == "begun"


@pytest.mark.parametrize("job", ["fit", "explain", "degrade", "quality"])
def test_small_data_are_judged_at_the_end(
    job: str, model_spec: str, fitted: str, tmp_path: Path, complaint: Complaint
) -> None:
    (other,) = make_shards(tmp_path / "other", 1, 6, seed=9)
    words = command(job, model_spec, fitted, shard(tmp_path / "bad.tar", 6, 4), other)
    words += ["--out", str(tmp_path / "out"), "--workers", "0", "--max-bad-fraction"]
    for _ in range(2):
        assert "4 of 10 samples were rejected" in complaint(*words, "0.3")
    assert exit_status([*words, "0.4"]) == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())[job]["status"] == "complete"
    assert exit_status([*words, "0.4"]) == 0
