"""Different spellings of one function give the same operator, gate and maps."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import functional as T

from patterns import Explainer, Gate, SmoothGate, UserError, trace
from tests.patterns.small import FunctionModel, assert_same_outputs, conv, image


def leaky(slope: float) -> SmoothGate:
    return SmoothGate("leaky-relu", (slope,))


RELU, SIX, BELOW = Gate(0.0, float("inf")), Gate(0.0, 6.0), Gate(float("-inf"), 0.0)
Function = Callable[[Tensor], Tensor]

# For each spelling: its common form, and the gate of the operator before it.
GATES: dict[str, tuple[Function, Function, Gate | None]] = {
    "clip with two limits": (lambda y: y.clip(0, 6), F.relu6, SIX),
    "clip with one limit": (lambda y: torch.clip(y, min=0), F.relu, RELU),
    "clip in place": (lambda y: y.clone().clip_(0), F.relu, RELU),
    "clamp of tensors": (lambda y: torch.clamp(y, min=torch.tensor(0.0)), F.relu, RELU),
    "maximum": (lambda y: torch.maximum(y, torch.zeros_like(y)), F.relu, RELU),
    "maximum with swapped arguments": (lambda y: torch.maximum(torch.full_like(y, 0.0), y), F.relu, RELU),
    "maximum of ones": (lambda y: torch.minimum(y, torch.ones_like(y)), lambda y: y.clamp(max=1), Gate(-torch.inf, 1)),
    "fmax": (lambda y: torch.fmax(y, torch.zeros((), dtype=y.dtype)), F.relu, RELU),
    "fmin": (lambda y: torch.fmin(y, torch.zeros(1, dtype=y.dtype)), lambda y: y.clamp(max=0), BELOW),
    "rrelu in evaluation": (lambda y: F.rrelu(y, 0.1, 0.3), lambda y: F.leaky_relu(y, 0.2), leaky(0.2)),
    "where": (lambda y: torch.where(y > 0, y, 0.0), F.relu, RELU),
    "where with swapped branches": (lambda y: torch.where(y < 0, torch.zeros_like(y), y), F.relu, RELU),
    "where of a number before": (lambda y: torch.where(y > 0, y, 0.0), F.relu, RELU),
    "where with inverted mask": (lambda y: torch.where(~(y > 0), 0.0, y), F.relu, RELU),
    "leaky where": (lambda y: torch.where(y > 0, y, 0.1 * y), lambda y: F.leaky_relu(y, 0.1), leaky(0.1)),
    "leaky where, branches swapped": (
        lambda y: torch.where(y <= 0, y / 4, y), lambda y: F.leaky_relu(y, 0.25), leaky(0.25)
    ),
    "where above a number": (lambda y: torch.where(y > 1, y, 0.0), lambda y: F.threshold(y, 1, 0), Gate(1, torch.inf)),
    "where below a number": (lambda y: torch.where(y > 6, 6.0, y), lambda y: y.clamp(max=6), Gate(-torch.inf, 6.0)),
    "negative part": (lambda y: y * (y < 0), lambda y: y.clamp(max=0), BELOW),
    "product with a mask": (lambda y: y * (y > 0), F.relu, RELU),
    "product with a mask of floats": (lambda y: (y >= 0).to(y.dtype) * y, F.relu, RELU),
    "product with a step": (lambda y: y * torch.heaviside(y, torch.ones((), dtype=y.dtype)), F.relu, RELU),
    "masked fill": (lambda y: y.masked_fill(y < 0, 0), F.relu, RELU),
    "masked fill in place": (lambda y: y.clone().masked_fill_(y <= 0, 0.0), F.relu, RELU),
    "assignment": (lambda y: assigned(y.clone()), F.relu, RELU),
    "amax": (lambda y: F.relu(y).amax((2, 3), keepdim=True), lambda y: F.adaptive_max_pool2d(F.relu(y), 1), RELU),
    "amax before the rectifier": (
        lambda y: F.relu(y.amax((2, 3), keepdim=True)), lambda y: F.relu(F.adaptive_max_pool2d(y, 1)), RELU
    ),
    "max": (
        lambda y: F.relu(y).flatten(2).max(-1)[0], lambda y: F.adaptive_max_pool2d(F.relu(y), 1).flatten(1), RELU
    ),
    "channels by number": (
        lambda y: F.relu(y[:, [2, 1, 0, -1]]), lambda y: F.relu(torch.cat([y[:, :3].flip(1), y[:, 3:]], 1)), RELU
    ),
    "channels by tensor": (lambda y: F.relu(y[:, torch.tensor([3, 2, 1, 0])]), lambda y: F.relu(y.flip(1)), RELU),
    "einsum of one factor": (lambda y: torch.einsum("nchw->nc", F.relu(y)), lambda y: F.relu(y).sum((2, 3)), RELU),
    "einsum with permutation": (
        lambda y: torch.einsum("nchw->nwc", F.relu(y)), lambda y: F.relu(y).sum(2).permute(0, 2, 1), RELU
    ),
}  # fmt: skip


def assigned(y: Tensor) -> Tensor:
    y[y < 0] = 0.0
    return y


@pytest.mark.full
@pytest.mark.cases
@pytest.mark.parametrize("name", GATES)
def test_spellings_have_the_gate_the_outputs_and_the_maps_of_their_common_form(name: str) -> None:
    spelling, common, gate = GATES[name]
    maps = []
    for function in (spelling, common):
        torch.manual_seed(0)
        model = FunctionModel(lambda m, x, f=function: m.head(f(m.conv(x)).flatten(1)), conv=conv()).double()
        with torch.no_grad():
            features = function(model.conv(image())).flatten(1).shape[1]
        model.head = nn.Linear(features, 3).double()
        network, x = trace(model, image()), image(3)
        assert_same_outputs(model, network, x, x[:1])
        assert network.operators["conv"].gate == gate
        patterns = {n: torch.randn_like(op.weight) for n, op in network.operators.items()}
        explanation = Explainer(network, patterns, ["patternnet", "patternattribution"])(x, 1)
        maps.append(torch.stack(list(explanation.maps.values())))
    torch.testing.assert_close(maps[0], maps[1], rtol=1e-10, atol=1e-12)


REJECTED: dict[str, Function] = {
    "sum with a mask of another value": lambda y: y + (y.flip(1) > 0),
    "choice of another value": lambda y: torch.where(y > 0, y.flip(1), y),
    "absolute value": lambda y: torch.where(y > 0, y, -y),
    "jump at another number": lambda y: torch.where(y > 0, y, 1.0 + y),
    "index of the batch": lambda y: y[[0, 0]],
    "maximum of the batch": lambda y: y.amax(0, keepdim=True).expand_as(y),
}


@pytest.mark.parametrize("name", REJECTED)
def test_lookalikes_of_rectifiers_and_pools_are_rejected(name: str) -> None:
    with pytest.raises(UserError) as caught:
        trace(FunctionModel(lambda m, x: REJECTED[name](m.conv(x)), conv=conv()).double(), image())
    assert ("samples" if "batch" in name else "no pattern is defined for gt") in caught.value.what


BEFORE: dict[str, Function] = {
    "torchvision's normalize": lambda x: T.normalize(x, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]),
    "a mean and a deviation": lambda x: (x - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / 0.25,
    "bytes": lambda x: x / 255,
    "BGR": lambda x: x[:, [2, 1, 0]],
}


@pytest.mark.full
@pytest.mark.parametrize("name", BEFORE)
def test_preprocessing_in_the_forward_pass_is_accepted(name: str) -> None:
    model = FunctionModel(lambda m, x: m.conv(BEFORE[name](x)).relu(), conv=conv()).double()
    network, x = trace(model, image()), image(3)
    assert_same_outputs(model, network, x, x[:1])
    assert network.operators["conv"].gate == RELU
