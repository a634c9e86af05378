"""`patternnet export-model`: files that other programs run, and the errors of the command."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from patterns import Explainer, accumulate, choose, export_program, solve, trace
from patterns.attribution import BACKWARD_PASSES
from ray_jobs.cli.app import exit_status
from ray_jobs.config import ModelConfig
from ray_jobs.config.commands import ExportModelOptions
from ray_jobs.config.option import options_of
from ray_jobs.data.image_decoding import decode
from ray_jobs.jobs import onnx_export
from ray_jobs.jobs.explain.online import OnlineExplainer
from ray_jobs.models.loading import load
from tests.conftest import jpeg
from tests.patterns.networks import relative
from tests.patterns.test_programs import run_elsewhere, shifted_windows_model

PAGE = Path(__file__).parents[2] / "docs" / "export-model.md"
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs onnx, onnxscript and onnxruntime",
)


def read_block(number: int) -> str:
    """Return a block of Python of the page."""
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[number]


def draw_batch(model: ModelConfig) -> Tensor:
    preprocessing = load(model).preprocessing
    return torch.stack([decode({"jpg": jpeg(np.random.default_rng(i))}, preprocessing) for i in range(5)])


def explain(run: str, batch: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return scores and maps as an endpoint computes them."""
    explainer = OnlineExplainer(run, **options)
    explanation = explainer.worker.explainer(batch, lambda scores: explainer.worker.target.make_targets(scores, ()))
    return explanation.scores, explanation.maps


@pytest.mark.full
def test_program_explains_without_the_package_and_describes_itself(
    fitted: str,
    model: ModelConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, methods = tmp_path / "explainer.pt2", ("patternnet", "patternattribution")
    names = tmp_path / "names.json"
    names.write_text(json.dumps(["ant", "bee", "cat", "dog", "eel"]))
    options = ["--methods", ",".join(methods), "--target", "bee-vs-others", "--classes", str(names)]
    assert exit_status(["export-model", fitted, "--to", str(file), *options]) == 0
    assert f"export-model: {file} (" in capsys.readouterr().out
    batch = draw_batch(model)
    scores, maps = explain(fitted, batch, methods=methods, target="1-vs-others")
    for found, n in zip(run_elsewhere(file, batch), (5, 1)):
        for one, other in zip(found, (scores, *maps.values()), strict=True):
            assert relative(one, other[:n]) < 1e-5
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"images": batch}
    exec(read_block(0).replace("scores, maps", "scores, *maps"), scope)
    torch.testing.assert_close(scope["maps"][1], maps["patternattribution"], rtol=1e-4, atol=1e-7)
    about = scope["description"]
    manifest = json.loads(Path(fitted, "manifest.json").read_text())
    assert about["input"] == {"name": "images", "shape": ["N", 3, 16, 16], "dtype": "float32"}
    assert about["outputs"] == ["scores", *methods]
    assert about["preprocessing"]["std"] == [0.25, 0.25, 0.25]
    assert about["model"]["digest"] == manifest["model"]["digest"]
    assert about["classes"]["1"] == "bee"
    assert about["target"] == "bee-vs-others"
    assert about["estimators"]["patternnet"].keys() == {each["name"] for each in manifest["operators"]}


@needs_onnx
@pytest.mark.full
def test_onnx_graph_agrees_and_describes_itself(
    fitted: str, model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    file = tmp_path / "explainer.onnx"
    assert exit_status(["export-model", fitted, "--to", str(file), "--preset", "paper"]) == 0
    session = onnxruntime.InferenceSession(file)
    batch = draw_batch(model)
    scores, maps = explain(fitted, batch, methods=("patternattribution",), estimator=("paper",))
    for n in (5, 1):
        found = session.run(["scores", "patternattribution"], {"images": batch[:n].numpy()})
        assert relative(torch.from_numpy(found[0]), scores[:n]) < 1e-5
        assert relative(torch.from_numpy(found[1]), maps["patternattribution"][:n]) < 1e-5
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"images": batch}
    exec(read_block(1), scope)
    assert relative(torch.from_numpy(scope["maps"]), maps["patternattribution"]) < 1e-5
    about = json.loads(scope["text"])
    assert about["outputs"] == ["scores", "patternattribution"]


