"""`--precision`: TF32 is used if it is chosen, and only then."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ray_jobs.config import ModelConfig, Resources
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.models import loading
from tests.ray_jobs.runs import PREPROCESSING, assert_same_patterns, make_fit_config


def tf32_allowed() -> list[bool]:
    """Return whether matrix products and convolutions may use TF32."""
    return [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]


@pytest.mark.parametrize("precision", ["float32", "tf32", "float64"])
def test_products_use_float32_unless_tf32_is_chosen(model_spec: str, precision: str) -> None:
    for before in ("tf32", "float32"):
        for each in (before, precision):
            loaded = loading.load(ModelConfig(spec=model_spec, precision=each, **PREPROCESSING))  # type: ignore[arg-type]
        assert tf32_allowed() == [precision == "tf32"] * 2
        assert loaded.dtype == (torch.float64 if precision == "float64" else torch.float32)


@pytest.mark.full
def test_tf32_changes_nothing_on_a_device_without_it(model_spec: str, shards: list[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU: set CUDA_VISIBLE_DEVICES to an empty string")
    config = make_fit_config(model_spec, shards[:3], tmp_path / "one")
    one = fit(config, Resources(workers=0))
    model = ModelConfig(spec=model_spec, precision="tf32", **PREPROCESSING)  # type: ignore[arg-type]
    other = fit(replace(config, model=model, out=str(tmp_path / "other")), Resources(workers=0))
    assert_same_patterns(one.folder, other.folder)
