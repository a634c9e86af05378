from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patterns import Gate, Network, UserError, accumulate, solve, trace
from patterns.operators import Addition, AveragePool, Convolution, Linear, Scale
from tests.patterns.networks import randomise, relative, traced

RELU, RELU6 = Gate(0.0, float("inf")), Gate(0.0, 6.0)
ARCHITECTURES = ["resnet18", "vgg11_bn", "mobilenet_v2", "tf_efficientnet_lite0"]


class Calls(nn.Module):
    """A model of some layers and the function that is its forward pass."""

    def __init__(self, forward: Callable[["Calls", Tensor], object], **layers: nn.Module) -> None:
        super().__init__()
        self.call = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> object:
        return self.call(self, x)


def image(batch: int = 2, channels: int = 3, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, channels, size, size, generator=generator, dtype=torch.float64)


def network_of(model: nn.Module, example: Tensor | None = None) -> Network:
    return trace(model.double(), image() if example is None else example)


def gates_of(model: nn.Module) -> dict[str, Gate | None]:
    return {name: operator.gate for name, operator in network_of(model).operators.items()}


def conv(inner: int = 3, outer: int = 4) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, 3, padding=1)


def assert_same_outputs(model: nn.Module, network: Network, *batches: Tensor) -> None:
    with torch.no_grad():
        for batch in batches:
            assert relative(network.module(batch), model(batch)) < 1e-10


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tracing_and_folding_leave_the_outputs_as_they_were_at_any_batch_size(name: str) -> None:
    it = traced(name)
    assert_same_outputs(it.model, it.network, it.inputs, it.inputs[:1])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_batch_norm_is_left_that_follows_a_convolution(name: str) -> None:
    it = traced(name)
    kinds = [type(operator.kind) for operator in it.network.operators.values()]
    assert Scale not in kinds
    assert kinds.count(Convolution) == sum(isinstance(m, nn.Conv2d) for m in it.model.modules())
    assert kinds.count(Linear) == sum(isinstance(m, nn.Linear) for m in it.model.modules())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_operators_are_named_by_their_parameters(name: str) -> None:
    it = traced(name)
    named = [n for n, op in it.network.operators.items() if isinstance(op.kind, Convolution | Linear)]
    layers = [n for n, m in it.model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sorted(named) == sorted(layers)
    for operator in it.network.operators.values():
        if isinstance(operator.kind, Addition | AveragePool):
            kind, _, order = operator.name.partition(".")
            assert kind in {"addition", "average_pool"}
            assert order.isdigit()


def test_operators_stand_in_the_order_of_their_calls() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = conv(4, 2), conv(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))

    assert list(network_of(Backwards()).operators) == ["first", "last"]


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
    assert isinstance(network.operators["norm"].kind, Scale)
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


def test_a_module_called_twice_is_one_operator_with_the_samples_of_both_calls() -> None:
    torch.manual_seed(0)
    model = Calls(lambda m, x: m.conv(m.conv(x).relu()).relu(), conv=conv(3, 3)).double()
    network, x = network_of(model), image(3)
    assert list(network.operators) == ["conv"]
    assert_same_outputs(model, network, x, x[:1])
    first = F.conv2d(x, model.conv.weight, model.conv.bias, padding=1)
    second = F.conv2d(first.relu(), model.conv.weight, model.conv.bias, padding=1)
    found = accumulate(network, [x])["conv"]
    assert found.open is not None
    for k in range(3):
        y = torch.cat([call[:, k].flatten() - model.conv.bias[k] for call in (first, second)])
        z = y + model.conv.bias[k]
        assert found.total.n[k] == len(y)
        assert found.open.n[k] == (z > 0).sum()
        assert found.total.y[k].item() == pytest.approx(y.sum().item(), rel=1e-10)
        assert found.total.yy[k].item() == pytest.approx((y * y).sum().item(), rel=1e-10)


def test_a_module_called_twice_is_gated_only_if_both_calls_are() -> None:
    assert gates_of(Calls(lambda m, x: m.conv(m.conv(x).relu()), conv=conv(3, 3))) == {"conv": None}


def test_a_weight_that_two_modules_share_is_one_operator() -> None:
    one, two = conv(3, 3), conv(3, 3)
    two.weight, two.bias = one.weight, one.bias
    (name,) = network_of(nn.Sequential(one, nn.ReLU(), two, nn.ReLU())).operators
    assert name in {"0", "2"}


