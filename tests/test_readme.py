"""The Python code in README.md and docs/ runs as it is printed."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_jobs.config import ExplainConfig, FitConfig, ModelConfig, Resources
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.models.factories import load_custom_model
from tests.ray_jobs.runs import PREPROCESSING

pytestmark = pytest.mark.full

README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs"


def python_blocks(page: Path, count: int) -> str:
    """Return the Python code of a page, which has this many blocks of it."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(blocks) == count
    return "\n".join(blocks)


def test_code_of_the_readme_and_of_the_python_page_runs(tmp_path: Path) -> None:
    code = python_blocks(README, 1) + python_blocks(DOCS / "python.md", 2)
    code = code.replace('weights="DEFAULT"', "weights=None").replace("224, 224", "32, 32")
    torch.manual_seed(0)
    batches = {name: [torch.randn(3, 3, 32, 32)] for name in ("batches", "more_batches", "batches_b", "batches_c")}
    scope: dict[str, object] = {**batches, "folder": tmp_path, "images": torch.randn(2, 3, 32, 32)}
    exec(code, scope)
    assert scope["explanation"].maps["patternattribution"].shape == (2, 3, 32, 32)  # type: ignore[attr-defined]
    assert set(scope["rho"]) == {"linear", "two-component"}  # type: ignore[call-overload]


def test_readme_fits_on_two_screens() -> None:
    assert len(README.read_bytes()) <= 6000


def test_code_of_the_explanations_page_runs(model_spec: str, shards: list[str], tmp_path: Path) -> None:
    model_config = ModelConfig(spec=model_spec, **PREPROCESSING)  # type: ignore[arg-type]
    run = fit(FitConfig(model=model_config, shards=tuple(shards[:2]), out=str(tmp_path)), Resources(workers=0)).folder
    explain(
        ExplainConfig(model=model_config, patterns=str(run), shards=(shards[0],), out=str(run)), Resources(workers=0)
    )
    code = python_blocks(DOCS / "explanations.md", 3)
    scope: dict[str, Any] = {
        "shard": shards[0],
        "explanations": str(run / "explanations" / Path(shards[0]).name),
        "run": run,
        "model": load_custom_model(model_spec),
        "images": torch.randn(2, 3, 16, 16),
    }
    exec(code, scope)
    assert scope["image"].shape == (16, 16, 3)
    assert scope["attribution"].shape == scope["relevance"].shape == (2, 3, 16, 16)
    assert scope["explain_func"](scope["model"], scope["images"], [3, 3]).shape == (2, 1, 16, 16)
