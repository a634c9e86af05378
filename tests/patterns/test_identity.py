"""The identity estimator in explanations, the presets, and contrastive targets."""

import pytest
import torch
import zennit.rules
from torch import Tensor, nn
from zennit.attribution import Gradient
from zennit.composites import LayerMapComposite

from patterns import PRESETS, Explainer, Network, UserError, accumulate, choose, conservation, contrast, solve, trace
from patterns.estimation import expand_presets

pytestmark = pytest.mark.full

EPSILON = 1e-6


def make_model(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=bias), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(6, 8, 3, stride=2, bias=bias),
        nn.ReLU(), nn.Conv2d(8, 8, 1, bias=bias), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 6, bias=bias), nn.ReLU(), nn.Linear(6, 5, bias=bias),
    ).double()  # fmt: skip


def draw_images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def fit_patterns(network: Network, estimator: str) -> dict[str, Tensor | None]:
    moments = accumulate(network, [draw_images(64)])
    estimators = "linear,two-component,two-component-own-mean"
    solved = {name: solve(op, moments[name], estimators).patterns for name, op in network.operators.items()}
    return choose(network, solved, estimator)


def explain(network: Network, patterns: dict[str, Tensor | None], method: str, targets: Tensor | int) -> Tensor:
    return Explainer(network, patterns, [method])(draw_images(), targets).maps[method]


def test_patternattribution_with_the_identity_everywhere_is_lrp_epsilon() -> None:
    model = make_model()
    network = trace(model, draw_images())
    found = explain(network, dict.fromkeys(network.operators), "patternattribution", 2)
    layers = [
        (zennit.types.Convolution, zennit.rules.Epsilon(epsilon=EPSILON)),
        (nn.Linear, zennit.rules.Epsilon(epsilon=EPSILON)),
        (zennit.types.AvgPool, zennit.rules.Norm(stabilizer=EPSILON)),
        (zennit.types.Activation, zennit.rules.Pass()),
    ]
    # Zennit passes relevance through closed gates as well, where z w R / z = 0 · R / ε is lost in ours.
    with Gradient(model, composite=LayerMapComposite(layers)) as attributor:
        _, expected = attributor(draw_images(), lambda out: out * nn.functional.one_hot(torch.tensor([2] * 4), 5))
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("method", ["patternnet", "patternattribution"])
def test_instance_pattern_satisfies_the_constraint_of_patterns(method: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(7, 3, bias=False).double(), torch.randn(5, 7, dtype=torch.float64)
    found = Explainer(trace(layer, x), {"linear.0": None}, [method])(x, 1).maps[method]
    w, y = layer.weight[1].detach(), x @ layer.weight[1].detach()
    pattern = x / y[:, None]
    torch.testing.assert_close(pattern @ w, torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(found, w * pattern * y[:, None], rtol=1e-4, atol=1e-5)


def test_relevance_is_conserved_through_the_top() -> None:
    network = trace(make_model(bias=False), draw_images())
    patterns = fit_patterns(network, "class-specific")
    top = [name for name, pattern in patterns.items() if pattern is None]
    assert top == ["average_pool.1", "9", "11"]
    losses = {loss.name: loss.lost for loss in conservation(network, patterns, draw_images(), torch.tensor([1] * 4))}
    assert all(abs(losses[name]) < 1e-5 for name in top)


def test_operators_of_two_estimators_keep_their_own_backward_passes() -> None:
    network = trace(make_model(), draw_images())
    own, specific = (fit_patterns(network, name) for name in ("own-mean", "class-specific"))
    methods = ["patternattribution", "patternattribution:x"]
    both = Explainer(network, own, methods, estimators={"x": specific})(draw_images(), 0).maps
    for name, patterns in zip(methods, (own, specific)):
        alone = explain(network, patterns, "patternattribution", 0)
        assert torch.equal(both[name], alone)
    assert not torch.allclose(both[methods[0]], both[methods[1]])


def test_compiled_backward_pass_of_the_identity_is_the_same() -> None:
    network = trace(make_model(), draw_images())
    explainer = Explainer(network, fit_patterns(network, "class-specific"), ["patternattribution"])
    expected = explainer(draw_images(), 0).maps["patternattribution"]
    explainer.compile(4, "default")
    torch.testing.assert_close(explainer(draw_images(), 0).maps["patternattribution"], expected)


def test_presets_name_an_estimator_for_each_operator() -> None:
    network = trace(make_model(), draw_images())
    assert expand_presets("class-specific", network) == [
        "average_pool.1=identity", "9=identity", "11=identity", "two-component-own-mean",
    ]  # fmt: skip
    for name, preset in PRESETS.items():
        assert preset.description.endswith(".")
        assert fit_patterns(network, name).keys() == network.operators.keys()


def test_preset_of_a_network_without_gates_is_the_identity() -> None:
    network = trace(nn.Linear(4, 2).double(), torch.zeros(1, 4, dtype=torch.float64))
    assert expand_presets("class-specific", network) == ["linear.0=identity"]


def test_operator_without_an_entry_is_an_error_that_names_it() -> None:
    network = trace(make_model(), draw_images())
    patterns = dict.fromkeys(network.operators)
    del patterns["3"]
    with pytest.raises(UserError) as caught:
        Explainer(network, patterns, ["patternattribution"])
    assert caught.value.where == "3"


def test_contrast_is_a_class_less_the_weighted_mean_of_the_others() -> None:
    scores = torch.randn(6, 5, dtype=torch.float64)
    classes = torch.tensor([0, 1, 2, 3, 4, 0])
    weights = contrast(scores, classes)
    for row, weight, number in zip(scores, weights, classes.tolist()):
        others = [k for k in range(5) if k != number]
        shares = row[others].exp() / row[others].exp().sum()
        assert weight[number] == 1
        torch.testing.assert_close(weight[others], -shares)
    assert torch.equal(contrast(scores).argmax(1), scores.argmax(1))
