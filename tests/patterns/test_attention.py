"""Grouped heads, Swin's shifted windows and CaiT's class attention: moments and maps against written-out passes."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from patterns import Explainer, Moments, Network, accumulate, choose, solve, trace
from tests.patterns.networks import relative
from tests.patterns.written_out import CLASSES, WRITTEN, Constants, Relevance

pytestmark = pytest.mark.full
every_model = pytest.mark.parametrize("name", WRITTEN)


@cache
def make(name: str) -> tuple[nn.Module, Network, Tensor]:
    """Return a model with random weights, its network, and inputs."""
    torch.manual_seed(0)
    model = WRITTEN[name].make().double().eval().requires_grad_(False)
    for parameter in model.parameters():  # biases, factors and heads that begin as constants would hide errors
        parameter += 0.3 * torch.randn_like(parameter)
    x = torch.randn(6, *WRITTEN[name].shape, dtype=torch.float64)
    return model, trace(model, x[:2]), x


@cache
def fit(name: str) -> dict[str, Moments]:
    _, network, x = make(name)
    return accumulate(network, x.split(4))


def write_out(name: str, x: Tensor, rules: Constants) -> Tensor:
    return WRITTEN[name].forward(make(name)[0], x, rules)


def assert_close(found: Tensor, expected: Tensor, where: object) -> None:
    """Every row, relative to its largest value."""
    bound = 1e-10 * expected.abs().amax(-1, keepdim=True).clamp(min=1e-3)
    assert found.shape == expected.shape, where
    assert bool(((found - expected).abs() <= bound).all()), (where, float((found - expected).abs().max()))


@every_model
def test_moments_are_sums_over_all_tokens_of_what_carries_relevance(name: str) -> None:
    model, network, x = make(name)
    rules = Constants()
    torch.testing.assert_close(write_out(name, x, rules), model(x), rtol=1e-11, atol=1e-12)
    assert rules.samples.keys() == network.operators.keys()
    for key, operator in network.operators.items():
        samples, moments = rules.samples[key], fit(name)[key]
        weight = operator.weight.flatten(1)
        samples = samples.expand(len(weight), -1, -1)
        y = torch.einsum("ksd,kd->ks", samples, weight)
        sides = [(moments.total, torch.ones_like(y))]
        assert (moments.open is not None) == (key in rules.factors)
        if moments.open is not None:
            sides.append((moments.open, rules.factors[key]))
        for sums, g in sides:
            assert_close(sums.n.double(), g.sum(1), key)
            assert_close(sums.y, (g * y).sum(1), key)
            assert_close(sums.yy, (g * y * y).sum(1), key)
            assert sums.x is not None
            assert sums.xy is not None
            xy = torch.einsum("ks,ksd->kd", g * y, samples)
            assert_close(sums.x.expand_as(xy), torch.einsum("ks,ksd->kd", g, samples), key)
            assert_close(sums.xy, xy, key)


@every_model
def test_maps_are_those_of_hand_written_autograd(name: str) -> None:
    _, network, x = make(name)
    solved = {key: solve(op, fit(name)[key]).patterns for key, op in network.operators.items()}
    patterns = choose(network, solved, "own-mean")
    found = Explainer(network, patterns, ["gradient-x-input", "patternattribution"])(x, torch.arange(6) % CLASSES)
    chosen = {key: pattern for key, pattern in patterns.items() if pattern is not None}
    for method, rules in (("gradient-x-input", Constants()), ("patternattribution", Relevance(chosen))):
        leaf = x.clone().requires_grad_()
        scores = write_out(name, leaf, rules).gather(1, torch.arange(6)[:, None] % CLASSES)
        is_relevance = method == "patternattribution"
        start = scores.detach() if is_relevance else torch.ones_like(scores)
        (gradient,) = torch.autograd.grad(scores, leaf, start)
        expected = gradient if is_relevance else gradient * x
        assert found.exponents[method] == 0
        assert relative(found.maps[method], expected) < 1e-10, method