def test_batch_norm_standing_alone_is_a_scale_whose_pattern_is_one_over_its_weight() -> None:
    torch.manual_seed(0)
    model = Calls(
        lambda m, x: m.conv(m.norm(torch.cat([x, m.stem(x)], 1)).relu()),
        stem=conv(3, 2), norm=nn.BatchNorm2d(5), conv=conv(5, 2),
    ).double()  # fmt: skip
    randomise(model.norm)
    network, x = network_of(model), image(4)
    scale = network.operators["norm"]
    assert isinstance(scale.kind, Scale)
    assert scale.gate == RELU
    assert_same_outputs(model, network, x, x[:1])
    expected = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
    torch.testing.assert_close(scale.weight[:, 0], expected.detach(), rtol=1e-12, atol=0)
    patterns = solve(scale, accumulate(network, [x])["norm"], ["linear", "two-component", "filter"]).patterns
    for name, pattern in patterns.items():
        torch.testing.assert_close(pattern, 1 / scale.weight, rtol=1e-9, atol=0, msg=name)


POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "adaptive, divisible": lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
    "adaptive, not divisible": lambda x: F.adaptive_avg_pool2d(x, (4, 7)),
    "adaptive, larger than its input": lambda x: F.adaptive_avg_pool2d(x, (12, 12)),
    "adaptive to one": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive, one side kept": lambda x: F.adaptive_avg_pool2d(x, (None, 4)),
    "mean of positions": lambda x: x.mean((2, 3)),
    "mean of positions, kept": lambda x: x.mean((-1, -2), keepdim=True),
    "padded": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "ceil mode": lambda x: F.avg_pool2d(x, 2, 2, ceil_mode=True),
    "ceil mode, padded": lambda x: F.avg_pool2d(x, (3, 2), (2, 3), (1, 1), ceil_mode=True),
    "padding not counted": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "ceil mode, padding not counted": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
    "a divisor of its own": lambda x: F.avg_pool2d(x, 3, 2, 1, divisor_override=5),
    "one dimension": lambda x: F.avg_pool1d(x.flatten(2), 5, 3, 2, ceil_mode=True, count_include_pad=False),
    "three dimensions": lambda x: F.adaptive_avg_pool3d(x[:, :, None].repeat(1, 1, 3, 1, 1), (2, 4, 5)),
}


@pytest.mark.parametrize("pooling", POOLINGS)
def test_average_pooling_keeps_the_outputs_and_every_window_weighs_one_over_k(pooling: str) -> None:
    model = Calls(lambda m, x: POOLINGS[pooling](x)).double()
    x = torch.randn(3, 2, 9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    network = network_of(model, x[:2])
    assert_same_outputs(model, network, x, x[:1])
    *scales, operator = network.operators.values()
    assert [type(scale.kind) for scale in scales] == [Scale] * (pooling == "a divisor of its own")
    assert isinstance(operator.kind, AveragePool)
    sums = operator.weight.flatten(1).sum(1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-12, atol=0)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradient_of_average_pooling_is_kept(pooling: str) -> None:
    model = Calls(lambda m, x: POOLINGS[pooling](x)).double()
    x = torch.randn(2, 2, 9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    network = network_of(model, x)
    start = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = []
    for function in (model, network.module):
        inputs = x.clone().requires_grad_()
        gradients += torch.autograd.grad(function(inputs), inputs, start)
    assert relative(gradients[1], gradients[0]) < 1e-12


FORWARDS: dict[str, tuple[Callable[[Calls, Tensor], object], set[str]]] = {
    "in place addition": (lambda m, x: m.conv(x).add_(m.other(x)), {"conv", "other", "addition.0"}),
    "weighted addition": (lambda m, x: torch.add(m.conv(x), m.other(x), alpha=0.5), {"conv", "other", "addition.0"}),
    "broadcast addition": (
        lambda m, x: m.conv(x) + m.other(x).mean((2, 3), keepdim=True),
        {"conv", "other", "average_pool.0", "addition.0"},
    ),
    "a value added to itself": (lambda m, x: (y := m.conv(x)) + y, {"conv", "addition.0"}),
    "shifts": (lambda m, x: m.conv(x + 1.5) - 0.5, {"conv"}),
    "shape changes": (lambda m, x: m.conv(x).transpose(1, 2).reshape(x.shape[0], -1)[:, 3:], {"conv"}),
    "padding first": (lambda m, x: m.conv(F.pad(x, (1, 0, 2, 1))), {"conv"}),
    "dropout": (lambda m, x: F.dropout(m.conv(x), 0.5, m.training), {"conv"}),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_ordinary_ways_to_write_a_forward_pass_keep_their_outputs(name: str) -> None:
    forward, expected = FORWARDS[name]
    torch.manual_seed(0)
    model = Calls(forward, conv=conv(), other=conv()).double().eval()
    network = network_of(model)
    assert set(network.operators) == expected
    assert_same_outputs(model, network, image(3), image(1))


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.matrix = conv(), nn.Parameter(torch.randn(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) @ self.matrix).relu()


def test_a_product_with_a_constant_matrix_is_a_linear_operator_named_by_it() -> None:
    torch.manual_seed(0)
    model = Calls(lambda m, x: m.head(x), head=Projected()).double()
    network = network_of(model)
    assert list(network.operators) == ["head.conv", "head.matrix"]
    operator = network.operators["head.matrix"]
    assert isinstance(operator.kind, Linear)
    assert operator.gate == RELU
    assert torch.equal(operator.weight, model.head.matrix.detach().T)
    assert_same_outputs(model, network, image(3), image(1))


def test_what_depends_on_the_batch_size_alone_is_not_refused() -> None:
    def forward(m: Calls, x: Tensor) -> Tensor:
        places = torch.ones(x.shape[0], 4, 8, 8, dtype=x.dtype).cumsum(2).sin()
        return m.conv(x) + places

    model = Calls(forward, conv=conv()).double()
    network = network_of(model)
    assert_same_outputs(model, network, image(3), image(1))


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda weights, values: weights @ values,
    "einsum": lambda weights, values: torch.einsum("ncij,ncjk->ncik", weights, values),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_attention_passed_through_has_the_gradient_of_its_values_alone(product: str) -> None:
    torch.manual_seed(0)
    model = Calls(lambda m, x: PRODUCTS[product](m.one(x).softmax(-1), m.two(x)), one=conv(), two=conv()).double()
    network = trace(model, image(), pass_through=["softmax", product])
    x, again = image().requires_grad_(), image().requires_grad_()
    (found,) = torch.autograd.grad(network.module(x).square().sum(), x)
    held = PRODUCTS[product](model.one(again).softmax(-1).detach(), model.two(again))
    (expected,) = torch.autograd.grad(held.square().sum(), again)
    assert relative(found, expected) < 1e-12


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [3, (2, 4)])
def test_convolutions_with_padding_by_name_keep_their_outputs(padding: str, kernel: int | tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, kernel, padding=padding), nn.ReLU()).double()
    network = network_of(model)
    assert list(network.operators) == ["0"]
    assert_same_outputs(model, network, image(3), image(1))


@pytest.mark.parametrize("dims", [1, 3])
def test_convolutions_of_one_and_three_dimensions_keep_their_outputs(dims: int) -> None:
    torch.manual_seed(0)
    layer, norm = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv3d, nn.BatchNorm3d))[dims == 3]
    model = nn.Sequential(layer(2, 4, 3, stride=2, dilation=2, groups=2), norm(4), nn.ReLU()).double()
    randomise(model[1])
    x = torch.randn(3, 2, *[9] * dims, dtype=torch.float64)
    network = network_of(model, x[:2])
    assert list(network.operators) == ["0"]
    assert_same_outputs(model, network, x, x[:1])


