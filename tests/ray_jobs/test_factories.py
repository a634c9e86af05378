"""Custom models: wrapped models, files that import others, unusual tensors, and models that cannot be loaded."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from patterns import UserError
from ray_jobs.config import ModelConfig
from ray_jobs.models import loading
from ray_jobs.models.factories import load_custom_model
from ray_jobs.models.modules import cast

NET = """
import torch
from torch import nn


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))
"""
INPUTS = torch.rand(4, 3, 8, 8)

Load = Callable[..., loading.LoadedModel]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Return a function that loads the model that code defines as `made` after NET."""

    def load_code(code: str, precision: str = "float32") -> loading.LoadedModel:
        (tmp_path / "m.py").write_text(NET + code)
        return loading.load(ModelConfig(spec=f"{tmp_path / 'm.py'}:made", precision=precision, image_size=8, resize=8))

    return load_code


WRAPPED = {
    "compiled": "def made(): return torch.compile(net())",
    "parallel": "def made(): return nn.DataParallel(net())",
    "averaged": "def made(): return torch.optim.swa_utils.AveragedModel(net())",
    "several": "def made(): return torch.compile(nn.DataParallel(torch.optim.swa_utils.AveragedModel(net())))",
    "instance": "made = net()",
    "compiled instance": "made = torch.compile(net())",
    "wrapped instance": "made = nn.DataParallel(net())",
    "lambda": "made = lambda: net()",
    "traced by fx": "def made(): return torch.fx.symbolic_trace(net())",
    "exported": """
def made():
    dynamic = ({0: torch.export.Dim("batch")},)
    return torch.export.export(net().eval(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=dynamic).module()""",
    "exported program": """
def made():
    dynamic = ({0: torch.export.Dim("batch")},)
    return torch.export.export(net().eval(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=dynamic)""",
}
FORWARDS = {
    "*args": "def forward(self, *args, **kwargs): return self.m(*args, **kwargs)",
    "x, *args": "def forward(self, x, *args): return self.m(x)",
    "several inputs": "def forward(self, *xs): return self.m(torch.cat(xs))",
    "optional": "def forward(self, x=None, **kwargs): return self.m(x)",
    "keyword only": "def forward(self, *, pixel_values): return self.m(pixel_values)",
    "one required keyword": "def forward(self, *, mask=None, pixels): return self.m(pixels)",
}


