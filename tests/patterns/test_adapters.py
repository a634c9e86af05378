"""Adapters for captum, zennit, Quantus and notebooks return the maps of the explainer."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional as T
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlusFlat

from patterns import (
    Explainer,
    Explanation,
    PatternAttribution,
    PatternNet,
    UserError,
    accumulate,
    digest,
    save,
    solve,
    trace,
)
from patterns.attribution.adapters import (
    PatternAttributionComposite,
    PatternComposite,
    PatternNetComposite,
    quantus_explain,
)
from patterns.attribution.rendering import RenderedExplanation
from tests.patterns.networks import randomize, relative

CALLERS = {
    "patternnet": (PatternNet, PatternNetComposite),
    "patternattribution": (PatternAttribution, PatternAttributionComposite),
}
TARGETS = torch.tensor([4, 0])


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)
        self.branch, self.head = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 10)
        randomize(self.norm)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.branch(x) + x)
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(6)
    return Small().double().eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def run(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of patterns with a manifest as `patternnet fit` writes it."""
    folder = tmp_path_factory.mktemp("run")
    network = trace(model, torch.zeros(1, 3, 16, 16, dtype=torch.float64))
    moments = accumulate(network, [torch.randn(3, 3, 16, 16, dtype=torch.float64)])
    estimators = "linear,two-component"
    solutions = {name: solve(op, moments[name], estimators) for name, op in network.operators.items()}
    save(folder, solutions, digest(model))
    manifest = {"model": {"input_shape": [3, 16, 16]}, "fit": {"model": {"pass_through": []}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def expected(run: Path, model: nn.Module, method: str, x: Tensor, estimator: str = "default") -> Tensor:
    explanation = Explainer.load(run, model, [method], estimator)(x, TARGETS)
    return explanation.maps[method] * 2.0 ** explanation.exponents[method]


@pytest.mark.full
@pytest.mark.cases
@pytest.mark.parametrize("method", CALLERS)
@pytest.mark.parametrize("estimator", ["default", "linear"])
def test_attribute_returns_the_explainers_map(
    run: Path, model: nn.Module, images: Tensor, method: str, estimator: str
) -> None:
    attribution = CALLERS[method][0](model, run, estimator)
    found = attribution.attribute(images, target=TARGETS)
    assert relative(found, expected(run, model, method, images, estimator)) < 1e-12
    assert relative(attribution.attribute(images, [4, 0]), found) < 1e-12
    assert relative(attribution.attribute(images[:1], 4), found[:1]) < 1e-10
    predicted = attribution.attribute(images)
    assert relative(predicted, attribution.attribute(images, model(images).argmax(1))) < 1e-12


def run_zennit(composite: PatternComposite | EpsilonPlusFlat, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output and the relevance, in the lines that a user of zennit writes."""
    one_hot = torch.eye(10, dtype=torch.float64)[TARGETS]
    with Gradient(model=model, composite=composite) as attributor:
        output, relevance = attributor(x.clone(), lambda scores: scores * one_hot)
    return output, relevance


@pytest.mark.full
@pytest.mark.cases
@pytest.mark.parametrize("method", CALLERS)
def test_composite_returns_the_explainers_map(run: Path, model: nn.Module, images: Tensor, method: str) -> None:
    before = model(images)
    output, relevance = run_zennit(CALLERS[method][1](model, run), model, images)
    torch.testing.assert_close(output, before, rtol=1e-10, atol=1e-12)
    truth = expected(run, model, method, images)
    beyond = round(float((truth.norm() / relevance.norm()).log2()))  # only the explainer restores this power of two
    assert relative(relevance * 2.0**beyond, truth) < 1e-10
    assert beyond == Explainer.load(run, model, [method])(images).exponents[method]


@pytest.mark.full
def test_composite_restores_the_model(run: Path, model: nn.Module, images: Tensor) -> None:
    x = images.clone().requires_grad_()
    (before,) = torch.autograd.grad(model(x)[0, 4], x)
    composite = PatternNetComposite(model, run)
    for _ in range(2):
        run_zennit(composite, model, images)
    assert "forward" not in vars(model)
    (after,) = torch.autograd.grad(model(x)[0, 4], x)
    assert torch.equal(before, after)
    run_zennit(EpsilonPlusFlat(), model, images)


@pytest.mark.full
def test_composite_rejects_another_model(run: Path, model: nn.Module, images: Tensor) -> None:
    with pytest.raises(UserError) as caught:
        run_zennit(PatternNetComposite(model, run), nn.Sequential(model), images)
    assert caught.value.where == "Sequential"
    assert "another model" in caught.value.what


@pytest.mark.full
def test_quantus_function_returns_the_sum_over_channels(run: Path, model: nn.Module, images: Tensor) -> None:
    explain = quantus_explain(run)
    found = explain(model, images.numpy(), TARGETS.numpy(), device="cpu")
    assert isinstance(found, np.ndarray)
    assert found.shape == (2, 1, 16, 16)
    truth = expected(run, model, "patternattribution", images).sum(1, keepdim=True)
    assert relative(torch.from_numpy(found), truth) < 1e-12
    randomized = Small().double().eval()
    with pytest.raises(UserError, match="fitted for"):
        explain(randomized, images.numpy(), TARGETS.numpy())
    carried = quantus_explain(run, strict=False)(randomized, images.numpy(), TARGETS.numpy())
    assert relative(torch.from_numpy(carried), torch.from_numpy(found)) > 1e-2


@pytest.mark.full
def test_quantus_metric_accepts_the_maps(run: Path, images: Tensor) -> None:
    import quantus

    model = Small().eval()  # Quantus works in float32
    x, y = images.float().numpy(), TARGETS.numpy()
    explain = quantus_explain(run, strict=False)

    def score(**arguments: object) -> list[float]:
        metric = quantus.Sparseness(disable_warnings=True, normalise=True, abs=True)
        return metric(model=model, x_batch=x, y_batch=y, channel_first=True, device="cpu", **arguments)

    assert score(explain_func=explain) == pytest.approx(score(a_batch=explain(model, x, y)))


@pytest.mark.full
def test_patterns_are_converted_to_the_models_precision(run: Path, model: nn.Module, images: Tensor) -> None:
    import copy

    narrow = copy.deepcopy(model).float()
    with pytest.raises(UserError, match="fitted for"):  # the digest covers the bytes, which a float32 copy changes
        Explainer.load(run, narrow)
    found = Explainer.load(run, narrow, strict=False)(images.float(), TARGETS).maps["patternattribution"]
    assert found.dtype == torch.float32
    assert relative(found.double(), expected(run, model, "patternattribution", images)) < 1e-3


@pytest.mark.full
def test_folder_without_a_manifest_needs_an_example(run: Path, model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "patterns.safetensors").write_bytes((run / "patterns.safetensors").read_bytes())
    with pytest.raises(UserError, match="how the model was traced") as caught:
        Explainer.load(tmp_path, model)
    assert (caught.value.where, caught.value.parameter) == (str(tmp_path), "example")
    example = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    assert Explainer.load(tmp_path, model, example=example).network.input_shape == (3, 16, 16)


# --- in a notebook --------------------------------------------------------------------------------


def pictures(rendered: RenderedExplanation) -> list[Image.Image]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)" alt', rendered._repr_html_())
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


@pytest.mark.full
def test_notebook_shows_a_photograph_with_its_maps(run: Path, model: nn.Module) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 100, 3), np.uint8))

    def preprocess(photograph: Image.Image) -> Tensor:
        return T.to_tensor(photograph.resize((16, 16)))

    explainer = Explainer.load(run, model, ["gradient", "patternattribution"])
    rendered = explainer.show(image, preprocess=preprocess)
    assert [p.size for p in pictures(rendered)] == [(16, 16)] * 3
    scores = model(preprocess(image)[None].double())[0]
    assert rendered.caption == f"{int(scores.argmax())}: {float(scores.softmax(0).max()):.0%}"
    assert list(rendered.maps) == ["gradient", "patternattribution"]
    as_tensor = explainer.show(preprocess(image), target=3)
    assert as_tensor.caption.startswith("3: ")
    with pytest.raises(UserError) as caught:
        explainer.show(image)
    assert caught.value.parameter == "preprocess"
    assert "a photograph needs preprocessing" in caught.value.what


@pytest.mark.full
def test_reprs_describe_explainer_and_explanation(run: Path, model: nn.Module, images: Tensor) -> None:
    explainer = Explainer.load(run, model, ["gradient", "patternnet"])
    assert repr(explainer) == "Explainer of 5 operators for (3, 16, 16) by gradient, patternnet"
    assert repr(explainer(images, TARGETS)) == "Explanation of 2 samples by gradient, patternnet; targets [4, 0]"


def test_html_is_escaped() -> None:
    empty = Image.new("RGB", (2, 2))
    rendered = RenderedExplanation(empty, '<script>alert("x")</script>', {'"><b>': empty})
    text = rendered._repr_html_()
    assert "<script>" not in text
    assert "<b>" not in text


@pytest.mark.full
def test_notebook_shows_the_first_of_several_targets(run: Path, model: nn.Module, images: Tensor) -> None:
    explanation: Explanation = Explainer.load(run, model, ["gradient"])(images, torch.tensor([[1, 2], [3, 4]]))
    assert explanation.render(1, Image.new("RGB", (1, 1))).caption.startswith("3: ")
