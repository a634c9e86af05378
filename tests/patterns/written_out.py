"""Transformers with attention of three kinds, and their forward passes written out with explanation rules.

Each pass names its operators as `patterns.trace` does, and records what their neurons see.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from timm.models.cait import Cait
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import SwinTransformer

CLASSES = 3


class Constants:
    """Rules of CP-LRP: factors are constants. A map is the gradient times the input.

    Attributes:
        samples: What the neurons of each operator see: patches (K or 1, samples, D).
        factors: The factors g of its neurons' gates, (K, samples).
    """

    def __init__(self) -> None:
        self.samples: dict[str, Tensor] = {}
        self.factors: dict[str, Tensor] = {}

    def operator(self, name: str, weight: Tensor, apply: Callable[[Tensor], Tensor]) -> Tensor:
        return apply(weight)

    def norm(self, x: Tensor, layer: nn.LayerNorm) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + layer.eps).sqrt().detach()

    def linear(self, name: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        self.samples[name] = x.flatten(0, -2)[None]
        return self.operator(name, weight, lambda w: x @ w.T) + bias

    def patches(self, name: str, x: Tensor, layer: nn.Conv2d) -> Tensor:
        """Apply a convolution of patches; tokens (N, T, C)."""
        size = layer.kernel_size
        rows = F.unfold(x, size, stride=size).mT
        self.samples[name] = rows.flatten(0, 1)[None]
        return self.operator(name, layer.weight, lambda w: rows @ w.flatten(1).T) + layer.bias

    def layer_norm(self, name: str, x: Tensor, layer: nn.LayerNorm) -> Tensor:
        y = self.norm(x, layer)
        self.samples[name] = columns(y)[..., None]
        return self.operator(name, layer.weight[:, None], lambda w: y * w[:, 0]) + layer.bias

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        self.samples[name] = torch.stack([columns(x), columns(y)], -1)
        return self.operator(name, torch.ones_like(x[0, 0])[:, None].repeat(1, 2), lambda w: x * w[:, 0] + y * w[:, 1])

    def mean(self, name: str, x: Tensor) -> Tensor:
        """Return the mean over tokens (N, T, C)."""
        self.samples[name] = x.permute(2, 0, 1)
        weight = torch.full_like(x[0].T, 1 / x.shape[1])
        return self.operator(name, weight, lambda w: (x * w.T).sum(1))

    def mlp(self, first: str, second: str, x: Tensor, layers: tuple[nn.Linear, nn.Linear], scale: Tensor) -> Tensor:
        """Return scale ⊙ (linear layer, GELU, linear layer); the scale belongs to the last layer."""
        z = self.linear(first, x, layers[0].weight, layers[0].bias)
        factor = 0.5 * (1 + torch.erf(z.detach() / 2**0.5))
        self.factors[first] = columns(factor)
        return self.linear(second, z * factor, scale[:, None] * layers[1].weight, scale * layers[1].bias)


class Relevance(Constants):
    """Rules of PatternAttribution: operators distribute relevance by w ⊙ a, and norms pass it on."""

    def __init__(self, patterns: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.patterns = patterns

    def operator(self, name: str, weight: Tensor, apply: Callable[[Tensor], Tensor]) -> Tensor:
        backward = apply(weight * self.patterns[name].view_as(weight))
        return backward + (apply(weight) - backward).detach()

    def norm(self, x: Tensor, layer: nn.LayerNorm) -> Tensor:
        return x + (super().norm(x, layer) - x).detach()


def columns(x: Tensor) -> Tensor:
    """Return the values of each channel, (C, samples), of (…, C)."""
    return x.flatten(0, -2).T


def by_head(x: Tensor, heads: int) -> Tensor:
    """Return (N, heads, T, C / heads) of (N, T, C)."""
    return torch.stack(x.chunk(heads, -1), 1)


def attend(weights: Tensor, values: Tensor) -> Tensor:
    """Return (N, T, C) of detached weights (N, heads, T, T') and values (N, heads, T', C / heads)."""
    return torch.cat([a @ v for a, v in zip(weights.detach().unbind(1), values.unbind(1))], -1)


# --- grouped heads ------------------------------------------------------------------------------------

WIDTH, HEADS, GROUPS = 12, 4, 2  # two heads have the same keys and values
GROUPINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "enable_gqa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "repeat_interleave": lambda q, k, v: F.scaled_dot_product_attention(
        q, *(x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
    ),
    "expand": lambda q, k, v: F.scaled_dot_product_attention(
        q, *(x[:, :, None].expand(-1, -1, HEADS // GROUPS, -1, -1).flatten(1, 2) for x in (k, v))
    ),
    "matmul": lambda q, k, v: (
        (q.unflatten(1, (GROUPS, -1)) @ k[:, :, None].mT * q.shape[-1] ** -0.5).softmax(-1) @ v[:, :, None]
    ).flatten(1, 2),
}


class Grouped(nn.Module):
    """A block with grouped heads on tokens (N, T, 7)."""

    def __init__(self, grouping: str) -> None:
        super().__init__()
        self.attention = GROUPINGS[grouping]
        self.embed, self.norm, self.out = nn.Linear(7, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)
        self.q, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, WIDTH * GROUPS // HEADS) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        parts = (layer(y).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.proj(self.attention(*parts).transpose(1, 2).flatten(2))
        return self.out(x[:, 0])


def write_out_grouped(model: Grouped, x: Tensor, rules: Constants) -> Tensor:
    x = rules.linear("embed", x, model.embed.weight, model.embed.bias)
    y = rules.layer_norm("norm", x, model.norm)
    q, k = by_head(model.q(y), HEADS), by_head(model.k(y), GROUPS)
    v = by_head(rules.linear("v", y, model.v.weight, model.v.bias), GROUPS)
    group = [head * GROUPS // HEADS for head in range(HEADS)]
    logits = torch.stack([q[:, head] @ k[:, group[head]].mT / (WIDTH // HEADS) ** 0.5 for head in range(HEADS)], 1)
    mixed = attend(logits.softmax(-1), v[:, group])
    x = rules.add("addition.0", x, rules.linear("proj", mixed, model.proj.weight, model.proj.bias))
    return rules.linear("out", x[:, 0], model.out.weight, model.out.bias)


# --- Swin: windows, shifted in every second block ----------------------------------------------------

WINDOW, GRID, SHIFT = 4, 8, 2


def write_out_swin(model: SwinTransformer, x: Tensor, rules: Constants) -> Tensor:
    embed, _, norm = model.features[0]
    x = rules.layer_norm("features.0.2", rules.patches("features.0.0", x, embed), norm)
    for number, block in enumerate(model.features[1]):
        name = f"features.1.{number}"
        y = rules.layer_norm(f"{name}.norm1", x, block.norm1)
        q, k, v = block.attn.qkv.weight.chunk(3)
        q_bias, k_bias, v_bias = block.attn.qkv.bias.chunk(3)
        q, k = (by_head(F.linear(y, w, b), 2) for w, b in ((q, q_bias), (k, k_bias)))
        v = by_head(rules.linear(f"{name}.attn.qkv", y, v, v_bias), 2)
        bias = make_bias(block.attn.relative_position_bias_table, SHIFT * (number % 2))
        mixed = attend((q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1), v)
        y = rules.linear(f"{name}.attn.proj", mixed, block.attn.proj.weight, block.attn.proj.bias)
        x = rules.add(f"addition.{2 * number}", x, y)
        y = rules.layer_norm(f"{name}.norm2", x, block.norm2)
        layers = block.mlp[0], block.mlp[3]
        y = rules.mlp(f"{name}.mlp.0", f"{name}.mlp.3", y, layers, torch.ones_like(norm.weight))
        x = rules.add(f"addition.{2 * number + 1}", x, y)
    x = rules.mean("average_pool.0", rules.layer_norm("norm", x, model.norm))
    return rules.linear("head", x, model.head.weight, model.head.bias)


def make_bias(table: Tensor, shift: int) -> Tensor:
    """Return what is added to the logits of all pairs of tokens, (heads, T, T); -inf for tokens of other windows.

    The windows of a shifted grid begin at `shift`. Those at its end also contain the first rows and columns, which are
    windows of their own.
    """
    places = [((i - shift) % GRID, (j - shift) % GRID) for i in range(GRID) for j in range(GRID)]
    bias = table.new_full((table.shape[1], len(places), len(places)), -torch.inf)
    windows = [tuple((p // WINDOW, p >= GRID - shift) for p in place) for place in places]
    for query, (i, j) in enumerate(places):
        for key, (k, m) in enumerate(places):
            if windows[query] == windows[key]:
                row, column = i - k + WINDOW - 1, j - m + WINDOW - 1
                bias[:, query, key] = table[row * (2 * WINDOW - 1) + column]
    return bias


# --- CaiT: heads that mix their weights, then attention of the class token alone ------------------------


def write_out_cait(model: Cait, x: Tensor, rules: Constants) -> Tensor:
    x = rules.patches("patch_embed.proj", x, model.patch_embed.proj) + model.pos_embed
    (block,) = model.blocks
    y = rules.layer_norm("blocks.0.norm1", x, block.norm1)
    (q, k, v), biases = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
    q, k = (by_head(F.linear(y, w, b), 2) for w, b in ((q, biases[0]), (k, biases[1])))
    v = by_head(rules.linear("blocks.0.attn.qkv", y, v, biases[2]), 2)
    logits = mix_heads(q @ k.mT / q.shape[-1] ** 0.5, block.attn.proj_l)
    mixed = attend(mix_heads(logits.softmax(-1), block.attn.proj_w), v)
    x = add_branches(rules, "blocks.0", 0, block, x, mixed)
    token = model.cls_token.expand(len(x), -1, -1)
    for number, block in enumerate(model.blocks_token_only):
        name = f"blocks_token_only.{number}"
        y = rules.layer_norm(f"{name}.norm1", torch.cat([token, x], 1), block.norm1)
        q, k = by_head(block.attn.q(y[:, :1]), 2), by_head(block.attn.k(y), 2)
        v = by_head(rules.linear(f"{name}.attn.v", y, block.attn.v.weight, block.attn.v.bias), 2)
        mixed = attend((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1), v)
        token = add_branches(rules, name, 2 * number + 2, block, token, mixed)
    y = rules.layer_norm("norm", torch.cat([token, x], 1), model.norm)
    return rules.linear("head", y[:, 0], model.head.weight, model.head.bias)


def mix_heads(x: Tensor, layer: nn.Linear) -> Tensor:
    return torch.einsum("nhij,gh->ngij", x, layer.weight) + layer.bias[:, None, None]


def add_branches(rules: Constants, name: str, number: int, block: nn.Module, x: Tensor, mixed: Tensor) -> Tensor:
    """Return the tokens after the projection of attention and the second branch; `number` counts additions."""
    scale = block.gamma_1
    weight, bias = scale[:, None] * block.attn.proj.weight, scale * block.attn.proj.bias
    x = rules.add(f"addition.{number}", x, rules.linear(f"{name}.attn.proj", mixed, weight, bias))
    y = rules.layer_norm(f"{name}.norm2", x, block.norm2)
    layers = block.mlp.fc1, block.mlp.fc2
    y = rules.mlp(f"{name}.mlp.fc1", f"{name}.mlp.fc2", y, layers, block.gamma_2)
    return rules.add(f"addition.{number + 1}", x, y)


# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """A model, its forward pass written out, and the shape of its inputs."""

    make: Callable[[], nn.Module]
    forward: Callable[[nn.Module, Tensor, Constants], Tensor]
    shape: tuple[int, ...]


def make_swin() -> nn.Module:
    return SwinTransformer([4, 4], 8, [2], [2], [WINDOW, WINDOW], mlp_ratio=2.0, num_classes=CLASSES)


def make_cait() -> nn.Module:
    options = {"mlp_ratio": 2, "mlp_ratio_token_only": 2, "depth": 1, "depth_token_only": 2}
    return Cait(img_size=16, patch_size=8, embed_dim=WIDTH, num_heads=2, num_classes=CLASSES, **options)


WRITTEN: dict[str, Written] = {
    "Swin": Written(make_swin, write_out_swin, (3, 4 * GRID, 4 * GRID)),  # type: ignore[arg-type]
    "CaiT": Written(make_cait, write_out_cait, (3, 16, 16)),  # type: ignore[arg-type]
} | {
    f"grouped heads, {name}": Written(lambda name=name: Grouped(name), write_out_grouped, (5, 7))  # type: ignore
    for name in GROUPINGS
}
