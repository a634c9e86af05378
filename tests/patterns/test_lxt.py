"""`gradient-x-input` on torchvision's vision transformer against CP-LRP by LXT (the package `lxt`)."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer, vit_b_16

from patterns import Explainer, trace
from tests.patterns.networks import relative

MODELS: dict[str, Callable[[], VisionTransformer]] = {
    "2 blocks": lambda: VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5),
    "vit_b_16": lambda: vit_b_16(num_classes=5),
}


@pytest.fixture
def cp_lrp(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that gives the layers of torchvision's vision transformer LXT's rules.

    `import lxt.efficient` also imports LXT's copy of BERT, which needs `transformers.modeling_attn_mask_utils`.
    transformers 5 has no such module. So the packages are entered without running their `__init__.py`.
    """
    lxt = pytest.importorskip("lxt", reason="the package lxt, which has the expected rules, is not installed")
    for name in ("lxt.efficient", "lxt.efficient.models"):
        package = ModuleType(name)
        package.__path__ = [str(Path(lxt.__path__[0], *name.split(".")[1:]))]
        monkeypatch.setitem(sys.modules, name, package)
    rules = import_module("lxt.efficient.models.vit_torch").cp_LRP
    assert set(rules) == {nn.GELU, nn.LayerNorm, nn.MultiheadAttention}

    def patch() -> None:
        for layer, replace_forward in rules.items():
            monkeypatch.setattr(layer, "forward", layer.forward)  # restored after the test
            monkeypatch.setattr(layer, "original_forward", None, raising=False)
            assert replace_forward(layer)

    return patch


def gradient_x_input(model: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf).gather(1, classes[:, None]).sum(), leaf)
    return gradient * x


@pytest.mark.full
@pytest.mark.parametrize("name", ["2 blocks", pytest.param("vit_b_16", marks=pytest.mark.slow)])
def test_gradient_x_input_is_cp_lrp_of_lxt(name: str, cp_lrp: Callable[[], None]) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().double().eval().requires_grad_(False)
    for parameter in model.parameters():  # the head, the class token and the biases begin as zeros
        parameter += torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5)
    x = torch.randn(2, 3, model.image_size, model.image_size, dtype=torch.float64)
    classes = torch.tensor([1, 4])
    found = Explainer(trace(model, x), None, ["gradient-x-input"])(x, classes).maps["gradient-x-input"]
    plain = gradient_x_input(model, x, classes)
    cp_lrp()
    expected = gradient_x_input(model, x, classes)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert relative(plain, expected) > 0.1, "the rules of LXT are not in use"
