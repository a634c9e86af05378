"""Models that cannot be traced are rejected with the problem, its place and a remedy."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from patterns import UserError, trace
from tests.patterns.small import FunctionModel, assert_same_outputs, conv, image


def trace_error(model: nn.Module, example: Tensor | None = None) -> UserError:
    """Return the error that tracing a model raises."""
    with pytest.raises(UserError) as caught:
        trace(model.double(), image() if example is None else example, name="zoo:net")
    assert caught.value.where == "zoo:net"
    return caught.value


class Block(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.conv, self.activation = conv(3, 3), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.conv(x))


@pytest.mark.full
@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (
            nn.Sequential(Block(nn.ReLU()), Block(nn.Sigmoid()), conv(3, 3)),
            r"^no pattern is defined for sigmoid in 1\.activation "
            r"\(test_rejected_models\.py:\d+: return self\.activation\(self\.conv\(x\)\)\)$",
        ),
        (Block(nn.Tanh()), r"tanh in activation \(test_rejected_models\.py:\d+: return self\.activation"),
        (Block(nn.Softplus()), r"softplus in activation \(test_rejected_models\.py:\d+: return self"),
        (
            nn.Sequential(Block(nn.Softmax(1)), conv(3, 3)),
            r"softmax in 0\.activation \(test_rejected_models\.py:\d+: return self\.activation",
        ),
        (
            FunctionModel(lambda m, x: m.conv(x).tanh() + m.other(x).sigmoid(), conv=conv(), other=conv()),
            r"tanh in the model \(small\.py:\d+: .*\); sigmoid in the model \(small\.py:\d+: ",
        ),
        (
            FunctionModel(lambda m, x: m.conv(x).cumsum(1), conv=conv()),
            r"cumsum in the model \(small\.py",
        ),
    ],
    ids=["sigmoid", "tanh", "softplus", "softmax", "two", "cumulative sum"],
)
def test_error_names_unsupported_operations_with_module_and_line(model: nn.Module, problem: str) -> None:
    error = trace_error(model)
    assert error.parameter == "pass_through"
    assert re.search(problem, error.what)
    operation = re.search(r"defined for (\w+)", error.what)
    assert operation is not None
    assert f"`pass_through={operation[1]}" in error.remedy


@pytest.mark.full
def test_operations_whose_gradient_is_accepted_pass() -> None:
    model = Block(nn.SiLU()).double()
    network = trace(model, image(), pass_through=["silu"])
    assert network.operators["conv"].gate is None
    assert_same_outputs(model, network, image(3))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.conv(x)
        return -self.conv(x)


def test_control_flow_that_depends_on_the_data_is_rejected_with_its_line() -> None:
    error = trace_error(Branching())
    assert re.search(r"cannot be exported .* test_rejected_models\.py:\d+.*if x\.sum\(\) > 0.*\(.+\)$", error.what)
    assert "control flow" in error.remedy


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.conv(x).reshape(len(x), -1),
        lambda m, x: m.conv(x).reshape(int(x.shape[0]), -1),
        lambda m, x: torch.stack([one.flatten() for one in m.conv(x)]),
    ],
    ids=["len", "int", "loop"],
)
def test_forward_passes_with_a_fixed_batch_size_are_rejected_with_a_remedy(
    forward: Callable[[FunctionModel, Tensor], object],
) -> None:
    error = trace_error(FunctionModel(forward, conv=conv()))
    assert "batches of 2 only" in error.what
    assert "x.shape[0]" in error.remedy


def test_inputs_that_the_model_does_not_take_are_rejected_with_their_shape() -> None:
    error = trace_error(Block(nn.ReLU()), image(2, channels=4))
    assert re.search(r"input of shape \(4, 8, 8\) \(.*expected input.*channels", error.what)


@pytest.mark.parametrize(
    ("forward", "type_name"),
    [(lambda m, x: (m.conv(x), x), "tuple"), (lambda m, x: {"scores": m.conv(x)}, "dict")],
    ids=["tuple", "dict"],
)
def test_models_that_return_more_than_a_tensor_are_rejected(
    forward: Callable[[FunctionModel, Tensor], object], type_name: str
) -> None:
    error = trace_error(FunctionModel(forward, conv=conv()))
    assert error.what == f"the model returns {type_name}"
    assert "one tensor" in error.remedy
