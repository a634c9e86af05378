"""Batch norm that is folded into the operator before it, and the gates that follow."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patterns import Gate
from patterns.operators.operator import Scale
from tests.patterns.networks import randomise, traced
from tests.patterns.small import Calls, assert_same_outputs, conv, gates_of, image, network_of

RELU, RELU6 = Gate(0.0, float("inf")), Gate(0.0, 6.0)


def test_folding_multiplies_the_weights_of_a_convolution_by_its_batch_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(), nn.BatchNorm2d(4)).double()
    randomise(model[1])
    operator = network_of(model).operators["0"]
    for k in range(4):
        scale = model[1].weight[k] / (model[1].running_var[k] + model[1].eps) ** 0.5
        torch.testing.assert_close(operator.weight[k], model[0].weight[k].detach() * scale.item(), rtol=1e-12, atol=0)
        bias = (model[0].bias[k] - model[1].running_mean[k]) * scale + model[1].bias[k]
        assert operator.bias is not None
        assert operator.bias[k].item() == pytest.approx(bias.item(), rel=1e-12)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_behind_a_linear_layer_is_folded_too(affine: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4, affine=affine), nn.ReLU()).double()
    randomise(model[1])
    x = torch.randn(6, 5, dtype=torch.float64)
    network = network_of(model, x)
    assert list(network.operators) == ["0"]
    assert network.operators["0"].gate == RELU
    assert_same_outputs(model, network, x, x[:1])


FOLDED: dict[str, tuple[nn.Module, nn.Module, Callable[[Calls, Tensor], object], tuple[int, ...]]] = {
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


@pytest.mark.parametrize("name", FOLDED)
def test_batch_norm_is_folded_wherever_it_scales_the_operators_channels(name: str) -> None:
    layer, norm, forward, shape = FOLDED[name]
    torch.manual_seed(0)
    layer.reset_parameters()  # made on import, with whatever numbers others left
    model = Calls(forward, norm=norm, layer=layer).double()  # in an order that is not that of the calls
    randomise(model.norm)
    x = torch.randn(shape, dtype=torch.float64)
    network = network_of(model, x[:2])
    operator = network.operators["layer"]
    assert "norm" not in network.operators
    assert operator.gate == RELU
    assert_same_outputs(model, network, x, x[:1])


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
def test_batch_norm_of_anything_but_an_operators_channels_is_a_scale_of_its_own(
    layer: nn.Module, features: int, forward: Callable[[Calls, Tensor], object]
) -> None:
    model = Calls(forward, layer=layer, norm=nn.BatchNorm1d(features)).double()
    randomise(model.norm)
    network = network_of(model)
    assert isinstance(network.operators["norm"].operator_type, Scale)
    assert_same_outputs(model, network, image(3), image(1))


def test_batch_norm_is_not_folded_into_an_operator_with_another_user() -> None:
    torch.manual_seed(0)
    model = Calls(lambda m, x: m.norm(y := m.conv(x)).relu() + y, conv=conv(), norm=nn.BatchNorm2d(4)).double()
    randomise(model.norm)
    network = network_of(model)
    assert list(network.operators) == ["conv", "norm", "addition.0"]
    assert_same_outputs(model, network, image(3), image(1))


def test_a_convolution_shared_by_two_batch_norms_keeps_its_weights() -> None:
    torch.manual_seed(0)
    model = Calls(
        lambda m, x: m.one(m.conv(x)).relu() + m.two(m.conv(x + 1)).relu(),
        conv=conv(), one=nn.BatchNorm2d(4), two=nn.BatchNorm2d(4),
    ).double()  # fmt: skip
    randomise(model.one)
    randomise(model.two)
    network = network_of(model)
    assert set(network.operators) == {"conv", "one", "two", "addition.0"}
    assert torch.equal(network.operators["conv"].weight, model.conv.weight)
    assert_same_outputs(model, network, image(3), image(1))


def test_gates_of_a_residual_block_are_its_first_convolution_and_its_addition() -> None:
    operators = traced("resnet18").network.operators
    gates = {name: op.gate for name, op in operators.items()}
    assert gates["conv1"] == RELU  # through max pooling, to which the rectifier is applied first
    for block in ("layer1.0", "layer2.0", "layer4.1"):
        assert gates[f"{block}.conv1"] == RELU
        assert gates[f"{block}.conv2"] is None
    assert gates["layer2.0.downsample.0"] is None
    additions = [name for name in gates if name.startswith("addition")]
    assert len(additions) == 8
    assert all(gates[name] == RELU for name in additions)
    assert gates["fc"] is None


def test_gates_of_inverted_residuals_are_relu6_but_for_their_bottlenecks() -> None:
    gates = {name: op.gate for name, op in traced("mobilenet_v2").network.operators.items()}
    assert gates["features.3.conv.0.0"] == RELU6
    assert gates["features.3.conv.1.0"] == RELU6
    assert gates["features.3.conv.2"] is None
    assert all(gate is None for name, gate in gates.items() if name.startswith("addition"))
    assert gates["classifier.1"] is None


def test_a_gate_is_seen_through_max_pooling_and_shape_changes() -> None:
    assert gates_of(Calls(lambda m, x: F.max_pool2d(m.conv(x), 2).relu(), conv=conv())) == {"conv": RELU}
    assert gates_of(Calls(lambda m, x: m.conv(x).flatten(1).relu(), conv=conv())) == {"conv": RELU}
    joined = Calls(lambda m, x: torch.cat([m.one(x), m.two(x)], 1).relu(), one=conv(), two=conv())
    assert gates_of(joined) == {"one": RELU, "two": RELU}


@pytest.mark.parametrize(
    ("rectifier", "gate"),
    [
        (nn.ReLU(), RELU),
        (nn.ReLU(inplace=True), RELU),
        (nn.ReLU6(), RELU6),
        (nn.ReLU6(inplace=True), RELU6),
        (nn.Hardtanh(-1.0, 2.0), Gate(-1.0, 2.0)),
        (Calls(lambda m, x: F.relu(x)), RELU),
        (Calls(lambda m, x: x.relu_()), RELU),
        (Calls(lambda m, x: x.clamp(min=0)), RELU),
        (Calls(lambda m, x: x.clamp(0, 6)), RELU6),
        (Calls(lambda m, x: x.clamp_min(0)), RELU),
        (Calls(lambda m, x: F.relu6(x)), RELU6),
        (Calls(lambda m, x: F.threshold(x, 0, 0)), RELU),
        (nn.Threshold(0.5, 0.0), Gate(0.5, float("inf"))),
        (Calls(lambda m, x: torch.maximum(x, torch.zeros_like(x))), RELU),
        (Calls(lambda m, x: torch.maximum(torch.tensor(0.0), x)), RELU),
        (Calls(lambda m, x: torch.max(x, torch.zeros(1))), RELU),
        (Calls(lambda m, x: torch.minimum(x, torch.tensor(6.0))), Gate(float("-inf"), 6.0)),
    ],
)
def test_every_way_to_write_a_rectifier_is_a_gate(rectifier: nn.Module, gate: Gate) -> None:
    model = Calls(lambda m, x: m.rectifier(m.conv(x)), conv=conv(), rectifier=rectifier)
    network = network_of(model)
    assert network.operators["conv"].gate == gate
    assert_same_outputs(model, network, 9 * image(3))


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
def test_an_operator_whose_users_do_not_agree_on_a_rectifier_is_ungated(
    forward: Callable[[Calls, Tensor], object],
) -> None:
    assert gates_of(Calls(forward, conv=conv()))["conv"] is None


def test_an_operator_with_the_same_rectifier_on_all_its_users_is_gated() -> None:
    model = Calls(lambda m, x: torch.cat([F.relu(y := m.conv(x)), F.max_pool2d(y, 3, 1, 1).relu()], 1), conv=conv())
    assert gates_of(model) == {"conv": RELU}
