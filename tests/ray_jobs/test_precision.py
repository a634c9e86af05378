"""What --precision says of products: TF32 where it is asked for, and never unasked."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ray_jobs.config import ModelConfig, Resources
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.models import loading
from tests.ray_jobs.runs import PREPARED, configured, same_patterns


def products() -> list[bool]:
    """Whether matrix products and convolutions may be taken in TF32."""
    return [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]


@pytest.mark.parametrize("precision", ["float32", "tf32", "float64"])
def test_products_are_exact_unless_tf32_is_asked_for(model_spec: str, precision: str) -> None:
    for before in ("tf32", "float32"):
        for each in (before, precision):
            loaded = loading.load(ModelConfig(spec=model_spec, precision=each, **PREPARED))  # type: ignore[arg-type]
        assert products() == [precision == "tf32"] * 2
        assert loaded.dtype == (torch.float64 if precision == "float64" else torch.float32)


def test_where_there_is_no_tf32_it_changes_nothing(model_spec: str, shards: list[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine may have TF32")
    config = configured(model_spec, shards[:3], tmp_path / "one")
    one = fit(config, Resources(workers=0))
    model = ModelConfig(spec=model_spec, precision="tf32", **PREPARED)  # type: ignore[arg-type]
    other = fit(replace(config, model=model, out=str(tmp_path / "other")), Resources(workers=0))
    same_patterns(one.folder, other.folder)
