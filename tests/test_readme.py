"""The code in the documents runs as it stands."""

import re
from pathlib import Path
from typing import Any

import torch

from ray_jobs.config import ExplainConfig, FitConfig, ModelConfig, Resources
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.models.factories import own_model
from tests.ray_jobs.runs import PREPARED

README = Path(__file__).parents[1] / "README.md"


def test_the_notebook_of_the_readme_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 2
    code = "\n".join(blocks).replace('weights="DEFAULT"', "weights=None").replace("224, 224", "32, 32")
    torch.manual_seed(0)
    given = {name: [torch.randn(3, 3, 32, 32)] for name in ("batches", "more_batches", "batches_b", "batches_c")}
    scope: dict[str, object] = {**given, "folder": tmp_path, "images": torch.randn(2, 3, 32, 32)}
    exec(code, scope)
    assert scope["explanation"].maps["patternattribution"].shape == (2, 3, 32, 32)  # type: ignore[attr-defined]
    assert set(scope["rho"]) == {"linear", "two-component"}  # type: ignore[call-overload]


def test_the_code_of_the_page_on_explanations_runs(model_spec: str, shards: list[str], tmp_path: Path) -> None:
    model_config = ModelConfig(spec=model_spec, **PREPARED)  # type: ignore[arg-type]
    run = fit(FitConfig(model=model_config, shards=tuple(shards[:2]), out=str(tmp_path)), Resources(workers=0)).folder
    explain(
        ExplainConfig(model=model_config, patterns=str(run), shards=(shards[0],), out=str(run)), Resources(workers=0)
    )
    blocks = re.findall(r"```python\n(.*?)```", (README.parent / "docs" / "explanations.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    scope: dict[str, Any] = {
        "shard": shards[0],
        "explanations": str(run / "explanations" / Path(shards[0]).name),
        "run": run,
        "model": own_model(model_spec),
        "images": torch.randn(2, 3, 16, 16),
    }
    exec("\n".join(blocks), scope)
    assert scope["image"].shape == (16, 16, 3)
    assert scope["attribution"].shape == scope["relevance"].shape == (2, 3, 16, 16)
    assert scope["explain_func"](scope["model"], scope["images"], [3, 3]).shape == (2, 1, 16, 16)
