"""Relevance in networks of norms, attention, products and gates sums to the score, less what is known to be lost."""

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patterns import Explainer, Network, accumulate, choose, conservation, solve, trace
from patterns.evaluation.conservation import Loss
from tests.patterns.test_gates import ACTIVATIONS

pytestmark = pytest.mark.full
Activation = Callable[[Tensor], Tensor]
WIDTH = 8


class Mixture(nn.Module):
    """A convolution, group norm, squeeze-and-excitation, pooling, attention and a gated unit, each behind a norm."""

    def __init__(self, activation: Activation, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.activation = activation
        self.stem, self.group = nn.Conv2d(3, WIDTH, 3, bias=bias), nn.GroupNorm(2, WIDTH)
        self.squeeze, self.excite = nn.Linear(WIDTH, 4, bias=bias), nn.Linear(4, WIDTH, bias=bias)
        self.layer, self.rms = nn.LayerNorm(WIDTH, bias=bias), nn.RMSNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=bias), nn.Linear(WIDTH, WIDTH, bias=bias)
        self.up, self.gate, self.down = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(3))
        self.instance, self.out = nn.InstanceNorm1d(WIDTH), nn.Linear(WIDTH, 3, bias=bias)
        self.double()
        for parameter in self.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        if not bias:
            self.group.bias.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.group(self.stem(x)))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))[:, :, None, None]
        x = F.max_pool2d(x, 2).flatten(2).mT
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.layer(x)).chunk(3, -1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.rms(x)
        x = x + self.down(self.activation(self.up(y)) * torch.sigmoid(self.gate(y)))
        return self.out(x.mean(1) + self.instance(x.mT).amax(2))


X = torch.randn(40, 3, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.3
TARGETS = torch.arange(5) % 3


def make(activation: Activation, bias: bool) -> Network:
    return trace(Mixture(activation, bias).eval(), X[:2])


def identity(x: Tensor) -> Tensor:
    return x


def fit(network: Network, estimator: str) -> Mapping[str, Tensor | None]:
    moments = accumulate(network, X.split(20))
    solved = {name: solve(op, moments[name], estimator).patterns for name, op in network.operators.items()}
    return choose(network, solved, estimator)


def shares_of_elements(network: Network, method: str, patterns: Mapping[str, Tensor | None] | None) -> Tensor:
    """Return each element of the maps divided by the target's value, (samples, elements)."""
    found = Explainer(network, patterns, [method])(X[:5], TARGETS)
    return found.maps[method].flatten(1) * 2.0 ** found.exponents[method] / found.scores.gather(1, TARGETS[:, None])


def shares(network: Network, method: str, patterns: Mapping[str, Tensor | None] | None) -> Tensor:
    """Return Σ map / the target's value of each sample."""
    return shares_of_elements(network, method, patterns).sum(1)


def lost(losses: Sequence[Loss], cause: str) -> float:
    return sum(loss.lost for loss in losses if loss.cause == cause)


ONES = torch.ones(5, dtype=torch.float64)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("estimator", ["linear", "filter"])
def test_norms_attention_and_products_lose_nothing(estimator: str, bias: bool) -> None:
    network = make(identity, bias)
    patterns = fit(network, estimator)
    torch.testing.assert_close(shares(network, "patternattribution", patterns), ONES, rtol=0, atol=1e-10)
    losses = conservation(network, patterns, X[:5], TARGETS)
    assert {loss.name for loss in losses if loss.cause == "neuron"} == set(network.operators)
    for loss in losses:
        assert abs(loss.lost) < 1e-10, loss


@pytest.mark.parametrize("gate", ACTIVATIONS, ids=str)
def test_gates_lose_what_is_missing(gate: object) -> None:
    network = make(ACTIVATIONS[gate], bias=True)  # type: ignore[index]
    patterns = fit(network, "two-component-own-mean")
    losses = conservation(network, patterns, X[:5], TARGETS)
    reached = float(shares(network, "patternattribution", patterns).mean())
    largest = max(abs(loss.received) for loss in losses)
    assert abs(1 - sum(loss.lost for loss in losses) - reached) < 1e-10 * largest
    assert abs(lost(losses, "gate")) > 1e-3
    for cause in ("neuron", "border", "other"):
        assert abs(lost(losses, cause)) < 1e-10 * largest, cause


# Each gate is traced for seconds. Its factor is tested in test_gates.py, and its losses above.
@pytest.mark.parametrize(
    "gate", [pytest.param(gate, marks=pytest.mark.slow if i % 3 else ()) for i, gate in enumerate(ACTIVATIONS)], ids=str
)
def test_relevance_sums_to_the_score_without_biases(gate: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """In gradient × input, and in LRP: PatternAttribution with the identity estimator everywhere."""
    network = make(ACTIVATIONS[gate], bias=False)  # type: ignore[index]
    everywhere = dict.fromkeys(network.operators)
    monkeypatch.setattr("patterns.attribution.backward_weights.EPSILON", 0.0)
    for method, patterns in (("gradient-x-input", None), ("patternattribution", everywhere)):
        found = shares_of_elements(network, method, patterns)
        # Relevance of both signs cancels, and its rounding does not.
        assert bool(((found.sum(1) - 1).abs() <= 1e-12 * found.abs().sum(1)).all()), method


def test_stabilizer_of_lrp_loses_its_share_in_each_neuron_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A neuron with the output z loses ε / (|z| + ε) of its relevance."""
    monkeypatch.setattr("patterns.attribution.backward_weights.EPSILON", 1e-3)
    network = make(F.silu, bias=False)
    everywhere = dict.fromkeys(network.operators)
    losses = conservation(network, everywhere, X[:5], TARGETS)
    reached = float(shares(network, "patternattribution", everywhere).mean())
    largest = max(abs(loss.received) for loss in losses)
    assert abs(1 - lost(losses, "neuron") - reached) < 1e-12 * largest
    assert abs(1 - reached) > 1e-5
    for loss in losses:
        assert loss.cause == "neuron" or abs(loss.lost) < 1e-12 * largest
    head = next(loss for loss in losses if loss.name == "out" and loss.cause == "neuron")
    scores = network.module(X[:5]).gather(1, TARGETS[:, None])
    assert abs(head.lost - float((1e-3 / (scores.abs() + 1e-3)).mean())) < 1e-12


NORMS: dict[str, Activation] = {
    "rms_norm": lambda x: F.rms_norm(x, (WIDTH,), eps=1e-3),
    "quotient": lambda x: x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-3),
    "product": lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3),
}


class Normalized(nn.Module):
    """A norm between two linear layers."""

    def __init__(self, norm: Activation) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = norm
        self.first, self.last = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


@pytest.mark.parametrize("form", ["quotient", "product"])
def test_norm_that_a_model_writes_out_has_the_maps_of_the_norm(form: str) -> None:
    x = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    maps: list[dict[str, Tensor]] = []
    for name in ("rms_norm", form):
        network = trace(Normalized(NORMS[name]).eval(), x[:2])
        moments = accumulate(network, x.split(20))
        solved = {name: solve(op, moments[name], "linear").patterns for name, op in network.operators.items()}
        methods = ["patternattribution", "patternnet", "gradient", "gradient-x-input"]
        found = Explainer(network, choose(network, solved, "linear"), methods)(x[:5], TARGETS)
        maps.append({method: found.maps[method] * 2.0 ** found.exponents[method] for method in methods})
    for method, expected in maps[0].items():
        torch.testing.assert_close(maps[1][method], expected, rtol=1e-10, atol=1e-12)
