"""Folding of batch norms into the operators before them, and the gates behind them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patterns import Gate
from patterns.operators.operator import Scale
from tests.patterns.networks import randomize, traced
from tests.patterns.small import FunctionModel, assert_same_outputs, conv, image, trace_gates, trace_network

RELU, RELU6 = Gate(0.0, float("inf")), Gate(0.0, 6.0)


@pytest.mark.full
def test_folding_multiplies_the_weights_of_a_convolution_by_its_batch_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(), nn.BatchNorm2d(4)).double()
    randomize(model[1])
    operator = trace_network(model).operators["0"]
    for k in range(4):
        scale = model[1].weight[k] / (model[1].running_var[k] + model[1].eps) ** 0.5
        torch.testing.assert_close(operator.weight[k], model[0].weight[k].detach() * scale.item(), rtol=1e-12, atol=0)
        bias = (model[0].bias[k] - model[1].running_mean[k]) * scale + model[1].bias[k]
        assert operator.bias is not None
        assert operator.bias[k].item() == pytest.approx(bias.item(), rel=1e-12)


@pytest.mark.full
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_behind_a_linear_layer_is_folded(affine: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4, affine=affine), nn.ReLU()).double()
    randomize(model[1])
    x = torch.randn(6, 5, dtype=torch.float64)
    network = trace_network(model, x)
    assert list(network.operators) == ["0"]
    assert network.operators["0"].gate == RELU
    assert_same_outputs(model, network, x, x[:1])


FOLDED: dict[str, tuple[nn.Module, nn.Module, Callable[[FunctionModel, Tensor], object], tuple[int, ...]]] = {
    "tokens transposed": (
        nn.Linear(5, 4), nn.BatchNorm1d(4), lambda m, x: m.norm(m.layer(x).transpose(1, 2)).relu(), (6, 7, 5)
    ),
    "tokens as samples": (
        nn.Linear(5, 4), nn.BatchNorm1d(4),
        lambda m, x: m.norm(m.layer(x).flatten(0, 1)).view(-1, 28).relu(), (6, 7, 5),
    ),
    "flattened": (
        nn.Conv2d(3, 4, 8), nn.BatchNorm1d(4), lambda m, x: m.norm(m.layer(x).flatten(1)).relu(), (6, 3, 8, 8)
    ),
    "positions in a row": (
        nn.Conv2d(3, 4, 3), nn.BatchNorm1d(4),
        lambda m, x: F.dropout(m.norm(m.layer(x).flatten(2)), 0.5, m.training).relu(), (6, 3, 8, 8),
    ),
    "channels last and back": (
        nn.Linear(3, 4), nn.BatchNorm2d(4),
        lambda m, x: m.norm(m.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)).relu(), (6, 3, 8, 8),
    ),
    "other code between": (
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4),
        lambda m, x: ((y := m.layer(x)), (z := x.relu()), m.norm(y).relu() + z.mean(1, True)[:, :, 1:-1, 1:-1])[-1],
        (6, 3, 8, 8),
    ),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("name", FOLDED)
def test_batch_norm_is_folded_if_it_scales_the_operators_channels(name: str) -> None:
    layer, norm, forward, shape = FOLDED[name]
    torch.manual_seed(0)
    layer.reset_parameters()  # it was created on import, with an unknown random state
    model = FunctionModel(forward, norm=norm, layer=layer).double()  # in another order than that of the calls
    randomize(model.norm)
    x = torch.randn(shape, dtype=torch.float64)
    network = trace_network(model, x[:2])
    operator = network.operators["layer"]
    assert "norm" not in network.operators
    assert operator.gate == RELU
    assert_same_outputs(model, network, x, x[:1])


@pytest.mark.full
@pytest.mark.parametrize(
    ("layer", "features", "forward"),
    [
        (conv(), 256, lambda m, x: m.norm(m.layer(x).flatten(1))),
        (conv(), 8, lambda m, x: m.norm(m.layer(x).transpose(1, 2).flatten(2))),
        (conv(3, 8), 8, lambda m, x: m.norm(m.layer(x).transpose(1, 2).flatten(2))),
        (conv(), 4, lambda m, x: m.norm(F.max_pool2d(m.layer(x), 8).flatten(1))),
    ],
    ids=["a number for each value", "rows", "as many rows as channels", "the largest"],
)
def test_batch_norm_of_other_dimensions_is_a_scale_of_its_own(
    layer: nn.Module, features: int, forward: Callable[[FunctionModel, Tensor], object]
) -> None:
    model = FunctionModel(forward, layer=layer, norm=nn.BatchNorm1d(features)).double()
    randomize(model.norm)
    network = trace_network(model)
    assert isinstance(network.operators["norm"].operator_type, Scale)
    assert_same_outputs(model, network, image(3), image(1))


@pytest.mark.full
def test_batch_norm_is_not_folded_into_an_operator_with_other_readers() -> None:
    torch.manual_seed(0)
    model = FunctionModel(lambda m, x: m.norm(y := m.conv(x)).relu() + y, conv=conv(), norm=nn.BatchNorm2d(4)).double()
    randomize(model.norm)
    network = trace_network(model)
    assert list(network.operators) == ["conv", "norm", "addition.0"]
    assert_same_outputs(model, network, image(3), image(1))


@pytest.mark.full
def test_convolution_shared_by_two_batch_norms_keeps_its_weights() -> None:
    torch.manual_seed(0)
    model = FunctionModel(
        lambda m, x: m.one(m.conv(x)).relu() + m.two(m.conv(x + 1)).relu(),
        conv=conv(), one=nn.BatchNorm2d(4), two=nn.BatchNorm2d(4),
    ).double()  # fmt: skip
    randomize(model.one)
    randomize(model.two)
    network = trace_network(model)
    assert set(network.operators) == {"conv", "one", "two", "addition.0"}
    assert torch.equal(network.operators["conv"].weight, model.conv.weight)
    assert_same_outputs(model, network, image(3), image(1))


@pytest.mark.full
def test_residual_blocks_have_gates_at_their_first_convolution_and_their_addition() -> None:
    operators = traced("resnet18").network.operators
    gates = {name: op.gate for name, op in operators.items()}
    assert gates["conv1"] == RELU  # the rectifier comes before the max pooling
    for block in ("layer1.0", "layer2.0", "layer4.1"):
        assert gates[f"{block}.conv1"] == RELU
        assert gates[f"{block}.conv2"] is None
    assert gates["layer2.0.downsample.0"] is None
    additions = [name for name in gates if name.startswith("addition")]
    assert len(additions) == 8
    assert all(gates[name] == RELU for name in additions)
    assert gates["fc"] is None


@pytest.mark.full
def test_inverted_residuals_have_relu6_gates_except_at_their_bottlenecks() -> None:
    gates = {name: op.gate for name, op in traced("mobilenet_v2").network.operators.items()}
    assert gates["features.3.conv.0.0"] == RELU6
    assert gates["features.3.conv.1.0"] == RELU6
    assert gates["features.3.conv.2"] is None
    assert all(gate is None for name, gate in gates.items() if name.startswith("addition"))
    assert gates["classifier.1"] is None


@pytest.mark.full
def test_gates_are_found_behind_max_pooling_and_shape_changes() -> None:
    assert trace_gates(FunctionModel(lambda m, x: F.max_pool2d(m.conv(x), 2).relu(), conv=conv())) == {"conv": RELU}
    assert trace_gates(FunctionModel(lambda m, x: m.conv(x).flatten(1).relu(), conv=conv())) == {"conv": RELU}
    joined = FunctionModel(lambda m, x: torch.cat([m.one(x), m.two(x)], 1).relu(), one=conv(), two=conv())
    assert trace_gates(joined) == {"one": RELU, "two": RELU}


@pytest.mark.full
@pytest.mark.cases
@pytest.mark.parametrize(
    ("rectifier", "gate"),
    [
        (nn.ReLU(), RELU),
        (nn.ReLU(inplace=True), RELU),
        (nn.ReLU6(), RELU6),
        (nn.ReLU6(inplace=True), RELU6),
        (nn.Hardtanh(-1.0, 2.0), Gate(-1.0, 2.0)),
        (FunctionModel(lambda m, x: F.relu(x)), RELU),
        (FunctionModel(lambda m, x: x.relu_()), RELU),
        (FunctionModel(lambda m, x: x.clamp(min=0)), RELU),
        (FunctionModel(lambda m, x: x.clamp(0, 6)), RELU6),
        (FunctionModel(lambda m, x: x.clamp_min(0)), RELU),
        (FunctionModel(lambda m, x: F.relu6(x)), RELU6),
        (FunctionModel(lambda m, x: F.threshold(x, 0, 0)), RELU),
        (nn.Threshold(0.5, 0.0), Gate(0.5, float("inf"))),
        (FunctionModel(lambda m, x: torch.maximum(x, torch.zeros_like(x))), RELU),
        (FunctionModel(lambda m, x: torch.maximum(torch.tensor(0.0), x)), RELU),
        (FunctionModel(lambda m, x: torch.max(x, torch.zeros(1))), RELU),
        (FunctionModel(lambda m, x: torch.minimum(x, torch.tensor(6.0))), Gate(float("-inf"), 6.0)),
    ],
)
def test_every_spelling_of_a_rectifier_is_a_gate(rectifier: nn.Module, gate: Gate) -> None:
    model = FunctionModel(lambda m, x: m.rectifier(m.conv(x)), conv=conv(), rectifier=rectifier)
    network = trace_network(model)
    assert network.operators["conv"].gate == gate
    assert_same_outputs(model, network, 9 * image(3))


@pytest.mark.full
@pytest.mark.cases
@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: (y := m.conv(x)).relu() + y,
        lambda m, x: (y := m.conv(x)).relu() + F.hardtanh(y, 0, 6),
        lambda m, x: torch.cat([(y := m.conv(x)).relu(), F.max_pool2d(y, 3, 1, 1)], 1),
        lambda m, x: F.avg_pool2d(m.conv(x), 2).relu(),
        lambda m, x: (m.conv(x) + 1.0).relu(),
        lambda m, x: m.conv(x),
    ],
    ids=["relu and itself", "relu and relu6", "relu and pooling", "through average pooling", "shifted", "nothing"],
)
def test_operator_whose_consumers_differ_in_their_rectifier_has_no_gate(
    forward: Callable[[FunctionModel, Tensor], object],
) -> None:
    assert trace_gates(FunctionModel(forward, conv=conv()))["conv"] is None


@pytest.mark.full
def test_operator_whose_consumers_share_a_rectifier_has_a_gate() -> None:
    model = FunctionModel(
        lambda m, x: torch.cat([F.relu(y := m.conv(x)), F.max_pool2d(y, 3, 1, 1).relu()], 1), conv=conv()
    )
    assert trace_gates(model) == {"conv": RELU}