@pytest.mark.full
@pytest.mark.cases
@pytest.mark.parametrize("code", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_model_is_unwrapped(load: Load, code: str) -> None:
    loaded, plain = load(code), load("made = net()")
    with torch.no_grad():
        torch.testing.assert_close(loaded.network.module(INPUTS), plain.model.eval()(INPUTS))
    assert list(loaded.network.operators) == list(plain.network.operators)


@pytest.mark.full
@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
def test_forward_of_any_signature_gets_the_input(load: Load, forward: str) -> None:
    loaded = load(f"""
class made(nn.Module):
    def __init__(self): super().__init__(); self.m = net()
    {forward}""")
    with torch.no_grad():
        torch.testing.assert_close(loaded.network.module(INPUTS), loaded.model.eval().m(INPUTS))  # type: ignore[operator]


@pytest.mark.full
def test_wrapped_submodule_keeps_its_names(load: Load) -> None:
    loaded = load("""
class made(nn.Module):
    def __init__(self): super().__init__(); self.m = nn.DataParallel(net()); self.c = torch.compile(nn.ReLU())
    def forward(self, x): return self.c(self.m(x))""")
    assert list(loaded.network.operators) == ["m.module.0", "m.module.4"]


INVALID = {
    "a pair": ("def made(): return net(), 1", "a tuple of Sequential, int"),
    "None": ("def made(): net()", "None"),
    "a state dict": ("def made(): return net().state_dict()", "a state dict"),
    "a dictionary": ("def made(): return {}", "a dictionary"),
    "a number": ("made = 3", "3"),
    "another object": ("class made:\n    def __call__(self, x): return x", "of type made"),
    "arguments": ("class made(nn.Module):\n    def __init__(self, classes, *, width): pass", "classes, width"),
    "an exception": ("def made():\n    return {}['resnet']", "KeyError: 'resnet', at"),
    "an exception in a library": ("def made(): return torch.load('none.pt')", "m.py:9"),
    "an exit": ("def made(): raise SystemExit('usage: m.py')", "SystemExit: usage: m.py"),
    "an exit on import": ("import sys\nsys.exit(3)", "SystemExit: 3"),
    "a failing import": ("import not_installed_package", "not_installed_package', at"),
    "a wrong name": ("undefined", "NameError"),
    "a syntax error": ("def made(:", "m.py, line"),
    "TorchScript": ("def made(): return torch.jit.script(net())", "TorchScript"),
    "TorchScript within": ("def made(): return nn.Sequential(torch.jit.script(net()))", "its module 0 is TorchScript"),
    "quantized": (
        "def made(): return torch.ao.quantization.quantize_dynamic(net(), {nn.Linear}, dtype=torch.qint8)",
        "its module 4 is quantized",
    ),
    "meta": ("def made():\n    with torch.device('meta'): return net()", "0.weight is on the meta device"),
    "exported for a batch": (
        "def made(): return torch.export.export(net().eval(), (torch.zeros(1, 3, 8, 8),)).module()",
        "batches of 1",
    ),
    "two keywords": (
        "class made(nn.Module):\n    def forward(self, *, x, y): return x",
        "only keyword arguments (x, y)",
    ),
    "lazy for another size": ("def made(): return nn.Sequential(nn.LazyConv2d(4, 9), nn.Flatten())", "(3, 8, 8)"),
    "lazy and not used": (
        "class made(nn.Module):\n    def __init__(self): super().__init__(); self.l = nn.LazyLinear(3)\n"
        "    def forward(self, x): return x",
        "l.weight has no shape",
    ),
    "not finite": (
        "def made():\n    m = net(); m[0].weight.data.view(-1)[:2] = float('nan'); return m",
        "2 of the 108",
    ),
    "statistics not finite": (
        "def made():\n    m = net(); m[1].running_var[0] = float('inf'); return m",
        "1.running_var",
    ),
}


@pytest.mark.parametrize(("code", "phrase"), INVALID.values(), ids=INVALID)
def test_model_that_cannot_be_traced_is_an_error_with_its_cause(load: Load, code: str, phrase: str) -> None:
    with pytest.raises(UserError) as caught:
        load(code)
    assert phrase in caught.value.what
    assert caught.value.where.startswith("--model ")
    assert "\n" not in str(caught.value)


def test_exception_is_located_in_the_users_file(load: Load, tmp_path: Path) -> None:
    (tmp_path / "layers.py").write_text("import json\n\n\ndef layers():\n    return json.loads('{')\n")
    with pytest.raises(UserError) as caught:
        load("from layers import layers\nmade = layers")
    assert f"{tmp_path / 'layers.py'}:5" in caught.value.what


def entry(folder: Path, code: str, layers: int) -> str:
    folder.mkdir(parents=True)
    (folder / "layers.py").write_text(f"from torch import nn\ndef net(): return nn.Linear(2, {layers})\n")
    (folder / "m.py").write_text(code)
    return f"{folder / 'm.py'}:net"


@pytest.mark.parametrize(
    "code", ["from layers import net", "from .layers import net", "import layers\nnet = layers.net"]
)
def test_files_of_the_same_names_in_two_folders_are_different_modules(tmp_path: Path, code: str) -> None:
    specs = [entry(tmp_path / "one", code, 3), entry(tmp_path / "two" / "a.b", code, 4)]
    path, modules = list(sys.path), {"torch", "json"} & set(sys.modules)
    found = [load_custom_model(spec).out_features for spec in (*specs, *specs)]
    assert found == [3, 4, 3, 4]
    assert sys.path == path
    assert modules <= set(sys.modules)


def test_package_of_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package_of_a_test").mkdir()
    (tmp_path / "package_of_a_test" / "nets.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert isinstance(load_custom_model("package_of_a_test.nets:net"), nn.Sequential)


def test_model_of_a_module_is_the_same_at_every_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_of_a_test.py").write_text(NET + "\nmade = net()")
    monkeypatch.chdir(tmp_path)
    config = ModelConfig(spec="module_of_a_test:made", precision="float64", image_size=8, resize=8)
    first = loading.load(config)
    nn.init.zeros_(first.model[0].weight)  # type: ignore[index, arg-type]
    assert loading.load(config).digest == first.digest


@pytest.mark.full
def test_lazy_layers_are_the_same_in_every_process(load: Load) -> None:
    code = "def made(): return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3))"
    torch.manual_seed(0)
    first = load(code)
    torch.manual_seed(1)
    assert load(code).digest == first.digest
    assert first.model[3].in_features == 4 * 6 * 6  # type: ignore[index]
    assert first.model[1].num_batches_tracked == 0  # type: ignore[index]
    assert first.network.output_shape == (3,)


UNUSUAL = """
class made(nn.Module):
    def __init__(self):
        super().__init__()
        self.m = net()
        self.register_buffer("phase", torch.exp(1j * torch.linspace(0, 3, 8)))
        self.register_buffer("mask", torch.ones(8, dtype=torch.bool))
        self.register_buffer("none", None)
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("count", torch.tensor(2))
        self.register_buffer("small", torch.ones(8).to(torch.float8_e4m3fn))
        self.register_buffer("attention", torch.full((2, 2), -torch.inf))
    def forward(self, x): return self.m(x * self.phase.imag * self.mask * self.count)
"""


@pytest.mark.full
@pytest.mark.parametrize(("precision", "complex_dtype"), [("float32", torch.complex64), ("float64", torch.complex128)])
def test_complex_and_integer_tensors_keep_their_type_when_cast(
    load: Load, precision: str, complex_dtype: torch.dtype
) -> None:
    loaded = load(UNUSUAL, precision)
    buffers = dict(loaded.model.named_buffers())
    assert buffers["phase"].dtype == complex_dtype
    assert (buffers["mask"].dtype, buffers["count"].dtype) == (torch.bool, torch.int64)
    assert buffers["small"].dtype == buffers["m.1.running_var"].dtype == loaded.dtype
    inputs = INPUTS.to(loaded.dtype)
    with torch.no_grad():
        scaled = inputs * torch.exp(1j * torch.linspace(0, 3, 8)).imag * 2
        torch.testing.assert_close(loaded.network.module(inputs), loaded.model.m(scaled), rtol=1e-5, atol=1e-5)  # type: ignore[operator]


def test_sparse_buffers_are_cast() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("adjacency", torch.eye(3).to_sparse())
    assert cast(model, torch.device("cpu"), torch.float64).adjacency.dtype == torch.float64


def test_spec_of_a_moved_model_in_an_old_manifest_is_loaded() -> None:
    config = ModelConfig(spec="ray_jobs.small:small_cnn", image_size=28, resize=28, mean=(0.5,), std=(0.5,))
    moved = replace(config, spec="ray_jobs.studies.small_cnn:small_cnn")
    assert loading.load(config).digest == loading.load(moved).digest
