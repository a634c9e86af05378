"""The traced network that a run keeps for later commands."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from patterns import UserError
from patterns.io import load_network
from ray_jobs.config import ExplainConfig, FitConfig, ModelConfig, Resources
from ray_jobs.io.object_store import locate
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.models import loading, network_cache
from ray_jobs.runs.run_folder import Run
from tests.conftest import MODEL as MODEL_CODE

pytestmark = pytest.mark.full

HERE = Resources(workers=0)
SPEC = "torchvision:squeezenet1_1"
MODEL = ModelConfig(spec=SPEC, weights="random", image_size=32, resize=32)


def fit_config(shards: list[str], out: object, **options: Any) -> FitConfig:
    return FitConfig(model=ModelConfig(**{**vars(MODEL), **options}), shards=tuple(shards[:2]), out=str(out))


def explain_config(fitted: FitConfig, out: object) -> ExplainConfig:
    return ExplainConfig(model=fitted.model, shards=fitted.shards, patterns=fitted.out, out=str(out), outputs=("npy",))


def kept(folder: object) -> list[str]:
    return [name for name in locate(str(folder)).entries() if name.startswith(network_cache.PREFIX)]


@pytest.fixture(scope="module")
def fitted(shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> FitConfig:
    config = fit_config(shards, tmp_path_factory.mktemp("fitted") / "run")
    fit(config, HERE)
    return config


@pytest.fixture
def copied(fitted: FitConfig, tmp_path: Path) -> FitConfig:
    """The same run in a folder of this test."""
    subprocess.run(["cp", "-r", fitted.out, str(tmp_path / "run")], check=True)
    return FitConfig(model=fitted.model, shards=fitted.shards, out=str(tmp_path / "run"))


@pytest.fixture
def traced_specs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The specs of the models that are traced."""
    found: list[str] = []
    trace = loading.trace

    def record(*arguments: Any, **options: Any) -> Any:
        found.append(options["name"])
        return trace(*arguments, **options)

    monkeypatch.setattr(loading, "trace", record)
    return found


def read_maps(run: Run) -> dict[str, np.ndarray]:
    found = {}
    for path in sorted(Path(str(run.folder)).glob("explanations/*.tar")):
        with subprocess.Popen(["tar", "-xOf", str(path)], stdout=subprocess.PIPE) as process:
            found[path.name] = np.frombuffer(process.communicate()[0], np.uint8)
    return found


def test_later_commands_read_the_network_and_give_bit_equal_maps(
    copied: FitConfig, traced_specs: list[str], tmp_path: Path
) -> None:
    (name,) = kept(copied.out)
    read = explain(explain_config(copied, tmp_path / "read"), HERE)
    assert traced_specs == []
    (Path(copied.out) / name).unlink()
    traced = explain(explain_config(copied, tmp_path / "traced"), HERE)
    assert traced_specs == [SPEC]
    assert kept(traced.folder) == [name]
    found, expected = read_maps(read), read_maps(traced)
    assert len(found) == 2
    assert {key: value.tobytes() for key, value in found.items()} == {k: v.tobytes() for k, v in expected.items()}


def test_a_fit_by_a_read_network_gives_bit_equal_patterns(
    fitted: FitConfig, copied: FitConfig, traced_specs: list[str]
) -> None:
    out = Path(copied.out)
    for path in (out / "manifest.json", out / "patterns.safetensors"):
        path.unlink()
    subprocess.run(["rm", "-r", str(out / "moments")], check=True)
    fit(copied, HERE)
    assert traced_specs == []
    found, expected = (load_file(f"{each}/patterns.safetensors") for each in (out, fitted.out))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("damage", ["truncated", "one byte", "other tensors", "another model"])
