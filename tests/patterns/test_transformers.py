"""Norms, attention and products of activations, in a small transformer, against hand-written autograd."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patterns import Explainer, Network, accumulate, choose, solve, trace
from patterns.tracing.scales import standardized

Detach = Callable[[Tensor], Tensor]
WIDTH, HEADS, TOKENS, CLASSES = 12, 3, 4, 5
# Each returns softmax(q kᵀ) v, and lets `detach` act on the attention weights.
ATTENTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Detach], Tensor]] = {
    "fused": lambda q, k, v, detach: (
        F.scaled_dot_product_attention(q, k, v)
        if detach is not Tensor.detach
        else ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).detach()) @ v
    ),
    "matmul": lambda q, k, v, detach: detach((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)) @ v,
    "einsum": lambda q, k, v, detach: torch.einsum(
        "bhij,bhjd->bhid", detach((torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5).softmax(-1)), v
    ),
}


def keep(x: Tensor) -> Tensor:
    """Detach nothing."""
    return x


class Norm(nn.Module):
    """A norm whose standard deviation can be detached."""

    def __init__(self, kind: str, bias: bool) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.bias = nn.Parameter(torch.randn(WIDTH)) if bias else None

    def forward(self, x: Tensor, detach: Detach) -> Tensor:
        if detach is keep and self.kind == "layer":
            return F.layer_norm(x, (WIDTH,), self.weight, self.bias, 1e-5)
        if detach is keep and self.kind == "rms":
            return F.rms_norm(x, (WIDTH,), self.weight, 1e-5)
        if self.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        y = x / detach((x.square().mean(-1, keepdim=True) + 1e-5).sqrt()) * self.weight
        return y if self.bias is None or self.kind == "rms" else y + self.bias


class Block(nn.Module):
    """A block of a transformer, with a gate for its second branch."""

    def __init__(self, attention: str, norm: str, bias: bool) -> None:
        super().__init__()
        self.attention = ATTENTIONS[attention]
        self.norm1, self.norm2 = Norm(norm, bias), Norm(norm, bias)
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(4))
        self.up, self.gate, self.down = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(3))

    def forward(self, x: Tensor, detach: Detach) -> Tensor:
        h = self.norm1(x, detach)
        q, k, v = (layer(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.proj(self.attention(q, k, v, detach).transpose(1, 2).flatten(2))
        h = self.norm2(x, detach)
        u = self.up(h)
        activated = F.gelu(u) if detach is keep else u * (0.5 * (1 + torch.erf(u / 2**0.5))).detach()
        return x + self.down(activated * detach(torch.sigmoid(self.gate(h))))


class Transformer(nn.Module):
    """A transformer on tokens (N, TOKENS, WIDTH)."""

    def __init__(self, attention: str = "fused", norm: str = "layer", bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(attention, norm, bias) for _ in range(2))
        self.norm, self.head = Norm(norm, bias), nn.Linear(WIDTH, CLASSES, bias=bias)
        self.double()

    def forward(self, x: Tensor, detach: Detach = keep) -> Tensor:
        for block in self.blocks:
            x = block(x, detach)
        return self.head(self.norm(x, detach)[:, 0])


X = torch.randn(3, TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
every_attention = pytest.mark.parametrize("attention", ATTENTIONS)
every_norm = pytest.mark.parametrize("norm", ["layer", "rms"])


def gradient(model: Transformer, classes: Tensor, detach: Detach) -> Tensor:
    x = X.clone().requires_grad_()
    (found,) = torch.autograd.grad(model(x, detach).gather(1, classes[:, None]).sum(), x)
    return found


def identity_everywhere(network: Network) -> dict[str, Tensor | None]:
    return dict.fromkeys(network.operators)


@pytest.mark.cases
@every_attention
@every_norm
def test_gradient_is_the_models_and_gradient_x_input_that_of_constant_factors(attention: str, norm: str) -> None:
    model = Transformer(attention, norm)
    network = trace(model, X[:2])
    torch.testing.assert_close(network.module(X), model(X), rtol=1e-9, atol=1e-9)
    classes = model(X).argmax(1)
    found = Explainer(network, None, ["gradient", "gradient-x-input"])(X, classes).maps
    torch.testing.assert_close(found["gradient"], gradient(model, classes, keep), rtol=1e-8, atol=1e-10)
    expected = gradient(model, classes, Tensor.detach) * X
    torch.testing.assert_close(found["gradient-x-input"], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.cases
@every_attention
@every_norm
def test_relevance_sums_to_the_score_without_biases_and_stabilizer(
    attention: str, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the stabilizer of LRP-ε takes is in test_smooth_conservation."""
    monkeypatch.setattr("patterns.attribution.backward_weights.EPSILON", 0.0)
    network = trace(Transformer(attention, norm, bias=False), X[:2])
    for name, patterns in (("gradient-x-input", None), ("patternattribution", identity_everywhere(network))):
        found = Explainer(network, patterns, [name])(X)
        scores = found.scores.max(1).values
        torch.testing.assert_close(found.maps[name].flatten(1).sum(1), scores, rtol=1e-12, atol=0)


