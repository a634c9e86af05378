"""Tracing: operators, their names, shapes and outputs for ordinary ways to write a model."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patterns import Gate, accumulate, solve, trace
from patterns.operators.operator import Addition, AveragePool, Convolution, Linear, Scale
from tests.patterns.networks import randomize, relative, traced
from tests.patterns.small import FunctionModel, assert_same_outputs, conv, image, trace_gates, trace_network

RELU, RELU6 = Gate(0.0, float("inf")), Gate(0.0, 6.0)
ARCHITECTURES = ["resnet18", "vgg11_bn", "mobilenet_v2", "tf_efficientnet_lite0"]


@pytest.mark.full
@pytest.mark.cases
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tracing_and_folding_keep_the_outputs_at_any_batch_size(name: str) -> None:
    it = traced(name)
    assert_same_outputs(it.model, it.network, it.inputs, it.inputs[:1])


@pytest.mark.full
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_batch_norm_remains_behind_a_convolution(name: str) -> None:
    it = traced(name)
    types = [type(operator.operator_type) for operator in it.network.operators.values()]
    assert Scale not in types
    assert types.count(Convolution) == sum(isinstance(m, nn.Conv2d) for m in it.model.modules())
    assert types.count(Linear) == sum(isinstance(m, nn.Linear) for m in it.model.modules())


@pytest.mark.full
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_operators_are_named_by_their_parameters(name: str) -> None:
    it = traced(name)
    named = [n for n, op in it.network.operators.items() if isinstance(op.operator_type, Convolution | Linear)]
    layers = [n for n, m in it.model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sorted(named) == sorted(layers)
    for operator in it.network.operators.values():
        if isinstance(operator.operator_type, Addition | AveragePool):
            type_name, _, order = operator.name.partition(".")
            assert type_name in {"addition", "average_pool"}
            assert order.isdigit()


@pytest.mark.full
def test_operators_are_in_the_order_of_their_calls() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = conv(4, 2), conv(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))

    assert list(trace_network(Backwards()).operators) == ["first", "last"]


@pytest.mark.full
def test_module_called_twice_is_one_operator_with_the_samples_of_both_calls() -> None:
    torch.manual_seed(0)
    model = FunctionModel(lambda m, x: m.conv(m.conv(x).relu()).relu(), conv=conv(3, 3)).double()
    network, x = trace_network(model), image(3)
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


@pytest.mark.full
def test_module_called_twice_is_gated_only_if_both_calls_are() -> None:
    assert trace_gates(FunctionModel(lambda m, x: m.conv(m.conv(x).relu()), conv=conv(3, 3))) == {"conv": None}


@pytest.mark.full
def test_weight_shared_by_two_modules_is_one_operator() -> None:
    one, two = conv(3, 3), conv(3, 3)
    two.weight, two.bias = one.weight, one.bias
    (name,) = trace_network(nn.Sequential(one, nn.ReLU(), two, nn.ReLU())).operators
    assert name in {"0", "2"}


@pytest.mark.full
def test_separate_batch_norm_is_a_scale_whose_pattern_is_one_over_its_weight() -> None:
    torch.manual_seed(0)
    model = FunctionModel(
        lambda m, x: m.conv(m.norm(torch.cat([x, m.stem(x)], 1)).relu()),
        stem=conv(3, 2), norm=nn.BatchNorm2d(5), conv=conv(5, 2),
    ).double()  # fmt: skip
    randomize(model.norm)
    network, x = trace_network(model), image(4)
    scale = network.operators["norm"]
    assert isinstance(scale.operator_type, Scale)
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


@pytest.mark.cases
@pytest.mark.parametrize("pooling", POOLINGS)
def test_average_pooling_keeps_the_outputs_and_has_weights_of_one_over_k(pooling: str) -> None:
    model = FunctionModel(lambda m, x: POOLINGS[pooling](x)).double()
    x = torch.randn(3, 2, 9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    network = trace_network(model, x[:2])
    assert_same_outputs(model, network, x, x[:1])
    *scales, operator = network.operators.values()
    assert [type(scale.operator_type) for scale in scales] == [Scale] * (pooling == "a divisor of its own")
    assert isinstance(operator.operator_type, AveragePool)
    sums = operator.weight.flatten(1).sum(1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-12, atol=0)


@pytest.mark.full
@pytest.mark.cases
@pytest.mark.parametrize("pooling", POOLINGS)
def test_average_pooling_keeps_its_gradient(pooling: str) -> None:
    model = FunctionModel(lambda m, x: POOLINGS[pooling](x)).double()
    x = torch.randn(2, 2, 9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    network = trace_network(model, x)
    output_gradient = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = []
    for function in (model, network.module):
        inputs = x.clone().requires_grad_()
        gradients += torch.autograd.grad(function(inputs), inputs, output_gradient)
    assert relative(gradients[1], gradients[0]) < 1e-12


FORWARDS: dict[str, tuple[Callable[[FunctionModel, Tensor], object], set[str]]] = {
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


@pytest.mark.full
@pytest.mark.cases
@pytest.mark.parametrize("name", FORWARDS)
def test_ordinary_forward_passes_keep_their_outputs(name: str) -> None:
    forward, expected = FORWARDS[name]
    torch.manual_seed(0)
    model = FunctionModel(forward, conv=conv(), other=conv()).double().eval()
    network = trace_network(model)
    assert set(network.operators) == expected
    assert_same_outputs(model, network, image(3), image(1))


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.matrix = conv(), nn.Parameter(torch.randn(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) @ self.matrix).relu()


@pytest.mark.full
def test_product_with_a_constant_matrix_is_a_linear_operator_with_its_name() -> None:
    torch.manual_seed(0)
    model = FunctionModel(lambda m, x: m.head(x), head=Projected()).double()
    network = trace_network(model)
    assert list(network.operators) == ["head.conv", "head.matrix"]
    operator = network.operators["head.matrix"]
    assert isinstance(operator.operator_type, Linear)
    assert operator.gate == RELU
    assert torch.equal(operator.weight, model.head.matrix.detach().T)
    assert_same_outputs(model, network, image(3), image(1))


def test_operations_that_depend_on_the_batch_size_alone_are_accepted() -> None:
    def forward(m: FunctionModel, x: Tensor) -> Tensor:
        positions = torch.ones(x.shape[0], 4, 8, 8, dtype=x.dtype).cumsum(2).sin()
        return m.conv(x) + positions

    model = FunctionModel(forward, conv=conv()).double()
    network = trace_network(model)
    assert_same_outputs(model, network, image(3), image(1))


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda weights, values: weights @ values,
    "einsum": lambda weights, values: torch.einsum("ncij,ncjk->ncik", weights, values),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_attention_that_is_passed_through_has_the_gradient_of_its_values_alone(product: str) -> None:
    torch.manual_seed(0)
    model = FunctionModel(
        lambda m, x: PRODUCTS[product](m.one(x).softmax(-1), m.two(x)), one=conv(), two=conv()
    ).double()
    network = trace(model, image(), pass_through=["softmax", product])
    x, again = image().requires_grad_(), image().requires_grad_()
    (found,) = torch.autograd.grad(network.module(x).square().sum(), x)
    linearized = PRODUCTS[product](model.one(again).softmax(-1).detach(), model.two(again))
    (expected,) = torch.autograd.grad(linearized.square().sum(), again)
    assert relative(found, expected) < 1e-12


@pytest.mark.full
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [3, (2, 4)])
def test_convolutions_with_padding_by_name_keep_their_outputs(padding: str, kernel: int | tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, kernel, padding=padding), nn.ReLU()).double()
    network = trace_network(model)
    assert list(network.operators) == ["0"]
    assert_same_outputs(model, network, image(3), image(1))


@pytest.mark.parametrize("dims", [1, 3])
def test_convolutions_of_one_and_three_dimensions_keep_their_outputs(dims: int) -> None:
    torch.manual_seed(0)
    layer, norm = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv3d, nn.BatchNorm3d))[dims == 3]
    model = nn.Sequential(layer(2, 4, 3, stride=2, dilation=2, groups=2), norm(4), nn.ReLU()).double()
    randomize(model[1])
    x = torch.randn(3, 2, *[9] * dims, dtype=torch.float64)
    network = trace_network(model, x[:2])
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


def test_tracing_keeps_the_models_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU()).double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trace_network(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.full
def test_model_in_training_mode_is_traced_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.Dropout(0.9), nn.ReLU()).double().train()
    randomize(model[1])
    network = trace_network(model)
    assert_same_outputs(model.eval(), network, image(3))
