"""Inputs, targets and batches that callers pass: they fit, or the error says what is expected."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from zennit.attribution import Gradient

from patterns import (
    Explainer,
    Network,
    Observer,
    PatternAttribution,
    UserError,
    accumulate,
    accumulate_patches,
    digest,
    load,
    save,
    solve,
    trace,
)
from patterns.attribution.adapters import PatternAttributionComposite, quantus_explain


class Pooled(nn.Module):
    """A model that accepts images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> Pooled:
    torch.manual_seed(0)
    return Pooled().eval()


@pytest.fixture(scope="module")
def network(model: Pooled) -> Network:
    return trace(model, torch.zeros(2, 3, 16, 16))


@pytest.fixture(scope="module")
def explainer(network: Network) -> Explainer:
    return Explainer(network, {n: op.weight for n, op in network.operators.items()}, ["gradient", "patternattribution"])


@pytest.fixture(scope="module")
def run(model: Pooled, network: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    moments = accumulate(network, [torch.randn(8, 3, 16, 16)])
    save(folder, {n: solve(op, moments[n], "default") for n, op in network.operators.items()}, digest(model))
    return folder


def images(count: int = 8, size: int = 16) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


ENTRIES: dict[str, Callable[[Network, Tensor], object]] = {
    "module": lambda network, x: network.module(x),
    "explainer": lambda network, x: Explainer(network, None, ["gradient"])(x),
    "explainer by zennit": lambda network, x: Explainer(network, None, ["lrp-z"])(x),
    "explainer's module": lambda network, x: Explainer(network, None, ["gradient"]).module()(x),
    "end at an operator": lambda network, x: network.until("conv").module(x),
    "accumulate": lambda network, x: accumulate(network, [x]),
    "sampled": lambda network, x: Observer(network, positions=2).update(x),
    "patches": lambda network, x: accumulate_patches(network, [x], ["conv"], positions=2),
}


@pytest.mark.full
@pytest.mark.parametrize("size", [8, 15, 20, 32])
@pytest.mark.parametrize("entry", ENTRIES)
def test_images_of_another_size_are_rejected_with_both_shapes(network: Network, entry: str, size: int) -> None:
    with pytest.raises(UserError) as caught:
        ENTRIES[entry](network, images(3, size))
    assert str((3, 3, size, size)) in caught.value.what
    assert "3, 16, 16" in caught.value.what


@pytest.mark.parametrize("entry", ENTRIES)
def test_image_without_a_batch_dimension_is_rejected_with_a_remedy(network: Network, entry: str) -> None:
    with pytest.raises(UserError) as caught:
        ENTRIES[entry](network, images()[0])
    assert "batch dimension" in caught.value.remedy


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8, torch.bfloat16])
def test_images_of_another_dtype_are_rejected_with_both_dtypes(explainer: Explainer, dtype: torch.dtype) -> None:
    for entry in (explainer, lambda x: accumulate(explainer.network, [x])):
        with pytest.raises(UserError) as caught:
            entry(images().to(dtype))
        assert str(dtype) in caught.value.what
        assert "float32" in caught.value.what


@pytest.mark.full
def test_captum_api_traces_the_model_again_for_another_size(tmp_path: Path) -> None:
    torch.manual_seed(1)
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten(2)).eval()
    network = trace(convolutions, torch.zeros(2, 3, 16, 16))
    moments = accumulate(network, [images()])
    solutions = {n: solve(op, moments[n], "default") for n, op in network.operators.items()}
    save(tmp_path, solutions, digest(convolutions))
    attribution = PatternAttribution(convolutions, tmp_path, "paper", torch.zeros(1, 3, 16, 16))
    patterns = {n: s.patterns["positive" if "positive" in s.patterns else "linear"] for n, s in solutions.items()}
    for size in (16, 24, 16):
        x = images(2, size)
        fresh = trace(convolutions, torch.zeros(2, 3, size, size))
        expected = Explainer(fresh, patterns, ["patternattribution"])(x, 1).maps["patternattribution"]
        assert torch.equal(attribution.attribute(x, target=1), expected)


@pytest.mark.full
def test_adapters_reject_sizes_that_the_patterns_do_not_fit(model: Pooled, run: Path) -> None:
    x = images(2, 24)
    mean = "average_pool.0"  # over 16 × 16 positions
    with pytest.raises(UserError) as caught:
        PatternAttribution(model, run, "paper", images(1)).attribute(x, target=1)
    assert caught.value.where == mean
    composite = PatternAttributionComposite(model, run, "paper", images(1))
    with pytest.raises(UserError) as caught, Gradient(model, composite) as attributor:
        attributor(x, lambda scores: torch.eye(3)[[1, 1]])
    assert caught.value.parameter == "inputs"
    with pytest.raises(UserError) as caught:
        quantus_explain(run, estimator="paper")(model, x.numpy(), np.array([1, 1]))
    assert caught.value.where == mean
    with torch.no_grad():  # the model is restored
        torch.testing.assert_close(model(x), model.forward(x))


