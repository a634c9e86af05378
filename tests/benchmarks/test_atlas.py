"""The reduction of an atlas of many simulated samples needs little memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAMPLES = 100_000


@pytest.mark.slow
def test_memory_of_a_large_reduction_is_below_a_gibibyte() -> None:
    command = [sys.executable, "-m", "benchmarks.atlas", "--one", str(SAMPLES)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["samples"] == SAMPLES
    assert found["peak"] - found["before"] < 1024  # MiB, beyond the libraries and the simulation
