"""Three small modern networks for gray images of 28×28 pixels and 10 classes: a ViT, a ConvNeXt and an EfficientNet.

Their layers are those of `attnlrp`, so that LRP's rules for modern networks run on them. To `patterns.trace` they are
ordinary modules.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.smooth.attnlrp import GELU, Conv2d, LayerNorm, Linear, SiLU, constant, constant_attention, half

CLASSES = 10


class Attention(nn.Module):
    """Self-attention over tokens (N, T, C)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens."""
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        weights = (half(q) @ half(k).transpose(2, 3) / q.shape[3] ** 0.5).softmax(3)
        mixed = half(constant_attention(weights)) @ half(v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Sum(nn.Module):
    """x + y."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the sum."""
        return x + y


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.sum = nn.Sequential(*layers), Sum()

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        return self.sum(x, self.layers(x))


class VisionTransformer(nn.Module):
    """A pre-norm ViT: 4 blocks of 64 channels, patches of 4×4 pixels, a class token."""

    def __init__(self, channels: int = 64, blocks: int = 4, heads: int = 4, patch: int = 4) -> None:
        super().__init__()
        self.patches = Conv2d(1, channels, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, channels))
        self.position = nn.Parameter(0.02 * torch.randn(1, 1 + (28 // patch) ** 2, channels))
        layers: list[nn.Module] = []
        for _ in range(blocks):
            layers.append(Residual(LayerNorm(channels), Attention(channels, heads)))
            layers.append(
                Residual(LayerNorm(channels), Linear(channels, 2 * channels), GELU(), Linear(2 * channels, channels))
            )
        self.blocks = nn.Sequential(*layers)
        self.norm, self.head = LayerNorm(channels), Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1) + self.position
        return self.head(self.norm(self.blocks(tokens))[:, 0])


class TokensApart(nn.Module):
    """A layer for the class token and a copy of it for the patch tokens, so that each has its own patterns."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.of_class, self.of_patches = layer, copy.deepcopy(layer)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the outputs of all tokens."""
        return torch.cat([self.of_class(*(x[:, :1] for x in inputs)), self.of_patches(*(x[:, 1:] for x in inputs))], 1)


def separate_tokens(model: nn.Module) -> nn.Module:
    """Return a ViT that computes the same, with layers of their own for the class token and for the patch tokens."""
    found = copy.deepcopy(model)
    for parent in [*found.get_submodule("blocks").modules()]:
        for name, child in [*parent.named_children()]:
            if isinstance(child, Linear | LayerNorm | Sum):
                parent.set_submodule(name, TokensApart(child))
    return found


class ChannelsLast(nn.Module):
    """Layers on the channels of maps (N, C, H, W), as the last dimension."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps."""
        return self.layers(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LayerScale(nn.Module):
    """A factor for each channel of the last dimension."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the product."""
        return x * self.factor


def convnext(widths: tuple[int, ...] = (32, 64), depth: int = 2) -> nn.Module:
    """Return a network of ConvNeXt's blocks: depthwise convolution, norm, GELU between two linear layers, scale."""
    layers: list[nn.Module] = [Conv2d(1, widths[0], 2, stride=2), ChannelsLast(LayerNorm(widths[0]))]
    for number, width in enumerate(widths):
        if number:
            layers += [ChannelsLast(LayerNorm(widths[number - 1])), Conv2d(widths[number - 1], width, 2, stride=2)]
        for _ in range(depth):
            inner = ChannelsLast(
                LayerNorm(width), Linear(width, 2 * width), GELU(), Linear(2 * width, width), LayerScale(width)
            )
            layers.append(Residual(Conv2d(width, width, 5, padding=2, groups=width), inner))
    return nn.Sequential(*layers, Pool(), LayerNorm(widths[-1]), Linear(widths[-1], CLASSES))


class Pool(nn.Module):
    """The mean over positions."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C)."""
        return x.mean((2, 3))


class Excitation(nn.Module):
    """Squeeze and excitation: a factor for each channel, from the means of all."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze, self.excite, self.act = Conv2d(channels, 8, 1), Conv2d(8, channels, 1), SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the product."""
        return x * constant(torch.sigmoid(self.excite(self.act(self.squeeze(x.mean((2, 3), keepdim=True))))))


def efficientnet(widths: tuple[int, ...] = (16, 32, 48), expansion: int = 3) -> nn.Module:
    """Return a network of EfficientNet's blocks: inverted residuals with batch norm, SiLU and excitation."""

    def normed(inputs: int, outputs: int, size: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
        convolution = Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
        return [convolution, nn.BatchNorm2d(outputs)]

    layers: list[nn.Module] = [*normed(1, widths[0], 3), SiLU()]
    width = widths[0]
    for wider in widths:
        for stride in (2, 1):
            hidden = expansion * width
            block = [
                *normed(width, hidden), SiLU(), *normed(hidden, hidden, 3, stride, hidden), SiLU(),
                Excitation(hidden), *normed(hidden, wider),
            ]  # fmt: skip
            layers.append(Residual(*block) if stride == 1 and wider == width else nn.Sequential(*block))
            width = wider
    return nn.Sequential(*layers, *normed(width, 128), SiLU(), Pool(), Linear(128, CLASSES))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ViT": VisionTransformer,
    "ConvNeXt": convnext,
    "EfficientNet": efficientnet,
}
EPOCHS = {"ViT": 4, "ConvNeXt": 4, "EfficientNet": 4}
TOKENS = ("ViT",)  # networks with class and patch tokens
PRODUCTS = ("EfficientNet",)  # networks with products of activations
