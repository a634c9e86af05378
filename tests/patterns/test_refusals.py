"""Models that cannot be traced are refused with what is wrong, where, and what to do."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from patterns import UserError, trace
from tests.patterns.small import Calls, assert_same_outputs, conv, image


class Block(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.conv, self.activation = conv(3, 3), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.conv(x))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(Block(nn.ReLU()), Block(nn.SiLU())),
            r"^zoo:net: no pattern is defined for silu in 1\.activation "
            r"\(test_refusals\.py:\d+: return self\.activation\(self\.conv\(x\)\)\)\. "
            r"Pass --pass-through silu to use their gradient\. Supported are convolution, ",
        ),
        (Block(nn.GELU()), r"gelu in activation \(test_refusals\.py:\d+: return self\.activation"),
        (Block(nn.LayerNorm([3, 8, 8])), r"layer_norm in activation \(test_refusals\.py:\d+: return self\.activation"),
        (
            nn.Sequential(Block(nn.Softmax(1)), conv(3, 3)),
            r"softmax in 0\.activation \(test_refusals\.py:\d+: return self\.activation",
        ),
        (
            Calls(lambda m, x: m.conv(x) * m.other(x).sigmoid(), conv=conv(), other=conv()),
            r"sigmoid in the model \(small\.py:\d+: .*\); mul in the model \(small\.py:\d+: ",
        ),
        (
            Calls(lambda m, x: m.conv(x) / m.other(x), conv=conv(), other=conv()),
            r"div in the model \(small\.py",
        ),
    ],
    ids=["silu", "gelu", "layer norm", "softmax", "two", "quotient"],
)
def test_an_operation_without_a_pattern_is_named_with_its_module_and_line(model: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=message):
        trace(model.double(), image(), name="zoo:net")


def test_an_operation_whose_gradient_is_accepted_passes() -> None:
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


def test_control_flow_that_depends_on_the_data_is_refused_with_what_to_change() -> None:
    with pytest.raises(
        UserError,
        match=r"^zoo:net: the model cannot be exported as a graph .*\(.+\)\. Remove control flow that depends",
    ):
        trace(Branching().double(), image(), name="zoo:net")


def test_control_flow_that_depends_on_the_data_is_refused_with_the_line_of_the_model() -> None:
    with pytest.raises(UserError, match=r"test_refusals\.py:\d+.*if x\.sum\(\) > 0"):
        trace(Branching().double(), image(), name="zoo:net")


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.conv(x).reshape(len(x), -1),
        lambda m, x: m.conv(x).reshape(int(x.shape[0]), -1),
        lambda m, x: torch.stack([one.flatten() for one in m.conv(x)]),
    ],
    ids=["len", "int", "loop"],
)
def test_a_forward_that_fixes_the_batch_size_is_refused_with_what_to_change(
    forward: Callable[[Calls, Tensor], object],
) -> None:
    with pytest.raises(
        UserError,
        match=r"^zoo:net: the model takes batches of 2 only, .* Use x\.shape\[0\] in place of len\(x\)",
    ):
        trace(Calls(forward, conv=conv()).double(), image(), name="zoo:net")


def test_an_input_that_the_model_does_not_take_is_refused_with_its_shape() -> None:
    with pytest.raises(
        UserError, match=r"^zoo:net: the model does not take an input of shape \(4, 8, 8\) \(.*expected input.*channels"
    ):
        trace(Block(nn.ReLU()).double(), image(2, channels=4), name="zoo:net")


@pytest.mark.parametrize(
    ("forward", "kind"),
    [(lambda m, x: (m.conv(x), x), "tuple"), (lambda m, x: {"scores": m.conv(x)}, "dict")],
    ids=["tuple", "dict"],
)
def test_a_model_that_returns_more_than_a_tensor_is_refused(
    forward: Callable[[Calls, Tensor], object], kind: str
) -> None:
    with pytest.raises(UserError, match=rf"^zoo:net: the model returns {kind}\. Wrap it to return one tensor"):
        trace(Calls(forward, conv=conv()).double(), image(), name="zoo:net")
