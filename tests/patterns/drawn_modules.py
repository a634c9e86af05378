"""Small modules drawn from a grammar of layers, changes of shape and spellings, some of them hostile.

A step maps a shape to a layer and applies it to a batch. Steps that do not fit the shape are left out, so every list of
steps is a module.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Apply = Callable[[nn.Module, Tensor], Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One line of a forward pass; `fits` says whether it accepts a shape (without the batch)."""

    name: str
    apply: Apply
    fits: Callable[[Shape], bool] = lambda shape: True
    layer: Callable[[Shape], nn.Module] = lambda shape: nn.Identity()


class Drawn(nn.Module):
    """A module that applies its steps in order."""

    def __init__(self, steps: Sequence[Step], shape: Shape) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.steps: list[Step] = []
        x = torch.rand(3, *shape, dtype=torch.float64)
        for step in steps:
            if not step.fits(tuple(x.shape[1:])):
                continue
            layer = step.layer(tuple(x.shape[1:])).double().eval()
            self.layers.append(layer)
            self.steps.append(step)
            with torch.no_grad():
                x = step.apply(layer, x)
            if x.dim() == 0 or x.numel() > 5000:
                break

    def forward(self, x: Tensor) -> Tensor:
        for step, layer in zip(self.steps, self.layers):
            x = step.apply(layer, x)
        return x

    def __repr__(self) -> str:
        return " | ".join(step.name for step in self.steps)


def image(shape: Shape) -> bool:
    return len(shape) == 3 and min(shape[1:]) >= 2


def vector(shape: Shape) -> bool:
    return len(shape) == 1


