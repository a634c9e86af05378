"""Operator types: their transposes, how tracing reads them, their explanations, and linearized operations."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional as F

from patterns import Explainer, Gate, Network, SmoothGate, UserError, accumulate, trace
from patterns.operators import operator
from patterns.operators.gates import AnyGate
from patterns.operators.operator import Addition, AveragePool, Convolution, Linear, Scale, TransposedConvolution
from tests.oracles import matrix, window_patches
from tests.patterns.cases import STRATEGIES, Case, any_case
from tests.patterns.networks import relative
from tests.patterns.readings import IMAGE, READINGS, TOKENS, conv, normal, parameter, trace_reading
from tests.patterns.small import FunctionModel

cases = settings(max_examples=25, derandomize=True, deadline=None)
RELU = Gate(0.0, float("inf"))


def trace_network(model: nn.Module, x: Tensor, *passed: str) -> Network:
    """Trace a model, and check the outputs at two batch sizes."""
    network = trace(model.double(), x[:2], pass_through=passed)
    with torch.no_grad():
        for batch in (x, x[:1]):
            assert relative(network.module(batch), model(batch)) < 1e-10
    return network


# --- the transpose --------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_input_gradient_is_the_transpose_of_the_forward_pass_for_any_weight(strategy: str) -> None:
    @given(any_case(strategy))
    @cases
    def check(case: Case) -> None:
        assert_transpose(case)

    check()


def assert_transpose(case: Case) -> None:
    inputs = tuple(x.double().requires_grad_() for x in case.inputs)
    pattern = normal(*case.weight.shape, seed=3)
    grad = normal(len(inputs[0]), *case.operator.output_shape, seed=4)
    patches = case.unfold(*inputs)
    y = [patches[k * len(patches) // len(pattern)] @ a for k, a in enumerate(pattern.flatten(1))]
    expected = torch.autograd.grad(torch.stack(y), inputs, grad.movedim(case.operator_type.axis, 0).flatten(1))
    found = case.operator_type.input_gradient(grad, pattern, tuple(tuple(x.shape) for x in inputs))
    for one, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(one, truth, rtol=1e-12, atol=1e-12)


# --- gradients as products ------------------------------------------------------------------------

FORMS = {
    "few neurons, many positions": (3, 5, (9, 8), (1, 1)),
    "many neurons, few positions": (40, 50, (3, 2), (1, 1)),
    "one position": (7, 6, (1, 1), (1, 1)),
    "strided": (4, 5, (9, 8), (2, 3)),
    "many neurons, strided": (40, 50, (7, 4), (3, 2)),
    "of one dimension": (6, 4, (11,), (2,)),
    "of three": (6, 4, (5, 4, 3), (2, 1, 2)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["channels first", "channels last"])
def test_convolutions_over_one_position_have_the_sums_over_patches(
    form: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    k, c, sizes, stride = FORMS[form]
    ones, nothing = (1,) * len(sizes), (0,) * len(sizes)
    x = normal(3, c, *sizes, seed=1)
    convolution = Convolution(stride, nothing, ones)
    grad = normal(*convolution.forward((x,), normal(k, c, *ones), None).shape, seed=2)
    (patches,) = window_patches(x, ones, stride, nothing, ones)
    truth = grad.movedim(1, -1).flatten(0, -2).mT @ patches
    if layout == "channels last":
        x, grad = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, grad))
    calls, product = [], operator.sum_of_products

    def record(*arguments: Tensor) -> Tensor:
        calls.append(arguments)
        return product(*arguments)

    monkeypatch.setattr(operator, "sum_of_products", record)
    found = convolution.weight_gradient((x,), grad, (k, c, *ones))
    assert calls
    assert found.shape == (k, c, *ones)
    assert relative(found.flatten(1), truth) < 1e-14


# --- explanations ---------------------------------------------------------------------------------


def decoder(m: FunctionModel, x: Tensor) -> Tensor:
    y = m.up(x).relu() * m.gain - m.side(x)
    z = (m.tokens(y.flatten(2).transpose(1, 2)) * m.scale).mean(1)
    return m.head(F.leaky_relu(z, 0.1) / 2 - z)


def decoder_model() -> tuple[FunctionModel, Tensor]:
    torch.manual_seed(2)
    model = FunctionModel(
        decoder,
        up=nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        side=nn.ConvTranspose2d(4, 6, 2, stride=2, bias=False),
        tokens=nn.Linear(6, 5), head=nn.Linear(5, 3),
        gain=parameter(6, 1, 1), scale=parameter(5),
    ).double()  # fmt: skip
    return model, normal(3, 4, 3, 3, seed=5)


@pytest.mark.full
def test_maps_with_weights_as_patterns_are_those_of_autograd() -> None:
    model, x = decoder_model()
    network = trace_network(model, x)
    weights = {name: operator.weight for name, operator in network.operators.items()}
    found = Explainer(network, weights, ["gradient", "patternnet"])(x, torch.tensor([2, 0, 1]))
    inputs = x.clone().requires_grad_()
    score = model(inputs).gather(1, torch.tensor([[2], [0], [1]]))
    (expected,) = torch.autograd.grad(score.sum(), inputs)
    assert relative(found.maps["gradient"], expected) < 1e-10
    assert relative(found.maps["patternnet"], expected * score.detach()[..., None, None]) < 1e-10


@pytest.mark.full
def test_maps_are_products_of_explicit_matrices_with_patterns() -> None:
    model, x = decoder_model()
    network = trace_network(model, x)
    assert [type(op.operator_type) for op in network.operators.values()] == [
        TransposedConvolution, Scale, TransposedConvolution, Addition, Linear, AveragePool, Scale, Addition, Linear,
    ]  # fmt: skip
    patterns = {name: normal(*op.weight.shape, seed=n) for n, (name, op) in enumerate(network.operators.items())}
    up, gain, side, sub, tokens, pool, half, last, head = patterns.values()
    found = Explainer(network, patterns, ["patternnet"])(x, torch.tensor([2, 0, 1])).maps["patternnet"]
    for k, target in enumerate([2, 0, 1]):
        z = model.up(x[k : k + 1])
        y = z.relu() * model.gain - model.side(x[k : k + 1])
        t = (model.tokens(y.flatten(2).transpose(1, 2)) * model.scale).mean(1)
        score = model(x[k : k + 1])[0, target].detach()

        def transposed_matrix(layer: nn.ConvTranspose2d, pattern: Tensor) -> Tensor:
            groups = layer.groups
            # torch's layout: input channels first, then the output channels of each group
            own = torch.cat([p.transpose(0, 1) for p in pattern.chunk(groups)])
            options = (layer.stride, layer.padding, layer.output_padding, groups)
            return matrix(lambda v: F.conv_transpose2d(v, own, None, *options), (4, 3, 3))

        gate = (z > 0).double().flatten()
        per_channel = [c.repeat_interleave(36) for c in (gain[:, 0], sub[:, 0], sub[:, 1])]
        jacobian = (per_channel[1] * per_channel[0] * gate)[:, None] * transposed_matrix(model.up, up)
        jacobian = jacobian + per_channel[2][:, None] * transposed_matrix(model.side, side)
        # The mean over the 36 tokens of a linear layer: the pattern of the pool has a number for each channel and token
        jacobian = torch.einsum("dp,dc,cpi->di", pool[:, 0], tokens, jacobian.unflatten(0, (6, 36)))
        slope = torch.where(t[0] > 0, 1.0, 0.1 * torch.ones_like(t[0])) * half[:, 0] * last[:, 0] + last[:, 1]
        jacobian = head @ (slope[:, None] * jacobian)
        assert relative(found[k].flatten(), jacobian[target] * score) < 1e-10


# --- reading of operations ------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.cases
@pytest.mark.parametrize("name", READINGS)
def test_operations_are_read_with_type_and_channels_and_keep_outputs_and_gradient(name: str) -> None:
    it = trace_reading(name)
    found = [
        op.operator_type
        for op in it.network.operators.values()
        if isinstance(op.operator_type, Scale | Addition | AveragePool)
    ]
    assert found == READINGS[name][3]
    assert relative(it.network.module(it.inputs[:1]), it.model(it.inputs[:1])) < 1e-10
    outputs, gradients = [], []
    for function in (it.model, it.network.module):
        inputs = it.inputs.clone().requires_grad_()
        outputs.append(function(inputs))
        gradients += torch.autograd.grad(outputs[-1].square().sum(), inputs)
    assert relative(outputs[1], outputs[0]) < 1e-10
    assert relative(gradients[1], gradients[0]) < 1e-10
    for moments in accumulate(it.network, [it.inputs]).values():
        assert moments.total.yy.isfinite().all()


@pytest.mark.full
@pytest.mark.cases
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_batch_norm_is_folded_into_a_transposed_convolution(dims: int, groups: int) -> None:
    torch.manual_seed(0)
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](6)
    norm.running_mean.normal_()
    norm.weight.data.normal_()
    model = nn.Sequential(layer(4, 6, 3, stride=2, output_padding=1, groups=groups), norm, nn.ReLU())
    network = trace_network(model, normal(3, 4, *[3] * dims))
    assert list(network.operators) == ["0"]
    assert network.operators["0"].weight.shape == (6, 4 // groups, *[3] * dims)
    assert network.operators["0"].gate == RELU


def test_parameter_used_twice_is_one_scale_with_its_name() -> None:
    block = FunctionModel(lambda m, x: (x * m.gamma).relu() * m.gamma, gamma=parameter(4, 1, 1))
    network = trace_network(nn.Sequential(block), normal(*IMAGE))
    assert list(network.operators) == ["0.gamma"]


SLOPES = SmoothGate("prelu", tuple(torch.tensor([0.1, 0.2, 0.3, 0.4]).double().tolist()))
GATES: dict[str, tuple[Callable[[FunctionModel, Tensor], Tensor], AnyGate | None, bool]] = {
    "leaky": (lambda m, x: F.leaky_relu(m.a(x), 0.2), SmoothGate("leaky-relu", (0.2,)), False),
    "prelu": (lambda m, x: m.prelu(m.a(x)), SmoothGate("leaky-relu", (0.25,)), False),
    "prelu of several slopes": (lambda m, x: m.slopes(m.a(x)), SLOPES, False),
    "prelu behind a pool": (lambda m, x: m.slopes(F.max_pool2d(m.a(x), 2)), SLOPES, False),
    "prelu in another shape": (lambda m, x: m.slopes(m.a(x).flatten(2).mT.contiguous().mT), SLOPES, False),
    "prelu of positions": (lambda m, x: m.slopes(m.a(x)[:, :, :4].transpose(1, 2)), None, False),
    "prelu of shuffled channels": (lambda m, x: m.slopes(m.a(x).flip(1)), None, False),
    "prelu in place": (lambda m, x: m.slopes(m.a(x)).mul_(2), SLOPES, False),
    "hardtanh": (lambda m, x: F.hardtanh(m.a(x), -0.5, 2.0), Gate(-0.5, 2.0), False),
    "two alike": (lambda m, x: (y := m.a(x)).relu() + y.clamp(min=0), RELU, False),
    "leaky and not": (lambda m, x: (y := m.a(x)).relu() + F.leaky_relu(y), None, True),
    "two unlike": (lambda m, x: (y := m.a(x)).relu() + F.relu6(y), None, True),
    "one and none": (lambda m, x: (y := m.a(x)).relu() + y, None, True),
    "none": (lambda m, x: m.a(x), None, False),
    "split": (lambda m, x: torch.cat([part.relu() for part in m.a(x).split([1, 3], 1)], 1), RELU, False),
    "chunks": (lambda m, x: torch.cat([part.relu() for part in m.a(x).chunk(2, 1)], 1), RELU, False),
    "one chunk of two": (lambda m, x: (y := m.a(x).chunk(2, 1))[0].relu() + y[1], None, True),
    "chunks unlike": (lambda m, x: (y := m.a(x).chunk(2, 1))[0].relu() + F.relu6(y[1]), None, True),
    "shuffled": (lambda m, x: F.channel_shuffle(m.a(x), 2).relu(), RELU, False),
    "shuffled by hand": (lambda m, x: m.a(x).unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2).relu(), RELU, False),
}


@pytest.mark.full
@pytest.mark.cases
@pytest.mark.parametrize("name", GATES)
def test_gates_depend_on_all_consumers_and_mixed_gates_are_recorded(name: str) -> None:
    forward, gate, mixed = GATES[name]
    slopes = nn.PReLU(4)
    slopes.weight.data = torch.tensor([0.1, 0.2, 0.3, 0.4])
    model = FunctionModel(forward, a=conv(), prelu=nn.PReLU(4), slopes=slopes)
    operator = trace_network(model, normal(*IMAGE)).operators["a"]
    assert (operator.gate, operator.mixed_gates) == (gate, mixed)


# --- linearized operations ------------------------------------------------------------------------


def detached_layer_norm(x: Tensor) -> Tensor:
    y = (x - x.mean(-1, keepdim=True).detach()) / (x.var(-1, correction=0, keepdim=True).detach() + 1e-5).sqrt()
    return y * torch.arange(1.0, 5.0).double() + 0.5


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, (4,), torch.arange(1.0, 5.0).double(), torch.full((4,), 0.5).double())


def detached_group_norm(x: Tensor) -> Tensor:
    groups = [x[:, :2], x[:, 2:]]
    return torch.cat([
        (g - g.mean((1, 2, 3), keepdim=True).detach())
        / (g.var((1, 2, 3), correction=0, keepdim=True).detach() + 1e-5).sqrt()
        for g in groups
    ], 1)  # fmt: skip


WEIGHTS = torch.arange(1.0, 5.0).double()


def detached_instance_norm(x: Tensor) -> Tensor:
    centered = x - x.mean((2, 3), keepdim=True).detach()
    return centered / (x.var((2, 3), correction=0, keepdim=True).detach() + 1e-5).sqrt()


def excited(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True).sigmoid()


Function = Callable[[Tensor], Tensor]
LINEARIZED: dict[str, tuple[Function, Function, tuple[int, ...], tuple[str, ...]]] = {
    "layer norm": (layer_norm, detached_layer_norm, TOKENS, ("layer_norm",)),
    "group norm": (lambda x: F.group_norm(x, 2), detached_group_norm, IMAGE, ("group_norm",)),
    "rms norm": (
        lambda x: F.rms_norm(x, (4,), WEIGHTS, 1e-3),
        lambda x: x / (x.square().mean(-1, keepdim=True).detach() + 1e-3).sqrt() * WEIGHTS, TOKENS, ("rms_norm",),
    ),
    "instance norm": (
        lambda x: F.instance_norm(x, None, None, WEIGHTS, WEIGHTS),
        lambda x: (detached_instance_norm(x) + 1) * WEIGHTS[:, None, None], IMAGE, ("instance_norm",),
    ),
    "attention": (
        lambda x: F.scaled_dot_product_attention(2 * x, x, x.flip(1)),
        lambda x: (2 * x @ x.mT / 2).softmax(-1).detach() @ x.flip(1), TOKENS, ("scaled_dot_product_attention",),
    ),
    "attention written out": (
        lambda x: (x @ x.mT / 2).softmax(-1) @ x, lambda x: (x @ x.mT / 2).softmax(-1).detach() @ x,
        TOKENS, ("matmul", "softmax"),
    ),
    "factorized attention": (
        lambda x: x @ (x.softmax(1).mT @ x), lambda x: x.detach() @ (x.softmax(1).detach().mT @ x),
        TOKENS, ("matmul", "softmax"),
    ),
    "squeeze and excite": (
        lambda x: x * excited(x), lambda x: x * excited(x).detach(), IMAGE, ("mul", "sigmoid"),
    ),
    "gate first": (
        lambda x: x.sigmoid() * x, lambda x: x.sigmoid().detach() * x, IMAGE, ("mul", "sigmoid"),
    ),
    "the smaller": (
        lambda x: x.mean((2, 3), keepdim=True) * x, lambda x: x.mean((2, 3), keepdim=True).detach() * x,
        IMAGE, ("mul",),
    ),
    "silu": (F.silu, F.silu, IMAGE, ("silu",)),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.cases
@pytest.mark.parametrize("name", LINEARIZED)
def test_passed_operations_are_linearized_and_keep_the_outputs(name: str) -> None:
    forward, linearized, shape, passed = LINEARIZED[name]
    model, x = FunctionModel(lambda m, x: forward(x)), normal(*shape) + 0.3
    network = trace_network(model, x, *passed)
    gradients = []
    for function in (linearized, network.module):
        inputs = x.clone().requires_grad_()
        gradients += torch.autograd.grad(function(inputs).square().sum(), inputs)
    assert relative(gradients[1], gradients[0]) < 1e-10


@pytest.mark.full
def test_error_about_unsupported_operations_lists_all_names_to_pass() -> None:
    model = FunctionModel(lambda m, x: m.a(x).tanh().softmax(1) + x, a=conv()).double()
    with pytest.raises(UserError) as caught:
        trace(model, normal(*IMAGE))
    assert caught.value.parameter == "pass_through"
    assert "no pattern is defined for tanh in the model" in caught.value.what
    assert "`pass_through=tanh,softmax`" in caught.value.remedy