def test_a_file_that_is_not_the_network_is_ignored_and_rewritten(
    copied: FitConfig, traced_specs: list[str], capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    (name,) = kept(copied.out)
    path = Path(copied.out) / name
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "one byte":
        path.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    elif damage == "other tensors":
        save_file({"weight": torch.ones(3)}, path)
    else:
        other = loading.open_model(ModelConfig(**{**vars(MODEL), "seed": 1})).traced
        other.store(locate(copied.out))
        (written,) = kept(copied.out)
        (Path(copied.out) / written).rename(path)
        traced_specs.clear()
    explain(explain_config(copied, copied.out), HERE)
    assert traced_specs == [SPEC]
    logged = capsys.readouterr().err
    assert re.search(rf"^explain: {path} is ignored: .*; the model is traced again$", logged, re.M)
    assert path.read_bytes() == content
    explain(explain_config(copied, copied.out), HERE)
    assert traced_specs == [SPEC]


def test_all_that_the_network_depends_on_is_in_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(1)}, weights)
    key = network_cache.make_key(MODEL)
    for option, value in {
        "spec": "torchvision:alexnet", "seed": 1, "image_size": 33, "mean": (0.1,) * 3, "precision": "float64",
        "pass_through": ("gelu",), "strip_softmax": True, "output": "1", "weights": "default",
    }.items():  # fmt: skip
        assert network_cache.make_key(ModelConfig(**{**vars(MODEL), option: value})) != key, option
    by_file = ModelConfig(**{**vars(MODEL), "weights": str(weights)})
    before = network_cache.make_key(by_file)
    moved = weights.rename(tmp_path / "moved.safetensors")
    assert network_cache.make_key(ModelConfig(**{**vars(MODEL), "weights": str(moved)})) == before
    save_file({"a": torch.ones(1)}, weights)
    assert network_cache.make_key(by_file) != before
    monkeypatch.setattr(network_cache, "find_version", lambda name: "9" if name == "torch" else "1")
    assert network_cache.make_key(MODEL) != key
    weights.unlink()
    with pytest.raises(UserError, match="it does not exist"):
        network_cache.make_key(by_file)


def test_a_changed_option_replaces_the_file(fitted: FitConfig, copied: FitConfig) -> None:
    (name,) = kept(copied.out)
    other = loading.open_model(ModelConfig(**{**vars(MODEL), "image_size": 40, "resize": 40}), locate(copied.out))
    other.traced.store(locate(copied.out))
    (replaced,) = kept(copied.out)
    assert replaced != name
    assert load_network(Path(copied.out) / replaced)[0].input_shape == (3, 40, 40)


def test_the_code_of_a_user_is_traced_by_each_command(
    shards: list[str], tmp_path: Path, traced_specs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").write_text(MODEL_CODE)
    spec = f"{tmp_path / 'own.py'}:small"
    model = ModelConfig(spec=spec, image_size=16, resize=16)
    config = FitConfig(model=model, shards=tuple(shards[:1]), out=str(tmp_path / "run"))
    fit(config, HERE)
    assert kept(config.out) == []
    assert f"fit: {spec} is traced by every command, because its code" in capsys.readouterr().err
    explain(explain_config(config, config.out), HERE)
    assert traced_specs == [spec] * 2


def test_a_network_without_a_form_in_files_is_traced_by_each_command(
    copied: FitConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise TypeError("the operation mine::twice is not one of torch's own")

    monkeypatch.setattr(network_cache, "save_network", fail)
    model = loading.open_model(MODEL, locate(copied.out).parent)  # where there is none
    (line,) = model.traced.store(locate(copied.out).parent)
    assert line == (
        "the traced network is not kept for later commands: the operation mine::twice is not one of torch's own"
    )


def test_a_run_in_a_store_keeps_the_network(
    copied: FitConfig, traced_specs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    url = "memory://kept"
    store = fsspec.filesystem("memory")
    store.put(copied.out, "/kept", recursive=True)
    remote = FitConfig(model=copied.model, shards=copied.shards, out=url)
    (name,) = kept(url)
    explain(explain_config(remote, url), HERE)
    assert traced_specs == []
    content = store.cat_file(f"/kept/{name}")
    store.pipe_file(f"/kept/{name}", content[:-1])
    shards = tuple(reversed(copied.shards))
    explain(explain_config(FitConfig(model=copied.model, shards=shards, out=url), "memory://other"), HERE)
    assert traced_specs == [SPEC]
    assert f"{url}/{name} is ignored" in capsys.readouterr().err
    assert store.cat_file(f"/other/{name}") == content


def test_a_resumed_command_imports_neither_the_compiler_nor_the_library_of_the_model(
    copied: FitConfig, tmp_path: Path
) -> None:
    given = [word for shard in copied.shards for word in ("--shards", shard)]
    command = ["explain", "--patterns", copied.out, *given, "--workers", "0", "--output", "npy"]
    program = (
        "import json, sys\n"
        "from ray_jobs.cli.app import exit_status\n"
        "status = exit_status(sys.argv[1:])\n"
        "print(json.dumps([status, list(sys.modules)]))\n"
    )
    out = ["--out", str(tmp_path / "explained")]
    printed = subprocess.run([sys.executable, "-c", program, *command, *out], capture_output=True, text=True)
    status, imported = json.loads(printed.stdout.splitlines()[-1])
    assert status == 0, printed.stderr
    assert (tmp_path / "explained" / "explanations.parquet").exists()
    assert "torch" in imported
    # `import torch` itself imports a part of torch.export, without the module that traces.
    unwanted = {"torch._dynamo", "torch.export._trace", "torch._inductor", "torchvision", "timm"}
    assert not unwanted & set(imported)
