"""Targets: classes, several classes per sample, weighted sums of scores, and hidden neurons."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patterns import Explainer, UserError, trace
from tests.patterns.networks import PASSES, relative, traced

METHODS_OF_ALL = (*PASSES, "lrp-z", "integrated-gradients")


@cache
def explainer(network_of: str = "resnet18") -> tuple[Explainer, Tensor]:
    it = traced(network_of)
    patterns = {name: op.weight + 0.1 for name, op in it.network.operators.items()}
    return Explainer(it.network, patterns, METHODS_OF_ALL, settings={"integrated-gradients.steps": 2}), it.inputs


@pytest.mark.full
def test_each_of_several_targets_has_the_map_that_it_has_alone() -> None:
    explain, x = explainer()
    targets = torch.tensor([[1, 2], [3, 4], [5, 0]])
    together = explain(x, targets)
    for t in range(2):
        alone = explain(x, targets[:, t])
        for method in METHODS_OF_ALL:
            assert together.maps[method].shape == (3, 2, 3, 64, 64)
            assert relative(together.maps[method][:, t], alone.maps[method]) < 1e-12, method


@pytest.mark.full
def test_targets_can_be_a_function_of_the_scores() -> None:
    explain, x = explainer()
    found = explain(x, lambda scores: scores.argmin(1))
    assert torch.equal(found.targets, found.scores.argmin(1))
    assert relative(found.maps["gradient"], explain(x, found.targets).maps["gradient"]) < 1e-12


@pytest.mark.full
def test_class_against_another_is_the_difference_of_their_maps() -> None:
    explain, x = explainer()
    one, other = torch.tensor([1, 2, 3]), torch.tensor([4, 4, 0])
    weights = torch.eye(10, dtype=torch.float64)[one] - torch.eye(10, dtype=torch.float64)[other]
    against = explain(x, weights)
    plus, minus = explain(x, one), explain(x, other)
    for method in ("gradient", "patternnet", "patternattribution", "lrp-z", "integrated-gradients"):
        assert relative(against.maps[method], plus.maps[method] - minus.maps[method]) < 1e-9, method


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.next = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.hidden, self.head = nn.Linear(4 * 9, 6), nn.Linear(6, 3)

    def inside(self, x: Tensor) -> dict[str, Tensor]:
        first = F.relu6(self.conv(x))
        second = self.next(first)
        hidden = F.relu(F.max_pool2d(second + first, 2)).flatten(1)
        return {"conv": first, "next": second, "hidden": F.relu(self.hidden(hidden))}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inside(x)["hidden"])


@pytest.mark.full
@pytest.mark.parametrize(("operator", "neuron"), [("conv", 2), ("next", 0), ("hidden", 5)])
def test_hidden_neuron_is_explained_after_its_gate_at_all_positions(operator: str, neuron: int) -> None:
    torch.manual_seed(1)
    model, x = Small().double(), torch.randn(4, 2, 6, 6, dtype=torch.float64)
    end = trace(model, x).until(operator)
    values = model.inside(x)[operator]
    assert end.output_shape == values.shape[1:]
    found = Explainer(end, None, ["gradient", "gradient-x-input"])(x, torch.full((4,), neuron))
    torch.testing.assert_close(found.scores, values, rtol=1e-12, atol=1e-12)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model.inside(leaf)[operator][:, neuron].sum(), leaf)
    assert relative(found.maps["gradient"], expected) < 1e-12


@pytest.mark.full
def test_output_gradient_of_a_hidden_neuron_is_its_value() -> None:
    torch.manual_seed(1)
    model, x = Small().double(), torch.randn(4, 2, 6, 6, dtype=torch.float64)
    network = trace(model, x)
    pattern = torch.randn_like(network.operators["conv"].weight)
    end = network.until("conv")
    assert list(end.operators) == ["conv"]
    found = Explainer(end, {"conv": pattern}, ["patternnet"])(x, torch.full((4,), 3)).maps["patternnet"]
    value = F.relu6(model.conv(x))[:, 3:4] * (model.conv(x)[:, 3:4] < 6)
    torch.testing.assert_close(found, F.conv_transpose2d(value, pattern[3:4], padding=1), rtol=1e-10, atol=1e-12)


@pytest.mark.full
def test_neurons_of_tokens_come_first_and_the_network_is_unchanged() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).double()
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    network = trace(model, x)
    before = network.module(x)
    end = network.until("0")
    assert end.output_shape == (4, 3)
    torch.testing.assert_close(end.module(x), model[:2](x).transpose(1, 2))
    assert torch.equal(network.module(x), before)


@pytest.mark.full
def test_unknown_operator_is_rejected() -> None:
    network = traced("resnet18").network
    with pytest.raises(UserError, match="no such operator") as caught:
        network.until("layer1.0.conv9")
    assert caught.value.where == "layer1.0.conv9"
    assert "layer1.0.conv1" in caught.value.remedy


@pytest.mark.full
def test_dense_outputs_need_explicit_targets() -> None:
    model = nn.Conv2d(2, 3, 1).double()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    explain = Explainer(trace(model, x), None, ["gradient"])
    with pytest.raises(UserError, match="not a score for each class") as caught:
        explain(x)
    assert caught.value.parameter == "targets"
    found = explain(x, torch.tensor([1, 2])).maps["gradient"]
    torch.testing.assert_close(found, model.weight[[1, 2]].expand(-1, -1, 4, 4))
