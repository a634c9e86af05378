"""Fixtures of the jobs: a finished fit that tests read and do not change."""

import pytest

from ray_jobs.config import FitConfig, ModelConfig, Resources
from ray_jobs.jobs.fit.fit import fit
from tests.ray_jobs.runs import PREPROCESSING


@pytest.fixture(scope="session")
def model(model_spec: str) -> ModelConfig:
    """The config of the small model for 16×16 images."""
    return ModelConfig(spec=model_spec, **PREPROCESSING)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def fitted(model: ModelConfig, shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a finished fit over all shards."""
    out = str(tmp_path_factory.mktemp("fitted") / "run")
    return str(fit(FitConfig(model=model, shards=tuple(shards), out=out), Resources(workers=0)).folder)
