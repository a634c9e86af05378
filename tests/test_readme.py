"""The README's notebook runs as it stands."""

import re
from pathlib import Path

import torch

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