class Every(nn.Module):
    """Convolutions whose windows do not reach the border, dilated, grouped and transposed, and overlapping pools."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=3, padding=1)
        self.dilated = nn.Conv2d(4, 8, 3, stride=2, dilation=2, padding=2, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 3, stride=2, output_padding=1)
        self.last = nn.Linear(4 * 5 * 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.first(x)), 3, 1, 1)
        x = nn.functional.relu6(self.up(nn.functional.gelu(self.dilated(x))))
        x = nn.functional.max_pool2d(x, 3, 2, 1)
        return self.last(nn.functional.avg_pool2d(x, 2, 1, 1)[:, :, :5, :5].flatten(1))


@pytest.mark.full
def test_rewritten_gradients_are_the_same_for_every_window() -> None:
    torch.manual_seed(0)
    batch = torch.randn(6, 3, 26, 25, dtype=torch.float64)
    network = trace(Every().double(), batch[:2])
    moments = accumulate(network, [batch])
    solved = {name: solve(op, moments[name]).patterns for name, op in network.operators.items()}
    explainer = Explainer(network, choose(network, solved), ["patternattribution"])
    program = export_program(explainer, ["patternattribution"]).run_decompositions(onnx_export.REWRITES)
    used = {node.target for node in program.graph.nodes}
    assert used.isdisjoint(onnx_export.REWRITES)
    _, maps = program.module()(batch[:3])
    assert relative(maps, explainer(batch[:3]).maps["patternattribution"]) < 1e-10


def enlarging_model() -> nn.Module:
    """A model that pools to more positions than there are, as AlexNet does with small images."""
    torch.manual_seed(5)
    layers = nn.Conv2d(3, 4, 5, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(6), nn.Flatten(), nn.Linear(4 * 36, 3)
    return nn.Sequential(*layers)


@needs_onnx
@pytest.mark.full
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(enlarging_model, id="pooling"),
        pytest.param(lambda: shifted_windows_model().float(), id="windows", marks=pytest.mark.slow),
    ],
)
def test_onnx_graph_of_unusual_operations_agrees(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    import onnxruntime

    model = make().eval()
    torch.manual_seed(6)
    batch = torch.randn(5, 3, 16, 16)
    network = trace(model, batch[:2])
    moments = accumulate(network, [batch])
    solved = {name: solve(op, moments[name], "two-component").patterns for name, op in network.operators.items()}
    explainer = Explainer(network, choose(network, solved, "two-component"), ["patternattribution"])
    program = export_program(explainer, ["patternattribution"])
    onnx_export.write_onnx(program, tmp_path / "e.onnx", ["images"], ["scores", "maps"], {})
    session = onnxruntime.InferenceSession(tmp_path / "e.onnx", providers=["CPUExecutionProvider"])
    for inputs in (batch, batch[:1]):
        expected = explainer(inputs)
        scores, maps = session.run(["scores", "maps"], {"images": inputs.numpy()})
        assert relative(torch.from_numpy(scores), expected.scores) < 1e-5
        assert relative(torch.from_numpy(maps), expected.maps["patternattribution"]) < 1e-5


@pytest.mark.parametrize(("kernel", "stride", "padding"), [((3, 2), (2, 2), (1, 0)), ((4, 4), (), (0, 0))])
def test_rewritten_gradient_of_average_pooling(kernel: tuple[int], stride: tuple[int], padding: tuple[int]) -> None:
    x = torch.randn(2, 3, 11, 12, dtype=torch.float64, requires_grad=True)
    pooled = nn.functional.avg_pool2d(x, kernel, stride or None, padding)
    grad = torch.randn_like(pooled)
    found = onnx_export.avg_pool2d_backward(grad, x.detach(), kernel, stride, padding, False, True, None)
    torch.testing.assert_close(found, torch.autograd.grad(pooled, x, grad)[0])


def test_help_offers_the_methods_that_can_be_exported() -> None:
    described = options_of(ExportModelOptions)["methods"].help
    assert callable(described)
    offered = re.search(r"\((.*?)\)", described())
    assert offered
    assert offered[1].split(", ") == [*BACKWARD_PASSES]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "explainer.pb"], "explainer.pb: the file name has no known ending. Choose from .pt2, .onnx."),
        (
            ["--to", "e.pt2", "--methods", "lrp-z"],
            "--methods: lrp-z is not a backward pass of the network. Choose from gradient, gradient-x-input, deconvnet",
        ),
        (["--to", "e.pt2", "--target", "label"], "--target: the images have no label"),
        (["--to", "e.pt2", "--target", "9"], "no class 9"),
    ],
)
def test_wrong_options_are_one_line(
    options: list[str], words: str, fitted: str, complaint: Callable[..., str], tmp_path: Path
) -> None:
    options[1] = str(tmp_path / options[1])
    assert words in complaint("export-model", fitted, *options)
    assert list(tmp_path.iterdir()) == []


def test_missing_package_is_one_line(
    fitted: str, complaint: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if name == "onnxscript" else name)
    line = complaint("export-model", fitted, "--to", tmp_path / "e.onnx")
    assert "onnxscript is not installed. Run pip install 'patternnet-ray[onnx]'" in line


@needs_onnx
@pytest.mark.full
def test_operation_that_onnx_lacks_is_one_line(
    fitted: str, complaint: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "REWRITES", {})
    line = complaint("export-model", fitted, "--to", tmp_path / "e.onnx")
    assert "ONNX has no operation for aten." in line
    assert "Write a .pt2 file." in line
    assert list(tmp_path.iterdir()) == []