def test_operators_know_their_shapes_without_the_batch() -> None:
    operators = traced("resnet18").network.operators
    assert operators["conv1"].input_shapes == ((3, 64, 64),)
    assert operators["conv1"].output_shape == (64, 32, 32)
    assert operators["addition.0"].input_shapes == ((64, 16, 16), (64, 16, 16))
    assert operators["fc"].input_shapes == ((512,),)
    assert operators["fc"].output_shape == (10,)
    assert operators["layer1.0.conv1"].neurons == 64
    assert operators["layer1.0.conv1"].inputs_per_neuron == 576


def test_tracing_leaves_the_models_parameters_as_they_were() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU()).double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    network_of(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_in_training_mode_is_traced_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.Dropout(0.9), nn.ReLU()).double().train()
    randomise(model[1])
    network = network_of(model)
    assert_same_outputs(model.eval(), network, image(3))


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
            r"\(test_graph\.py:\d+: return self\.activation\(self\.conv\(x\)\)\)\. "
            r"Pass --pass-through silu to use their gradient\. Supported are convolution, ",
        ),
        (Block(nn.GELU()), r"gelu in activation \(test_graph\.py:\d+: return self\.activation"),
        (Block(nn.LayerNorm([3, 8, 8])), r"layer_norm in activation \(test_graph\.py:\d+: return self\.activation"),
        (Block(nn.Softmax(1)), r"softmax in activation \(test_graph\.py:\d+: return self\.activation"),
        (
            Calls(lambda m, x: m.conv(x) * m.other(x).sigmoid(), conv=conv(), other=conv()),
            r"sigmoid in the model \(test_graph\.py:\d+: .*\); mul in the model \(test_graph\.py:\d+: ",
        ),
        (Calls(lambda m, x: m.conv(x) / m.other(x), conv=conv(), other=conv()), r"div in the model \(test_graph\.py"),
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
    with pytest.raises(UserError, match=r"test_graph\.py:\d+.*if x\.sum\(\) > 0"):
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