def test_maps_do_not_depend_on_the_other_methods() -> None:
    network = trace(Transformer(), X[:2])
    moments = accumulate(network, [X])
    patterns = choose(network, {n: solve(op, moments[n]).patterns for n, op in network.operators.items()})
    names = ["gradient", "gradient-x-input", "guided-backprop", "patternnet", "patternattribution"]
    together = Explainer(network, patterns, names)(X).maps
    for name in names:
        assert torch.equal(Explainer(network, patterns, [name])(X).maps[name], together[name])


def test_query_and_key_projections_and_gates_have_no_operators() -> None:
    network = trace(Transformer(), X[:2])
    names = set(network.operators)
    assert {"blocks.0.v", "blocks.0.proj", "blocks.0.up", "blocks.0.down", "norm1", "head"} <= {
        *names, *(name.rpartition(".")[2] for name in names)
    }  # fmt: skip
    assert not names & {"blocks.0.q", "blocks.0.k", "blocks.0.gate"}


@pytest.mark.parametrize("place", ["before", "behind", "none"])
def test_neurons_of_residual_additions_are_the_channels_of_tokens(place: str) -> None:
    """A class token does not depend on the input, so it says nothing about where the channels are."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.token = nn.Conv2d(3, WIDTH, 4, stride=4), nn.Parameter(torch.randn(1, 1, WIDTH))
            self.position, self.mix = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Linear(WIDTH, WIDTH)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            token = self.token.expand(x.shape[0], -1, -1)
            x = {"before": torch.cat([token, x], 1), "behind": torch.cat([x, token], 1), "none": x}[place]
            x = x + self.position
            return (x + self.mix(x)).mean(1)

    operator = trace(Tokens(), torch.zeros(2, 3, 8, 8, dtype=torch.float64)).operators["addition.0"]
    assert operator.weight.shape == (WIDTH, 2)
    assert operator.output_shape == (4 if place == "none" else 5, WIDTH)


class OneNorm(nn.Module):
    """A linear layer behind a norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.out = norm, nn.Linear(8, 2, bias=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x).flatten(1))


NORMS = {
    "layer": (nn.LayerNorm(8, elementwise_affine=False), (8,), lambda x: x.flatten(1)),
    "rms": (nn.RMSNorm(8, elementwise_affine=False, eps=1e-6), (8,), lambda x: x.flatten(1)),
    "group": (nn.GroupNorm(2, 4, affine=False), (4, 2), lambda x: x.unflatten(1, (2, 2)).flatten(2)),
    "instance": (nn.InstanceNorm1d(2), (2, 4), lambda x: x),
}


@pytest.mark.parametrize("kind", NORMS)
def test_patternattribution_passes_a_norm_and_patternnet_divides_by_its_factor(kind: str) -> None:
    norm, shape, grouped = NORMS[kind]
    model = OneNorm(norm)
    x = torch.randn(3, *shape, dtype=torch.float64)
    network = trace(model, x[:2])
    torch.testing.assert_close(network.module(x), model(x))
    pattern = torch.randn(2, 8, dtype=torch.float64)
    explainer = Explainer(network, {"out": pattern}, ["patternnet", "patternattribution", "gradient"])
    classes = torch.tensor([0, 1, 0])
    found = explainer(x, classes)
    values = found.scores.gather(1, classes[:, None])
    relevance = (values * (pattern * model.out.weight)[classes]).view_as(x)
    torch.testing.assert_close(found.maps["patternattribution"], relevance.detach(), rtol=1e-12, atol=1e-14)
    parts = grouped(x)
    parts = parts if kind == "rms" else parts - parts.mean(-1, keepdim=True)
    factor = (parts.square().mean(-1, keepdim=True) + (1e-6 if kind == "rms" else 1e-5)).rsqrt().expand_as(parts)
    signal = (values * pattern[classes]).view_as(x) / factor.reshape(x.shape)
    torch.testing.assert_close(found.maps["patternnet"], signal.detach(), rtol=1e-10, atol=1e-12)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf).gather(1, classes[:, None]).sum(), leaf)
    torch.testing.assert_close(found.maps["gradient"], gradient, rtol=1e-10, atol=1e-12)


def test_standardized_equals_torchs_norms() -> None:
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(standardized(x, 1, 0, 1e-5, True), F.layer_norm(x, (5,)))
    torch.testing.assert_close(standardized(x, 2, 0, 1e-5, True), F.layer_norm(x, (6, 5)))
    torch.testing.assert_close(standardized(x, 0, 3, 1e-5, True), F.group_norm(x, 3))
    torch.testing.assert_close(standardized(x, 1, 0, 1e-5, False), F.rms_norm(x, (5,), eps=1e-5))


def test_norms_that_were_passed_through_are_traced_as_before() -> None:
    """Runs of version 0.2 listed them, and have no patterns for their weights."""
    network = trace(Transformer(), X[:2], pass_through=["layer_norm"])
    assert not any("norm" in name for name in network.operators)
