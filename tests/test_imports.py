"""What an import of a package loads, what names it gives, and how long a file may be.

The contracts between packages are in pyproject.toml.
"""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

MAX_LINES = 400
ROOT = Path(__file__).parents[1]
LARGE = {"torch", "pyarrow", "fsspec", "numpy"}


@pytest.mark.full
@pytest.mark.parametrize(("name", "loads"), [("patterns", []), ("ray_jobs.cli.app", [])])
def test_import_loads_no_slow_library(name: str, loads: list[str]) -> None:
    heavy = {"ray", "webdataset", "zennit", "torchvision", "torch._dynamo", "sympy", "pandas", "matplotlib"}
    heavy |= {"huggingface_hub", "onnx", "onnxscript", "onnxruntime", "mlflow", "wandb", "trackio", "transformers"}
    code = f"import sys, {name}; print(sorted(set(sys.modules) & {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(loads)


@pytest.mark.full
@pytest.mark.parametrize("code", ["import patterns", "import patterns.io", "from ray_jobs.cli import app",
                                  "from ray_jobs.cli.app import exit_status; exit_status(['--help'])"])  # fmt: skip
def test_large_libraries_are_not_imported_before_they_are_needed(code: str) -> None:
    code = f"import sys; {code}; print(set(sys.modules) & {LARGE}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "set()"


@pytest.mark.full
@pytest.mark.parametrize("name", ["patterns", "patterns.io"])
def test_every_public_name_can_be_imported(name: str) -> None:
    module = importlib.import_module(name)
    assert set(module.__all__) <= set(dir(module))
    assert all(getattr(module, each) is not None for each in module.__all__)
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        module.absent  # noqa: B018


@pytest.mark.full
def test_public_names_are_not_hidden_by_modules() -> None:
    """Neither a function hides the module that it comes from, nor a module the function."""
    code = "import sys, patterns; print([n for n in patterns.__all__ if f'patterns.{n}' in sys.modules or not callable("
    code += "getattr(patterns, n))])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['CHOICES', 'ESTIMATORS', 'METHODS', 'PRESETS']"


def test_no_python_file_has_more_than_400_lines() -> None:
    folders = ("patterns", "ray_jobs", "cluster", "benchmarks", "docs", "tests")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    lengths = {str(file.relative_to(ROOT)): file.read_bytes().count(b"\n") for file in files}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}
