"""Fits whose decoding processes are killed, or whose decoder ends, blocks or fails at random samples.

Only workers with a GPU decode in processes, so the number of processes is set here. The id of a trial holds its seed:
`pytest -m '' 'tests/ray_jobs/test_decoding_chaos.py::NAME[seed-17]'` repeats it.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.config import FitConfig, Resources
from ray_jobs.engine import shard_worker
from ray_jobs.io.process_pool import ATTEMPTS, ProcessPool
from ray_jobs.jobs.fit.fit import fit
from tests.conftest import write_tar
from tests.ray_jobs.runs import assert_same_patterns, make_fit_config

SHARDS, SAMPLES = 4, 40
STRIKES = ATTEMPTS  # an item is given up after one more
HERE = Resources(workers=0, max_bad_fraction=1.0)
DECODER = """
import os, signal, time
import numpy as np

def decode(sample):
    time.sleep(0.005)
    trouble, number = (int(word) for word in sample["plan"].decode().split("/"))
    if trouble == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if trouble == 2:
        time.sleep(1000)
    if trouble == 3:
        raise ValueError("planted")
    return np.random.default_rng(number).random((3, 16, 16), np.float32)
"""


def seeds(count: int, quick: int = 0) -> list[Any]:
    """Return the seeds of trials; all but the first ones belong to the soak."""
    return [
        pytest.param(seed, marks=pytest.mark.full if seed < quick else pytest.mark.slow, id=f"seed-{seed}")
        for seed in range(count)
    ]


def write_shards(folder: Path, troubles: dict[int, int]) -> list[str]:
    """Write shards whose samples have a trouble of the decoder, by the number of the sample; 0: none."""
    shards = []
    for first in range(0, SHARDS * SAMPLES, SAMPLES):
        samples: list[dict[str, object]] = [
            {"__key__": f"{n}", "plan": f"{troubles.get(n, 0)}/{n}".encode()} for n in range(first, first + SAMPLES)
        ]
        shards.append(str(write_tar(folder / f"{first}.tar", samples)))
    return shards


@pytest.fixture
def make_config(model_spec: str, tmp_path: Path) -> Callable[[Sequence[str], str], FitConfig]:
    (tmp_path / "decoder.py").write_text(DECODER)

    def make(shards: Sequence[str], name: str) -> FitConfig:
        config = make_fit_config(model_spec, list(shards), tmp_path / name)
        return replace(config, model=replace(config.model, decoder=f"{tmp_path / 'decoder.py'}:decode"))

    return make


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[ProcessPool]:
    """The pools of decoding processes of the workers that are started: two processes for each worker."""
    made: list[ProcessPool] = []

    def make(processes: int, module: str) -> ProcessPool:
        made.append(ProcessPool(processes, module, timeout=20.0))
        return made[-1]

    monkeypatch.setattr(shard_worker, "ProcessPool", make)
    monkeypatch.setattr(shard_worker.WorkerResources, "decoders", 2)
    return made


def strike(pools: list[ProcessPool], rng: random.Random, ended: threading.Event, struck: list[int]) -> None:
    """Kill decoding processes, or the server that forks them, at random times until the fit has ended."""
    while len(struck) < STRIKES and not ended.is_set():
        time.sleep(rng.uniform(0, 0.15))
        running = [process for pool in pools for process in pool.running if process]  # 0: it is not known yet
        if rng.random() < 0.2:
            running = [pool._server.process.pid for pool in pools if pool._server.process is not None and running]
        if running:
            victim = rng.choice(running)
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                struck.append(victim)


@pytest.mark.parametrize("seed", seeds(12, quick=1))
def test_fit_with_killed_decoding_processes_has_the_patterns_of_an_undisturbed_fit(
    make_config: Callable[..., FitConfig], pools: list[ProcessPool], tmp_path: Path, seed: int
) -> None:
    shards, ended, struck = write_shards(tmp_path / "shards", {}), threading.Event(), list[int]()
    expected = fit(make_config(shards, "expected"), HERE)
    pools.clear()
    thread = threading.Thread(target=strike, args=(pools, random.Random(seed), ended, struck))
    thread.start()
    try:
        run = fit(make_config(shards, "run"), HERE)
    finally:
        ended.set()
        thread.join()
    assert struck
    section = run.manifest()["fit"]
    assert (section["samples"], section["refused"], section["missing"]) == (SHARDS * SAMPLES, 0, {})
    assert_same_patterns(Path(str(run.folder)), Path(str(expected.folder)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", seeds(6))
def test_decoder_that_ends_blocks_or_fails_costs_only_its_samples(
    make_config: Callable[..., FitConfig], pools: list[ProcessPool], tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    planted = {n: rng.choice([1, 2, 3, 3]) for n in rng.sample(range(SHARDS * SAMPLES), 4)}
    sound = write_shards(tmp_path / "sound", {})
    (tmp_path / "planted.txt").write_text("".join(f"{sound[n // SAMPLES]}\t{n}\n" for n in planted))
    without = replace(make_config(sound, "expected"), without_keys=str(tmp_path / "planted.txt"))
    expected = fit(without, HERE)
    run = fit(make_config(write_shards(tmp_path / "shards", planted), "run"), HERE)
    reasons = {int(each.key): each.reason for each in run.read_quarantine("fit")}
    assert reasons.keys() == planted.keys()
    causes = {1: "killed or crashed", 2: "no result after", 3: "the decoder failed (ValueError: planted"}
    assert all(causes[trouble] in reasons[n] for n, trouble in planted.items())
    assert run.manifest()["fit"]["samples"] == SHARDS * SAMPLES - len(planted)
    assert_same_patterns(Path(str(run.folder)), Path(str(expected.folder)))
