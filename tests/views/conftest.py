"""Runs for the tests of `patternnet report`."""

from pathlib import Path

import numpy as np
import pytest

from ray_jobs.config import FITTED, DegradeConfig, ExplainConfig, FitConfig, ModelConfig, QualityConfig, Resources
from ray_jobs.jobs.degrade import degrade
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.jobs.quality import measure
from ray_jobs.runs.run_folder import Run
from tests.conftest import jpeg, make_shards, write_tar
from tests.ray_jobs.runs import PREPROCESSING
from tests.views.reported import HERE, HOSTILE, METHODS

collect_ignore = ["virelay_reader.py"]  # it runs in an environment of its own


@pytest.fixture(scope="module")
def model(model_spec: str) -> ModelConfig:
    return ModelConfig(spec=model_spec, **PREPROCESSING)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def hostile_shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Shards of samples with malicious keys."""
    rng, folder = np.random.default_rng(5), tmp_path_factory.mktemp("hostile")
    samples = [
        {
            "__key__": f"{number:02d} {HOSTILE[number % 4].replace('/', '')}",
            "jpg": jpeg(rng),
            "cls": b"%d" % (number % 5),
        }
        for number in range(16)
    ]
    samples += [{"__key__": "99 unlabelled", "jpg": jpeg(rng)}, {"__key__": "99 broken", "jpg": b"<img src=x>"}]
    return [str(write_tar(folder / f"{i}.tar", part)) for i, part in enumerate((samples[:9], samples[9:]))]


@pytest.fixture(scope="module")
def run(
    model: ModelConfig, shards: list[str], hostile_shards: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """A run with the results of all jobs."""
    out = str(tmp_path_factory.mktemp("reported") / "whole")
    fit(
        FitConfig(
            model=model,
            shards=tuple(shards),
            out=out,
            batch_size=4,
            estimators=("filter", *FITTED),
            until_converged=1e-3,
        ),
        Resources(workers=0, max_loss=0.0),
    )
    judging = make_shards(Path(out).parent / "judging", 4, 8, seed=9)
    measure(
        QualityConfig(model=model, patterns=out, shards=tuple(judging[:2]), evaluate=tuple(judging[2:]), out=out), HERE
    )
    degrade(
        DegradeConfig(
            model=model, patterns=out, shards=tuple(shards[:2]), out=out, methods=METHODS[1:], patch=4, steps=10
        ),
        HERE,
    )
    return explain(
        ExplainConfig(model=model, patterns=out, shards=tuple(hostile_shards), out=out, methods=METHODS), HERE
    )


@pytest.fixture(scope="module")
def bare(model: ModelConfig, shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with a fit only."""
    return fit(
        FitConfig(model=model, shards=tuple(shards[:3]), out=str(tmp_path_factory.mktemp("reported") / "bare")), HERE
    )
