"""Jobs that reject samples: status 2 at the end and when called again, with the reason."""

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


@pytest.fixture(params=["fit", "explain", "degrade", "quality"])
def job(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def command(job: str, model_spec: str, fitted: str, tmp_path: Path) -> Callable[[int, int], list[str]]:
    """Return a function from numbers of good and bad samples to the command of a job over a shard with them."""

    def build(good: int, bad: int) -> list[str]:
        images = [jpeg(np.random.default_rng(i)) for i in range(good)] + [b"no image"] * bad
        samples = [{"__key__": f"bad-{i}", "jpg": data} for i, data in enumerate(images)]
        shard = str(write_tar(tmp_path / "bad.tar", samples))
        (good_shard,) = make_shards(tmp_path / "other", 1, 6, seed=9)
        options = {
            "fit": ["--model", model_spec, *OPTIONS],
            "quality": ["--patterns", fitted, "--evaluate", good_shard],
            "degrade": ["--patterns", fitted, "--steps", "2"],
            "explain": ["--patterns", fitted, "--methods", "gradient"],
        }
        out = str(tmp_path / "out")
        return [job, "--shards", shard, *options[job], "--out", out, "--workers", "0", "--max-bad-fraction"]

    return build


def read_status(folder: Path, job: str) -> str:
    return json.loads((folder / "out" / "manifest.json").read_text())[job]["status"]


@pytest.mark.full
def test_job_that_used_no_sample_fails_whatever_is_allowed(
    job: str, command: Callable[[int, int], list[str]], tmp_path: Path, complaint: Complaint
) -> None:
    words = [*command(0, 3), "1"]
    for _ in range(2):  # the second call has no shards left
        line = complaint(*words)
        assert "none of the 3 samples" in line
        assert "bad-0: not an image" in line
    assert len(pq.read_table(tmp_path / "out" / "quarantine.parquet")) == 3
    assert read_status(tmp_path, job) == "begun"


@pytest.mark.full
def test_rejected_fraction_of_few_samples_is_checked_at_the_end(
    job: str, command: Callable[[int, int], list[str]], tmp_path: Path, complaint: Complaint
) -> None:
    words = command(6, 4)
    for _ in range(2):
        assert "4 of 10 samples were rejected" in complaint(*words, "0.3")
    assert exit_status([*words, "0.4"]) == 0
    assert read_status(tmp_path, job) == "complete"
    assert exit_status([*words, "0.4"]) == 0
