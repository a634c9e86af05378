"""The explainer against autograd, zennit, captum and products of explicit matrices."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from captum.attr import Saliency
from torch import Tensor, nn
from torch.nn import functional as F
from zennit.attribution import Gradient

from patterns import Explainer, Network, UserError, accumulate, choose, solve, trace
from tests.oracles import Value, explanation
from tests.patterns.networks import PASSES, randomize, relative, traced

LONG = [pytest.param(name, marks=pytest.mark.slow) for name in ("densenet121", "tf_efficientnet_lite0")]
ARCHITECTURES = ["vgg11", "resnet18", *LONG]
EVERY_METHOD = tuple(PASSES)
LINEAR = "gradient", "patternnet", "patternattribution"
Weights = Mapping[str, Tensor]


def weights_of(network: Network) -> dict[str, Tensor]:
    return {name: operator.weight for name, operator in network.operators.items()}


def gradient(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    inputs = inputs.clone().requires_grad_()
    score = model(inputs)[range(len(inputs)), targets].sum()
    return torch.autograd.grad(score, inputs)[0]


@pytest.mark.full
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_as_patterns_give_the_models_own_gradient(name: str) -> None:
    it = traced(name)
    inputs, targets = it.inputs[:2], torch.tensor([3, 7])
    found = Explainer(it.network, weights_of(it.network), ["gradient", "patternnet"])(inputs, targets)
    expected = gradient(it.model.eval(), inputs, targets)
    assert relative(found.maps["gradient"], expected) < 1e-10
    scores = found.scores[range(2), targets].reshape(-1, 1, 1, 1)
    assert relative(found.maps["patternnet"], scores * expected) < 1e-10
    for k in range(2):  # a difference in the smaller map must not vanish in the norm of the larger
        assert relative(found.maps["gradient"][k], expected[k]) < 1e-10


@pytest.mark.full
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_patternattribution_with_ones_as_patterns_is_gradient_times_score(name: str) -> None:
    it = traced(name)
    inputs, targets = it.inputs[2:], torch.tensor([1])
    ones = {name: torch.ones_like(weight) for name, weight in weights_of(it.network).items()}
    found = Explainer(it.network, ones, ["patternattribution"])(inputs, targets)
    expected = gradient(it.model.eval(), inputs, targets) * found.scores[0, 1]
    assert relative(found.maps["patternattribution"], expected) < 1e-10


@pytest.mark.full
def test_gradient_agrees_with_zennit_and_captum() -> None:
    it = traced("resnet18")
    model, inputs, targets = it.model.eval(), it.inputs[:2], torch.tensor([0, 9])
    found = Explainer(it.network, None, ["gradient"])(inputs, targets).maps["gradient"]
    with Gradient(model) as attributor:
        _, zennit = attributor(inputs, torch.eye(10, dtype=torch.float64)[targets])
    captum = Saliency(model).attribute(inputs.clone().requires_grad_(), targets, abs=False)
    assert relative(found, zennit) < 1e-10
    assert relative(found, captum) < 1e-10


# --- small networks and their explicit matrices ---------------------------------------------------


def convolution(stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1) -> Callable[..., Tensor]:
    return lambda x, w: F.conv2d(x, w, None, stride, padding, dilation, groups)


def average(window: int, stride: int, padding: int) -> Callable[..., Tensor]:
    def pool(x: Tensor, w: Tensor) -> Tensor:
        # One row per position holds the values of its window, in the order of the weights.
        windows = F.unfold(x, window, padding=padding, stride=stride).unflatten(1, (x.shape[1], -1))
        sizes = [(n + 2 * padding - window) // stride + 1 for n in x.shape[2:]]
        return (windows * w.flatten(1)[..., None]).sum(2).unflatten(2, sizes)

    return pool


def matmul(x: Tensor, w: Tensor) -> Tensor:
    return (w @ x[..., None])[..., 0]


def per_channel(x: Tensor, w: Tensor) -> Tensor:
    return x * w[:, :, None]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.one = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.two = nn.Conv2d(4, 4, 1, bias=False)
        self.head = nn.Linear(4 * 3 * 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (self.two(self.one(x).relu()) + x).relu()
        return self.head(F.avg_pool2d(x, 2).flatten(1))


def residual(m: Residual, w: Weights) -> Callable[[Value, Weights], Value]:
    def network(x: Value, backward: Weights) -> Value:
        x = x.linear(convolution(padding=1), w["stem"], backward["stem"], m.stem.bias).rectified()
        branch = x.linear(convolution(padding=1, groups=2), w["one"], backward["one"], m.one.bias).rectified()
        branch = branch.linear(convolution(), w["two"], backward["two"])
        x = branch.plus(x, backward["addition.0"]).rectified()
        x = x.linear(average(2, 2, 0), w["average_pool.0"], backward["average_pool.0"])
        return x.flattened().linear(matmul, w["head"], backward["head"], m.head.bias)

    return network


def residual_weights(m: Residual) -> dict[str, Tensor]:
    return {
        "stem": m.stem.weight,
        "one": m.one.weight,
        "two": m.two.weight,
        "addition.0": torch.ones(4, 2, dtype=torch.float64),
        "average_pool.0": torch.full((4, 1, 2, 2), 0.25, dtype=torch.float64),
        "head": m.head.weight,
    }


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.folded_norm, self.relu6 = nn.Conv2d(2, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU6()
        self.narrow, self.wide = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 3, 3, padding=2, dilation=2, bias=False)
        self.norm = nn.BatchNorm2d(5)
        self.twice = nn.Conv2d(5, 5, 1, groups=5)
        self.head = nn.Linear(5, 3)
        randomize(self.folded_norm)
        randomize(self.norm)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.relu6(self.folded_norm(self.stem(x))), 2, 1)
        x = self.norm(torch.cat([self.narrow(x), self.wide(x)], 1)).relu()
        x = self.twice(self.twice(x).relu())
        return self.head(F.avg_pool2d(x, 3, 2, 1).mean((2, 3)))


def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale


def mixed(m: Mixed, w: Weights) -> Callable[[Value, Weights], Value]:
    scale, shift = scale_and_shift(m.folded_norm)
    _, norm_shift = scale_and_shift(m.norm)

    def network(x: Value, backward: Weights) -> Value:
        x = x.linear(convolution(stride=2), w["stem"], backward["stem"], m.stem.bias * scale + shift).rectified(0, 6)
        x = x.max_pooled(2, 1)
        narrow = x.linear(convolution(), w["narrow"], backward["narrow"], m.narrow.bias)
        wide = x.linear(convolution(padding=2, dilation=2), w["wide"], backward["wide"])
        x = narrow.concatenate(wide).linear(per_channel, w["norm"], backward["norm"], norm_shift).rectified()
        x = x.linear(convolution(groups=5), w["twice"], backward["twice"], m.twice.bias).rectified()
        x = x.linear(convolution(groups=5), w["twice"], backward["twice"], m.twice.bias)
        x = x.linear(average(3, 2, 1), w["average_pool.0"], backward["average_pool.0"])
        x = x.linear(average(x.value.shape[-1], 1, 0), w["average_pool.1"], backward["average_pool.1"])
        return x.flattened().linear(matmul, w["head"], backward["head"], m.head.bias)

    return network


def mixed_weights(m: Mixed) -> dict[str, Tensor]:
    return {
        "stem": m.stem.weight * scale_and_shift(m.folded_norm)[0].reshape(-1, 1, 1, 1),
        "narrow": m.narrow.weight,
        "wide": m.wide.weight,
        "norm": scale_and_shift(m.norm)[0][:, None],
        "twice": m.twice.weight,
        "average_pool.0": torch.full((5, 1, 3, 3), 1 / 9, dtype=torch.float64),
        "average_pool.1": torch.full((5, 1, 2, 2), 1 / 4, dtype=torch.float64),
        "head": m.head.weight,
    }


@dataclass(frozen=True)
class Small:
    network: Network
    inputs: Tensor
    targets: Tensor
    weights: dict[str, Tensor]
    patterns: dict[str, Tensor]
    as_matrices: Callable[[Value, Weights], Value]


def small(name: str) -> Small:
    """Return a network, random patterns for it, and the network as explicit matrices."""
    torch.manual_seed(11)
    inputs = 3 * torch.randn(4, 2, 6 if name == "residual" else 9, 6 if name == "residual" else 9, dtype=torch.float64)
    if name == "residual":
        model: nn.Module = Residual().double().requires_grad_(False)
        weights, as_matrices = residual_weights(model), residual(model, residual_weights(model))  # type: ignore[arg-type]
    else:
        model = Mixed().double().requires_grad_(False)
        model.stem.weight.mul_(3)
        weights, as_matrices = mixed_weights(model), mixed(model, mixed_weights(model))  # type: ignore[arg-type]
    network = trace(model, inputs[:1])
    patterns = {name: torch.randn(weight.shape, dtype=torch.float64) for name, weight in weights.items()}
    return Small(network, inputs, torch.tensor([2, 0, 1, 2]), weights, patterns, as_matrices)


@pytest.mark.full
@pytest.mark.parametrize("name", ["residual", "mixed"])
def test_network_as_matrices_gives_the_same_scores(name: str) -> None:
    it = small(name)
    assert {name: w.shape for name, w in weights_of(it.network).items()} == {n: w.shape for n, w in it.weights.items()}
    scores = it.network.module(it.inputs)
    for x, row in zip(it.inputs, scores):
        value = it.as_matrices(Value(x, torch.eye(x.numel(), dtype=torch.float64)), it.weights).value
        torch.testing.assert_close(row, value, rtol=1e-10, atol=1e-12)


@pytest.mark.full
@pytest.mark.cases
@pytest.mark.parametrize("name", ["residual", "mixed"])
@pytest.mark.parametrize("method", LINEAR)
def test_backward_pass_equals_the_product_of_explicit_matrices(name: str, method: str) -> None:
    it = small(name)
    backward = {
        "gradient": it.weights,
        "patternnet": it.patterns,
        "patternattribution": {name: w * it.patterns[name] for name, w in it.weights.items()},
    }[method]
    gradient = 1.0 if method == "gradient" else None
    expected = explanation(it.as_matrices, backward, it.inputs, it.targets, gradient)
    found = Explainer(it.network, it.patterns, [method])(it.inputs, it.targets).maps[method]
    for f, e in zip(found, expected):
        assert relative(f, e) < 1e-10


@pytest.mark.full
@pytest.mark.cases
@pytest.mark.parametrize("changed", ["head", "addition.0", "average_pool.0", "one", "stem"])
def test_every_operators_pattern_changes_the_map(changed: str) -> None:
    it = small("residual")
    before = Explainer(it.network, it.patterns, ["patternnet"])(it.inputs, it.targets).maps["patternnet"]
    other = it.patterns | {changed: it.patterns[changed] + 0.5}
    after = Explainer(it.network, other, ["patternnet"])(it.inputs, it.targets).maps["patternnet"]
    assert relative(after, before) > 1e-3


# --- laws -----------------------------------------------------------------------------------------


def one_layer() -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(5)
    layer = nn.Linear(4, 3).double().requires_grad_(False)
    return layer, torch.randn(3, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)


def test_output_gradient_is_the_targets_value_and_1_for_the_gradient() -> None:
    layer, pattern, x = one_layer()
    network = trace(nn.Sequential(layer), x)
    maps = Explainer(network, {"0": pattern}, EVERY_METHOD)(x, torch.tensor([2, 1])).maps
    for k, target in enumerate([2, 1]):
        score = layer.weight[target] @ x[k] + layer.bias[target]
        torch.testing.assert_close(maps["gradient"][k], layer.weight[target])
        torch.testing.assert_close(maps["patternnet"][k], pattern[target] * score)
        torch.testing.assert_close(maps["patternattribution"][k], layer.weight[target] * pattern[target] * score)


@pytest.mark.full
def test_default_target_is_the_predicted_class() -> None:
    it = small("residual")
    found = Explainer(it.network, it.patterns, ["patternnet"])(it.inputs)
    assert torch.equal(found.targets, found.scores.argmax(1))
    torch.testing.assert_close(found.scores, it.network.module(it.inputs), rtol=1e-12, atol=1e-12)
    named = Explainer(it.network, it.patterns, ["patternnet"])(it.inputs, found.targets)
    torch.testing.assert_close(found.maps["patternnet"], named.maps["patternnet"], rtol=1e-12, atol=1e-12)
    assert len(set(found.targets.tolist())) > 1


@pytest.mark.full
@pytest.mark.cases
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_map_does_not_depend_on_other_samples_or_their_targets(method: str) -> None:
    it = small("mixed")
    explainer = Explainer(it.network, it.patterns, [method])
    maps = explainer(it.inputs, it.targets).maps[method]
    for k in range(len(it.inputs)):
        alone = explainer(it.inputs[k : k + 1], it.targets[k : k + 1]).maps[method][0]
        assert relative(maps[k], alone) < 1e-12
    targets = torch.cat([it.targets[:1], (it.targets[1:] + 1) % 3])
    others = torch.cat([it.inputs[:1], -2 * it.inputs[1:]])
    assert relative(explainer(others, targets).maps[method][0], maps[0]) < 1e-12


@pytest.mark.full
def test_several_methods_in_one_pass_equal_each_alone() -> None:
    it = small("mixed")
    together = Explainer(it.network, it.patterns, EVERY_METHOD)
    for _ in range(2):  # the second time shows that an explainer keeps no state
        maps = together(it.inputs, it.targets).maps
        assert list(maps) == list(EVERY_METHOD)
        for method in EVERY_METHOD:
            alone = Explainer(it.network, it.patterns, [method])(it.inputs, it.targets).maps[method]
            assert relative(maps[method], alone) < 1e-12
    assert relative(maps["patternnet"], maps["patternattribution"]) > 1e-3
    assert relative(maps["patternnet"], maps["gradient"]) > 1e-3


@pytest.mark.full
def test_two_explainers_of_one_network_do_not_disturb_each_other() -> None:
    it = small("residual")
    one = Explainer(it.network, it.patterns, ["patternnet"])
    before = one(it.inputs, it.targets).maps["patternnet"]
    Explainer(it.network, it.weights, ["patternnet"])(it.inputs, it.targets)
    assert torch.equal(one(it.inputs, it.targets).maps["patternnet"], before)


def test_patternnet_of_the_toy_model_is_the_signal_without_the_distractor() -> None:
    signal, distractor = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[1.0, 1.0]]).double()
    s, d = torch.cartesian_prod(torch.tensor([-2.0, -1.0, 1.5]), torch.tensor([-3.0, 1.0, 2.0])).double().unbind(1)
    x = s[:, None] * signal + d[:, None] * distractor
    model = nn.Sequential(nn.Linear(2, 1, bias=False)).double()
    model[0].weight.data.copy_(torch.tensor([[1.0, -1.0]]))
    network = trace(model, x)
    solution = solve(network.operators["0"], accumulate(network, [x])["0"])
    patterns = choose(network, {"0": solution.patterns}, "paper")
    maps = Explainer(network, patterns, ["patternnet"])(x).maps["patternnet"]
    torch.testing.assert_close(maps, s[:, None] * signal, rtol=1e-10, atol=1e-12)


@pytest.mark.full
def test_patterns_are_converted_to_the_networks_precision() -> None:
    it = small("residual")
    halves = {name: pattern.float() for name, pattern in it.patterns.items()}
    found = Explainer(it.network, halves, ["patternnet"])(it.inputs, it.targets).maps["patternnet"]
    exact = {name: pattern.double() for name, pattern in halves.items()}
    expected = Explainer(it.network, exact, ["patternnet"])(it.inputs, it.targets).maps["patternnet"]
    assert torch.equal(found, expected)


@pytest.mark.full
def test_explaining_leaves_inputs_and_network_without_gradients() -> None:
    it = small("residual")
    Explainer(it.network, it.patterns, EVERY_METHOD)(it.inputs, it.targets)
    assert not it.inputs.requires_grad
    assert not any(t.requires_grad for t in it.network.module.state_dict().values())


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("method", ["patternnet", "patternattribution"])
def test_missing_pattern_is_rejected_by_operator_name(method: str) -> None:
    it = small("residual")
    fewer = {name: p for name, p in it.patterns.items() if name != "two"}
    with pytest.raises(UserError, match="no pattern") as caught:
        Explainer(it.network, fewer, [method])
    assert caught.value.where == "two"


@pytest.mark.full
def test_gradient_needs_no_patterns() -> None:
    it = small("residual")
    without = Explainer(it.network, None, ["gradient"])(it.inputs, it.targets).maps["gradient"]
    found = Explainer(it.network, it.patterns, ["gradient"])(it.inputs, it.targets).maps["gradient"]
    assert torch.equal(without, found)


@pytest.mark.full
def test_pattern_of_another_shape_is_rejected_by_operator_name() -> None:
    it = small("residual")
    wrong = it.patterns | {"one": it.patterns["one"][:, :1]}
    with pytest.raises(UserError) as caught:
        Explainer(it.network, wrong, ["patternnet"])
    assert caught.value.where == "one"
    assert "(4, 1, 3, 3)" in caught.value.what
    assert "(4, 2, 3, 3)" in caught.value.what


@pytest.mark.full
def test_unknown_method_is_rejected_by_name() -> None:
    it = small("residual")
    with pytest.raises(UserError, match="no method 'lrp'") as caught:
        Explainer(it.network, it.patterns, ["patternnet", "lrp"])
    assert caught.value.parameter == "methods"
