"""Fused layers are split like the same model with a layer for each purpose, and only where that is exact."""

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from patterns import Explainer, Network, UserError, accumulate, choose, solve, trace
from patterns.evaluation.randomization import randomize
from tests.patterns.networks import relative

WIDTH, HEADS, TOKENS = 12, 3, 4
Split = Callable[[nn.Module, Tensor], tuple[Tensor, ...]]


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def take_unbind(m: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """As timm does it."""
    y = m.qkv(x)
    return y.reshape(x.shape[0], TOKENS, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4).unbind(0)


def take_selects(m: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """As torch's MultiheadAttention does it, which moves tokens before images."""
    y = m.qkv(x.transpose(0, 1)).unflatten(-1, (3, WIDTH)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    each = (part.reshape(TOKENS, -1, WIDTH // HEADS).transpose(0, 1) for part in y)
    return tuple(part.view(x.shape[0], HEADS, TOKENS, -1) for part in each)


def take_heads_first(m: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """The rows of one head follow each other: (heads, 3, width of a head)."""
    return tuple(y.squeeze(3).transpose(1, 2) for y in m.qkv(x).unflatten(-1, (HEADS, 3, -1)).split(1, 3))


def take_with_constant_bias(m: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """As BEiT does it: keys have no bias."""
    bias = torch.cat([m.q_bias, torch.zeros_like(m.q_bias), m.v_bias])
    return tuple(map(heads, F.linear(x, m.qkv.weight, bias).chunk(3, -1)))


def take_matrix(m: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(map(heads, (x @ m.qkv.weight.T + m.qkv.bias).split(WIDTH, -1)))


SPLITS: dict[str, Split] = {
    "unbind": take_unbind,
    "chunk": lambda m, x: tuple(map(heads, m.qkv(x).chunk(3, dim=-1))),
    "split": lambda m, x: tuple(map(heads, m.qkv(x).split([WIDTH] * 3, dim=-1))),
    "slices": lambda m, x: tuple(heads(m.qkv(x)[..., i * WIDTH : (i + 1) * WIDTH]) for i in range(3)),
    "selects": take_selects,
    "heads first": take_heads_first,
    "constant bias": take_with_constant_bias,
}


class Attention(nn.Module):
    """Attention whose projection is fused, or has layers of its own with the same weights."""

    def __init__(self, split: Split | None, rows: Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.split = split
        qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)
        if rows is None:
            self.qkv = qkv
        else:
            for name, chosen in zip(("q", "k", "qkv"), rows):
                layer = nn.Linear(WIDTH, WIDTH)
                layer.weight.data, layer.bias.data = qkv.weight[chosen].clone(), qkv.bias[chosen].clone()
                setattr(self, name, layer)
        self.double().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.split is None:
            q, k, v = (heads(layer(y)) for layer in (self.q, self.k, self.qkv))
        else:
            q, k, v = self.split(self, y)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out((x + mixed)[:, 0])


X = torch.randn(3, TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
BY_PURPOSE = torch.arange(3 * WIDTH).view(3, WIDTH)
BY_HEAD = torch.arange(3 * WIDTH).view(HEADS, 3, -1).transpose(0, 1).reshape(3, WIDTH)
METHODS = ["gradient", "gradient-x-input", "patternnet", "patternattribution"]


def explain(network: Network) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the patterns and the maps of a network, with moments of X."""
    moments = accumulate(network, [X])
    solved = {name: solve(op, moments[name], "linear").patterns for name, op in network.operators.items()}
    maps = Explainer(network, choose(network, solved, "linear"), METHODS)(X, 1).maps
    return {name: pattern["linear"] for name, pattern in solved.items()}, maps


@pytest.mark.cases
@pytest.mark.parametrize("name", SPLITS)
def test_patterns_and_maps_are_those_of_separate_layers(name: str) -> None:
    rows = BY_HEAD if name == "heads first" else BY_PURPOSE
    fused, separate = Attention(SPLITS[name]), Attention(None, rows)
    if name == "constant bias":
        zeros = torch.zeros(WIDTH, dtype=torch.float64)
        separate.q.bias.data, separate.k.bias.data, separate.qkv.bias.data = fused.q_bias, zeros, fused.v_bias
    network, expected = trace(fused, X[:2]), trace(separate, X[:2])
    assert network.operators["qkv"].rows == tuple(rows[2].tolist())
    assert torch.equal(network.operators["qkv"].weight, fused.qkv.weight[rows[2]])
    assert list(network.operators) == list(expected.operators)
    for batch in (X, X[:1]):
        torch.testing.assert_close(network.module(batch), fused(batch), rtol=1e-12, atol=1e-14)
    for found, other in zip(explain(network), explain(expected)):
        for key, value in other.items():
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12, msg=key)


def test_layer_whose_bias_is_an_operation_of_its_own_stays_whole() -> None:
    """The bias is added to all rows before they are taken apart."""
    network = trace(Attention(take_matrix), X[:2])
    assert [op.rows for op in network.operators.values() if op.neurons == 3 * WIDTH] == [None]


class Gated(nn.Module):
    """A gated unit whose layer computes the values and their factor, with or without positions behind the channels."""

    def __init__(self, images: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Conv2d(3, 8, 1, bias=False) if images else nn.Linear(3, 8)
        self.down, self.axis = nn.Linear(4, 2), 1 if images else -1
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, self.axis)
        y = value * torch.sigmoid(gate)
        return self.down(y.mean((2, 3)) if self.axis == 1 else y.mean(1))


@pytest.mark.parametrize("images", [False, True])
def test_factor_of_a_gated_unit_has_no_neurons(images: bool) -> None:
    model, x = Gated(images), torch.randn(3, 3, 6, 6, dtype=torch.float64)
    x = x if images else x.flatten(2).mT
    network = trace(model, x[:2])
    assert network.operators["up"].rows == (0, 1, 2, 3)
    torch.testing.assert_close(network.module(x), model(x), rtol=1e-12, atol=1e-14)


class Several(nn.Module):
    """A layer for keys, two kinds of values and a value that is both: `how` chooses what is done with its rows."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.layer, self.out = how, nn.Linear(6, 12), nn.Linear(3, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.how == "two values":
            a, b, c, d = y.chunk(4, -1)
            return self.out((torch.sigmoid(a * b) * torch.relu(c) + d).mean(1))
        if self.how == "two values apart":
            a, b, c, d = y.unflatten(-1, (3, 4)).unbind(-1)
            return self.out((torch.sigmoid(a * c) * torch.relu(b) + d).mean(1))
        if self.how == "called twice":
            a, _, b, _ = y.chunk(4, -1)
            c, _, _, d = self.layer(x.flip(1)).chunk(4, -1)
            return self.out((torch.sigmoid(a) * b + torch.sigmoid(c) * d).mean(1))
        if self.how == "all rows are values":
            a, b, c, d = y.chunk(4, -1)
            return self.out((torch.sigmoid(a) * b + a * torch.sigmoid(b) + c + d).mean(1))
        if self.how == "rows are mixed before they are divided":
            y = y.flip(-1) + y.roll(1, -1)
        a, b, c, d = y.chunk(4, -1)
        first = torch.sigmoid(y[:, 0]).chunk(4, -1)[0] if self.how == "the factor reads all rows" else 1
        return self.out((torch.sigmoid(a) * (b + c + d)).mean(1) * first)


CASES = {
    "two values": tuple(range(6, 12)),
    "two values apart": (1, 3, 5, 7, 9, 11),
    "called twice": tuple(range(6, 12)),
    "all rows are values": None,
    "rows are mixed before they are divided": None,
    "the factor reads all rows": None,
}


@pytest.mark.parametrize("how", CASES)
def test_rows_that_lead_to_relevance_stay_and_outputs_are_the_models(how: str) -> None:
    model, x = Several(how), torch.randn(3, 4, 6, dtype=torch.float64)
    network = trace(model, x[:2])
    assert network.operators["layer"].rows == CASES[how]
    torch.testing.assert_close(network.module(x), model(x), rtol=1e-12, atol=1e-14)
    classes = torch.tensor([0, 1, 0])
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf).gather(1, classes[:, None]).sum(), leaf)
    found = Explainer(network, None, ["gradient"])(x, classes).maps["gradient"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


SMALL = {"img_size": 32, "num_classes": 3, "depth": 1, "embed_dim": 16, "num_heads": 2}
SWIN = {"img_size": 32, "num_classes": 3, "depths": (2,), "embed_dim": 8, "num_heads": (2,), "window_size": 4}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm ViT": lambda: timm.create_model("vit_tiny_patch16_224", **SMALL),
    "timm BEiT": lambda: timm.create_model("beit_base_patch16_224", **SMALL),
    "timm Swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", **SWIN),
    "torchvision ViT": lambda: torchvision.models.VisionTransformer(32, 16, 1, 2, 16, 32, num_classes=3),
    "torchvision Swin": lambda: torchvision.models.SwinTransformer([4, 4], 8, [2], [2], [4, 4], num_classes=3),
}


@pytest.mark.full
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "torchvision Swin" else ()) for n in MODELS]
)
def test_projections_of_vision_transformers_are_split_exactly(name: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]().eval().requires_grad_(False), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)  # heads and biases that begin as zeros would hide errors
    network = trace(model, x[:2])
    fused = {k: op for k, op in network.operators.items() if k.endswith(("qkv", "in_proj_weight"))}
    assert fused
    for key, operator in fused.items():
        weight = dict(model.named_parameters())[key if key.endswith("weight") else f"{key}.weight"]
        assert operator.rows == tuple(range(2 * len(weight) // 3, len(weight)))
        assert torch.equal(operator.weight, weight[-len(weight) // 3 :])
        assert not operator.mixed_gates
    assert relative(network.module(x), model(x)) < 1e-5


def test_patterns_of_a_whole_layer_are_reduced_to_the_rows_of_its_operator() -> None:
    network = trace(Attention(SPLITS["chunk"]), X[:2])
    whole = {name: {"linear": torch.randn(op.weight.shape)} for name, op in network.operators.items()}
    rows = torch.randn(3 * WIDTH, WIDTH)
    chosen = choose(network, {**whole, "qkv": {"linear": rows}}, "linear")
    assert torch.equal(chosen["qkv"], rows[2 * WIDTH :])
    for call in (choose, lambda *args: Explainer(network, {**chosen, "out": rows}, ["patternattribution"])):
        with pytest.raises(UserError, match=r"the pattern has shape \(36, 12\), the weight \(5, 12\)") as caught:
            call(network, {**whole, "out": {"linear": rows}}, "linear")
        assert caught.value.where == "out"


def test_random_weights_keep_the_rows() -> None:
    network = trace(Attention(SPLITS["chunk"]), X[:2])
    other = randomize(network, ["qkv"], torch.Generator().manual_seed(0))
    assert other.operators["qkv"].rows == network.operators["qkv"].rows