def batch_norm(shape: Shape) -> nn.Module:
    norm = nn.BatchNorm2d(shape[0])
    nn.init.uniform_(norm.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
    nn.init.uniform_(norm.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return norm


class Constant(nn.Module):
    """A tensor that is neither a parameter nor a buffer, in the shape of one sample."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.value = torch.linspace(-1.0, 1.0, max(1, int(torch.tensor(shape).prod())), dtype=torch.float64).view(shape)


def even(shape: Shape) -> bool:
    return len(shape) > 0 and shape[0] % 2 == 0


# Supported steps: none of them may be rejected.
SUPPORTED = [
    Step("conv", lambda m, x: m(x), image, lambda s: nn.Conv2d(s[0], 4, 3, padding=1)),
    Step("strided", lambda m, x: m(x), image, lambda s: nn.Conv2d(s[0], 6, 2, stride=2)),
    Step("depthwise", lambda m, x: m(x), image, lambda s: nn.Conv2d(s[0], s[0], 3, padding="same", groups=s[0])),
    Step("transposed", lambda m, x: m(x), image, lambda s: nn.ConvTranspose2d(s[0], 3, 2, stride=2)),
    Step("linear", lambda m, x: m(x), lambda s: len(s) > 0, lambda s: nn.Linear(s[-1], 5)),
    Step("batch norm", lambda m, x: m(x), image, batch_norm),
    Step("relu", lambda m, x: F.relu(x)),
    Step("relu in place", lambda m, x: F.relu_(x.clone())),
    Step("clip", lambda m, x: x.clip(0, 2)),
    Step("clamp", lambda m, x: x.clamp(min=0.0)),
    Step("maximum", lambda m, x: torch.maximum(x, torch.zeros_like(x))),
    Step("fmin", lambda m, x: torch.fmin(x, torch.full_like(x, 1.5))),
    Step("where", lambda m, x: torch.where(x > 0, x, 0.0)),
    Step("where with swapped branches", lambda m, x: torch.where(x <= 0, torch.zeros_like(x), x)),
    Step("leaky where", lambda m, x: torch.where(x < 0, x * 0.2, x)),
    Step("negative part", lambda m, x: torch.where(x < 0, x, 0.0)),
    Step("threshold", lambda m, x: torch.where(x > 0.25, x, -1.0)),
    Step("mask", lambda m, x: x * (x > 0)),
    Step("mask of floats", lambda m, x: (x >= 0).to(x.dtype) * x),
    Step("filled", lambda m, x: x.masked_fill(x < 0, 0)),
    Step("rrelu", lambda m, x: F.rrelu(x, training=False)),
    Step("leaky", lambda m, x: F.leaky_relu(x, 0.1)),
    Step("max pool", lambda m, x: F.max_pool2d(x, 2), image),
    Step("amax", lambda m, x: x.amax((2, 3)), image),
    Step("amax kept", lambda m, x: x.amax((1, -1), keepdim=True), image),
    Step("max of one dimension", lambda m, x: x.max(-1)[0], lambda s: len(s) > 1),
    Step("average pool", lambda m, x: F.avg_pool2d(x, 2, 1, 1, count_include_pad=False), image),
    Step("global average", lambda m, x: F.adaptive_avg_pool2d(x, 1), image),
    Step("mean", lambda m, x: x.mean((2, 3)), image),
    Step("sum", lambda m, x: x.sum(-1) / 3, lambda s: len(s) > 1),
    Step("einsum", lambda m, x: torch.einsum("nchw->nwc", x), image),
    Step("flatten", lambda m, x: x.flatten(1), lambda s: len(s) > 0),
    Step("reshape", lambda m, x: x.reshape(x.shape[0], -1)),
    Step("view", lambda m, x: x.contiguous().view(x.size(0), -1, 2), lambda s: len(s) > 0 and s[-1] % 2 == 0),
    Step("transpose", lambda m, x: x.transpose(1, -1), lambda s: len(s) > 1),
    Step("permute", lambda m, x: x.permute(0, 2, 3, 1), image),
    Step("unsqueeze", lambda m, x: x.unsqueeze(1), lambda s: 0 < len(s) < 3),
    Step("flip", lambda m, x: x.flip(1), lambda s: len(s) > 0),
    Step("channels by number", lambda m, x: x[:, [1, 0, -1]], lambda s: len(s) > 0 and s[0] > 1),
    Step("every second", lambda m, x: x[:, ::2], lambda s: len(s) > 0),
    Step("narrow", lambda m, x: x[..., 1:], lambda s: len(s) > 0 and s[-1] > 2),
    Step("halves", lambda m, x: torch.cat(x.chunk(2, 1)[::-1], 1), even),
    Step("twice", lambda m, x: torch.cat([x, -x], 1), lambda s: len(s) > 0),
    Step("residual", lambda m, x: x + m(x), image, lambda s: nn.Conv2d(s[0], s[0], 1)),
    Step("difference", lambda m, x: 2 * x - m(x), vector, lambda s: nn.Linear(s[0], s[0])),
    Step("scaled", lambda m, x: (x - 0.3) / 2),
    Step("constant", lambda m, x: x * m.value, lambda s: len(s) > 0, Constant),
    Step("matrix", lambda m, x: x @ m.value, lambda s: len(s) > 0, lambda s: Constant((s[-1], 3))),
    Step("padded", lambda m, x: F.pad(x, (1, 0, 0, 1)), image),
    Step("upsampled", lambda m, x: F.interpolate(x, scale_factor=2), image),
    Step("dropout off", lambda m, x: F.dropout(x, 0.5, training=False)),
    Step("dropout layer", lambda m, x: m(x), layer=lambda s: nn.Dropout(0.5)),
]  # fmt: skip

# Steps that may be rejected and must never change a result.
HOSTILE = [
    Step("rows", lambda m, x: x.reshape(-1, x.shape[-1]), lambda s: len(s) > 0),
    Step("view -1", lambda m, x: x.reshape(-1, 4), lambda s: len(s) > 0 and s[-1] % 4 == 0),
    Step("batch mean", lambda m, x: x - x.mean(0, keepdim=True)),
    Step("batch maximum", lambda m, x: x / x.abs().amax()),
    Step("batch flipped", lambda m, x: x.flip(0)),
    Step("batch sum", lambda m, x: x.cumsum(0)),
    Step("first sample", lambda m, x: x - x[:1]),
    Step("last sample", lambda m, x: x + 0 * x + x[-1]),
    Step("batch norm of batches", lambda m, x: F.batch_norm(x, None, None, training=True), image),
    Step("dropout on", lambda m, x: F.dropout(x, 0.3)),
    Step("noise", lambda m, x: x + 0.1 * torch.rand_like(x)),
    Step("noise of its own", lambda m, x: x * torch.rand(())),
    Step("squeeze", lambda m, x: x.squeeze()),
    Step("squeeze last", lambda m, x: x.squeeze(-1), lambda s: len(s) > 0),
    Step("transposed batch", lambda m, x: x.t(), vector),
    Step("branch on the batch", lambda m, x: x * 2 if x.shape[0] > 3 else x),
    Step("branch on one", lambda m, x: x * 2 if x.shape[0] == 1 else x),
    Step("batch as a number", lambda m, x: x * x.shape[0]),
    Step("batch over a number", lambda m, x: x / len(x)),
    Step("loop", lambda m, x: torch.stack([one * 2 for one in x])),
    Step("branch on the data", lambda m, x: x if float(x.sum()) > 0 else -x),
    Step("absolute", lambda m, x: x.abs()),
    Step("silu", lambda m, x: F.silu(x)),
    Step("sigmoid", lambda m, x: x.sigmoid()),
    Step("softmax", lambda m, x: x.softmax(-1), lambda s: len(s) > 0),
    Step("square", lambda m, x: x * x),
    Step("gate of another", lambda m, x: x * (x.flip(-1) > 0), lambda s: len(s) > 0),
    Step("choice of another", lambda m, x: torch.where(x > 0, x.flip(-1), x), lambda s: len(s) > 0),
    Step("step", lambda m, x: (x > 0).to(x.dtype)),
    Step("assigned", lambda m, x: torch.cat([x[:, :1] * 0, x[:, 1:]], 1), lambda s: len(s) > 0),
    Step("sorted", lambda m, x: x.sort(-1).values, lambda s: len(s) > 0),
    Step("argmax", lambda m, x: x.gather(1, x.argmax(1, keepdim=True)), lambda s: len(s) > 0),
    Step("even batch", lambda m, x: x.reshape(x.shape[0], -1).reshape(x.shape)),
    Step("layer norm", lambda m, x: F.layer_norm(x, x.shape[1:]), lambda s: len(s) > 0),
]  # fmt: skip