TARGETS: dict[str, tuple[Any, list[int]]] = {
    "a list": ([0, 1, 2, 0, 1, 2, 0, 1], [0, 1, 2, 0, 1, 2, 0, 1]),
    "a number": (2, [2] * 8),
    "an array": (np.arange(8) % 3, [0, 1, 2, 0, 1, 2, 0, 1]),
    "a tensor": (torch.arange(8, dtype=torch.int32) % 3, [0, 1, 2, 0, 1, 2, 0, 1]),
    "a tensor of no dimension": (torch.tensor(1), [1] * 8),
}


@pytest.mark.parametrize("form", TARGETS)
def test_targets_in_every_form_give_the_gradient_of_autograd(model: Pooled, explainer: Explainer, form: str) -> None:
    targets, classes = TARGETS[form]
    explanation = explainer(images(), targets)
    x = images().requires_grad_()
    (expected,) = torch.autograd.grad(model(x)[range(8), classes].sum(), x)
    assert explanation.targets.tolist() == classes
    torch.testing.assert_close(explanation.maps["gradient"], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("targets", "word"),
    [
        (torch.tensor([1]), "1 targets"), (torch.tensor([0, 1, 2]), "3 targets"), ([0] * 9, "9 targets"),
        ([7] * 8, "no class 7"), (-1, "no class -1"), ([[0, 1, 3]] * 8, "no class 3"),
        (torch.ones(8, 2), "weights"), ([0.5] * 8, "weights"), (torch.ones(8, dtype=torch.bool), "bool"),
    ],
)  # fmt: skip
def test_targets_that_do_not_fit_are_rejected(explainer: Explainer, targets: Any, word: str) -> None:
    with pytest.raises(UserError) as caught:
        explainer(images(), targets)
    assert caught.value.parameter == "targets"
    assert word in caught.value.what


def test_data_loader_of_images_and_labels_gives_the_moments_of_its_images(network: Network) -> None:
    x = images()
    expected = accumulate(network, [x[:4], x[4:]])
    labeled = DataLoader(TensorDataset(x, torch.arange(8)), batch_size=4)
    alone = DataLoader(TensorDataset(x), batch_size=4)
    for loader in (labeled, alone):
        found = accumulate(network, loader)
        assert torch.equal(found["conv"].total.xy, expected["conv"].total.xy)
        assert torch.equal(found["head"].total.n, expected["head"].total.n)


@pytest.mark.parametrize("batches", [[], iter([]), [{"image": images()}], ["x"], [([1], [2])]])
def test_missing_batches_and_batches_without_images_are_rejected(network: Network, batches: Any) -> None:
    with pytest.raises(UserError) as caught:
        accumulate(network, batches)
    assert caught.value.parameter == "batches"


@pytest.mark.full
def test_inference_mode_and_its_images_change_no_map(model: Pooled, run: Path) -> None:
    expected = Explainer.load(run, model, ["patternattribution"], example=images(1))(images(), 0).maps
    with torch.inference_mode():
        made = images()
        inside = Explainer.load(run, model, ["patternattribution"], example=made[:1])(made, 0).maps
        moments = accumulate(trace(model, made), [made])
    outside = Explainer.load(run, model, ["patternattribution"], example=images(1))(made, 0).maps
    for maps in (inside, outside):
        assert torch.equal(maps["patternattribution"], expected["patternattribution"])
    assert moments["conv"].total.n[0] == 8 * 16 * 16


def test_model_created_in_inference_mode_is_rejected() -> None:
    with torch.inference_mode():
        made = Pooled()
    with pytest.raises(UserError, match="inference"):
        trace(made, torch.zeros(2, 3, 16, 16))


def test_empty_batch_has_empty_maps(explainer: Explainer) -> None:
    assert explainer(images()[:0]).maps["patternattribution"].shape == (0, 3, 16, 16)


def test_patterns_are_loaded_from_a_folder_given_as_string(model: Pooled, run: Path) -> None:
    assert load(str(run), digest(model)).keys() == load(run, digest(model)).keys()


@pytest.mark.full
def test_resnet_rejects_another_size_instead_of_reading_a_part_of_the_image() -> None:
    model = torchvision.models.resnet18(num_classes=5).eval()
    network = trace(model, torch.zeros(2, 3, 64, 64))
    with torch.no_grad():
        torch.testing.assert_close(network.module(images(2, 64)), model(images(2, 64)), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError) as caught:
        network.module(images(2, 80))
    assert caught.value.parameter == "inputs"
