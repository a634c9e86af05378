"""`--compile`: compiled jobs compute what others compute, and wrong modes are rejected before anything is written."""

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from patterns import UserError
from ray_jobs.config import ExplainConfig, Resources
from ray_jobs.data.shard_reader import read_shard
from ray_jobs.engine import shard_worker
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.jobs.fit.fit import fit, merge
from ray_jobs.runs.run_folder import Run
from tests.patterns.networks import relative
from tests.ray_jobs.runs import OPTIONS, make_fit_config

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile with")
HERE, ONE = Resources(workers=0), Resources(workers=1)
METHODS = ("guided-backprop", "patternattribution", "random")
SMALL = ("default",)  # has fewer sums to compile than other estimators
TINY = """
import torch
from torch import nn


def tiny():
    torch.manual_seed(7)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
"""


@pytest.mark.full
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.ray])])
def test_compiled_jobs_compute_what_uncompiled_jobs_compute_and_keep_their_mode(
    ray_of_workers: None, model_spec: str, shards: list[str], tmp_path: Path, workers: int
) -> None:
    resources = Resources(workers=workers, gpus_per_worker=0)
    (tmp_path / "tiny.py").write_text(TINY)
    spec = model_spec if workers else f"{tmp_path}/tiny.py:tiny"
    plain = make_fit_config(spec, shards[:4], tmp_path / "plain", estimators=SMALL)
    plain = replace(plain, model=replace(plain.model, precision="float64"))
    compiled = replace(plain, out=str(tmp_path / "compiled"), compile="default")
    before, after = (load_file(fit(c, resources).folder / "patterns.safetensors") for c in (plain, compiled))
    assert before.keys() == after.keys()
    for name, pattern in before.items():
        assert relative(after[name], pattern) < 1e-6, name
    with pytest.raises(UserError, match="begun with compile default, now None"):
        fit(replace(compiled, compile=None), resources)

    config = ExplainConfig(
        model=plain.model,
        patterns=plain.out,
        shards=plain.shards,
        out=plain.out,
        batch_size=4,
        methods=METHODS,
        target="top-2",
        outputs=("npy",),
    )
    explain(config, resources)
    explain(replace(config, out=str(tmp_path / "explained"), compile="default"), resources)
    folders = [tmp_path / name / "explanations" for name in ("plain", "explained")]
    names = sorted(path.name for path in folders[0].glob("*.tar"))
    assert len(names) == 4
    for name in names:
        for one, other in zip(*(read_shard(str(folder / name)) for folder in folders), strict=True):
            assert one.key == other.key
            for method in METHODS:
                maps = [
                    np.load(io.BytesIO(sample.files[f"{method}.npy"])).astype(np.float64) for sample in (one, other)
                ]
                assert np.linalg.norm(maps[0] - maps[1]) < 2e-3 * np.linalg.norm(maps[0]), (name, method)


@pytest.mark.slow
def test_compiled_and_uncompiled_fits_of_different_shards_merge(
    model_spec: str, shards: list[str], tmp_path: Path
) -> None:
    one = fit(make_fit_config(model_spec, shards[:2], tmp_path / "one", estimators=SMALL), HERE)
    other = fit(make_fit_config(model_spec, shards[2:4], tmp_path / "other", estimators=SMALL, compile="default"), HERE)
    merged = merge([str(one.folder), str(other.folder)], str(tmp_path / "both"), HERE)
    assert merged.manifest()["fit"]["samples"] == 24


def test_what_cannot_be_compiled_is_rejected_before_anything_is_written(
    complaint: Callable[..., str], model_spec: str, shards: list[str], tmp_path: Path
) -> None:
    words = ["fit", "--model", model_spec, "--shards", shards[0], "--out", tmp_path / "run", "--workers", 0, *OPTIONS]
    assert complaint(*words, "--compile", "fast").startswith("patternnet: --compile: no mode 'fast'")
    assert "no worker gets one" in complaint(*words, "--compile", "cudagraphs")
    assert "Leave out --compile or --positions" in complaint(*words, "--compile", "default", "--positions", 4)
    assert not (tmp_path / "run").exists()


def test_a_mode_for_gpus_is_rejected_before_it_is_recorded_if_ray_reports_no_gpu_after_connecting(
    local_ray: None, model_spec: str, shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_fit_config(model_spec, shards[:1], tmp_path / "run", estimators=SMALL)
    explained = ExplainConfig(
        model=config.model,
        patterns=config.out,
        shards=config.shards,
        out=config.out,
        batch_size=4,
        methods=METHODS,
        compile="cudagraphs",
    )
    for job in (lambda: fit(replace(config, compile="cudagraphs"), ONE), lambda: explain(explained, ONE)):
        gpus = iter([None, 0.0])  # unknown before Ray is connected
        monkeypatch.setattr(shard_worker, "worker_gpus", lambda resources, gpus=gpus: next(gpus))
        with pytest.raises(UserError, match="no worker gets one") as error:
            job()
        assert error.value.parameter == "compile"
        fit(config, HERE)
        assert "explain" not in Run(config.out).manifest()


@pytest.mark.slow
def test_a_worker_without_a_compiler_ends_the_job_with_one_line(
    complaint: Callable[..., str], model_spec: str, shards: list[str], tmp_path: Path
) -> None:
    words = ["fit", "--model", model_spec, "--shards", shards[0], "--out", tmp_path / "run", "--workers", 0, *OPTIONS]
    words += ["--estimators", ",".join(SMALL)]
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}):
        assert "g++" in complaint(*words, "--compile", "default")


@pytest.mark.parametrize(
    ("mode", "device", "expected"),
    [
        ("auto", "cuda", ["cudagraphs"]),
        ("auto", "cpu", []),
        (None, "cuda", []),
        ("default", "cpu", ["default"]),
        ("cudagraphs", "cuda", ["cudagraphs"]),
    ],
)
@pytest.mark.parametrize("failure", [None, UserError("", "cannot be recorded", ""), torch.OutOfMemoryError()])
def test_auto_compiles_on_gpus_only_and_accepts_models_that_cannot_be_recorded(
    mode: str | None, device: str, expected: list[str], failure: Exception | None
) -> None:
    modes = []

    class Work:
        def compile(self, batch_size: int, mode: str) -> None:
            modes.append(mode)
            if failure is not None:
                raise failure

    if failure is not None and mode != "auto" and expected:
        with pytest.raises(type(failure)):
            shard_worker.compile_batches(Work(), mode, 8, torch.device(device))
    else:
        shard_worker.compile_batches(Work(), mode, 8, torch.device(device))
    assert modes == expected
