import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each file of patterns/ may import only those before it.
ORDER = [
    "errors", "winograd", "compiled", "operators", "windows", "draft", "digests", "inputs", "endings", "probing",
    "rectifiers", "unify", "lift", "hold", "graph", "moments",
    "patches", "sampled", "observe", "estimators", "convergence", "pilot", "rho", "scales", "rules", "baselines",
    "reference", "methods", "degradation", "pictures", "tensors", "storage", "explain", "attribution", "adapters",
    "losses", "linear_model", "critics",
]  # fmt: skip
FORBIDDEN = {"explain": {"estimators", "moments"}}


def imported(path: Path) -> Iterator[str]:
    """The full names of the modules that a file imports anywhere; of `from a import b`, both a and a.b."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def siblings(path: Path) -> set[str]:
    """The files of its own package that a file imports."""
    package = path.parent.name
    stems = {p.stem for p in path.parent.glob("*.py")}
    found = {name.split(".")[1] for name in imported(path) if name.startswith(f"{package}.")}
    return found & stems


def test_every_file_of_patterns_has_its_place_in_the_order() -> None:
    assert sorted(ORDER) == sorted(p.stem for p in (ROOT / "patterns").glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("name", ORDER)
def test_inside_patterns_imports_go_one_way(name: str) -> None:
    found = siblings(ROOT / "patterns" / f"{name}.py")
    assert found <= set(ORDER[: ORDER.index(name)])
    assert not found & FORBIDDEN.get(name, set())


def test_the_imports_of_a_file_are_found_in_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "patterns"
    package.mkdir()
    for name in ("a", "b", "c", "d", "e"):
        (package / f"{name}.py").touch()
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    lines = "import patterns.a", "from patterns.b import x", "from patterns import c", "def f():\n from .d import y"
    (package / "e.py").write_text("\n".join(lines))
    assert siblings(package / "e.py") == {"a", "b", "c", "d"}


@pytest.mark.parametrize("name", ["__init__", *ORDER])
def test_patterns_knows_neither_jobs_nor_cluster(name: str) -> None:
    roots = {module.split(".")[0] for module in imported(ROOT / "patterns" / f"{name}.py")}
    assert not roots & {"ray", "ray_jobs", "webdataset", "cluster", "torchvision", "timm", "fsspec"}


@pytest.mark.parametrize(("name", "loads"), [("patterns", []), ("ray_jobs.cli", ["webdataset"])])
def test_what_is_slow_or_of_no_use_to_a_notebook_is_not_imported(name: str, loads: list[str]) -> None:
    heavy = {"ray", "webdataset", "zennit", "torchvision", "torch._dynamo", "sympy", "pandas", "matplotlib"}
    code = f"import sys, {name}; print(sorted(set(sys.modules) & {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(loads)


def loaded_with(name: str) -> set[str]:
    """The root packages that a file of ray_jobs imports, itself or through others of ray_jobs."""
    seen: set[str] = set()
    todo, roots = [name], set()
    while todo:
        current = todo.pop()
        seen.add(current)
        path = ROOT / "ray_jobs" / f"{current}.py"
        roots |= {module.split(".")[0] for module in imported(path)}
        todo += sorted(siblings(path) - seen)
    return roots


@pytest.mark.parametrize("name", ["pool", "ledger"])
def test_pool_and_ledger_know_nothing_of_torch_nor_of_patterns(name: str) -> None:
    if not (ROOT / "ray_jobs" / f"{name}.py").exists():
        pytest.skip("not written yet")
    heavy = {"torch", "torchvision", "patterns", "safetensors.torch"}
    assert not loaded_with(name) & heavy


def test_what_importing_patterns_gives_is_what_it_says() -> None:
    """No function is hidden by the module that it comes from, nor hides it."""
    code = "import sys, patterns; print([n for n in patterns.__all__ if f'patterns.{n}' in sys.modules or not callable("
    code += "getattr(patterns, n))])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['CHOICES', 'ESTIMATORS', 'METHODS']"
