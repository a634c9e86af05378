"""LRP's rules for modern networks as gradients: what PatternAttribution is compared with.

A map is x ⊙ gradient. The factors of norms, gates and gates of products are constants, as in CP-LRP (Ali et al. 2022).
AttnLRP (Achtibat et al. 2024, arXiv 2402.05602) also lets relevance flow through the attention weights, and gives each
factor of a product half. Convolutions and linear layers have the γ rule (Montavon et al. 2019), whose γ must be chosen.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STABILIZER = 1e-9


@dataclass
class Rules:
    """The rules of the current backward pass.

    Attributes:
        constant_factors: Whether factors of norms and gates are constants. Otherwise the gradient is the model's own.
        attention: Whether relevance flows through the attention weights, as in AttnLRP.
        convolution: γ of convolutions.
        linear: γ of linear layers.
    """

    constant_factors: bool = False
    attention: bool = False
    convolution: float = 0.0
    linear: float = 0.0


RULES = Rules()


@contextmanager
def rules(**chosen: Any) -> Iterator[None]:
    """Use rules for the passes inside the context."""
    before = dict(vars(RULES))
    vars(RULES).update(vars(Rules(**chosen)))
    try:
        yield
    finally:
        vars(RULES).update(before)


def constant(factor: Tensor) -> Tensor:
    """Return a factor, without its gradient if the rules take it as a constant."""
    return factor.detach() if RULES.constant_factors else factor


def constant_attention(weights: Tensor) -> Tensor:
    """Return attention weights; AttnLRP alone lets relevance flow through them."""
    return weights if RULES.attention else constant(weights)


def half(x: Tensor) -> Tensor:
    """Return a factor of a product of two values that both carry relevance; by AttnLRP each gets half."""
    return x / 2 + (x / 2).detach() if RULES.attention else x


class GELU(nn.GELU):
    """GELU, as a product with its gate if that is a constant."""

    def forward(self, z: Tensor) -> Tensor:
        """Return z Φ(z)."""
        return z * constant(torch.special.ndtr(z)) if RULES.constant_factors else super().forward(z)


class SiLU(nn.SiLU):
    """SiLU, as a product with its gate if that is a constant."""

    def forward(self, z: Tensor) -> Tensor:
        """Return z σ(z)."""
        return z * constant(torch.sigmoid(z)) if RULES.constant_factors else super().forward(z)


class LayerNorm(nn.LayerNorm):
    """A layer norm over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized values."""
        if not RULES.constant_factors:
            return super().forward(x)
        centered = x - x.mean(-1, keepdim=True)
        scale = constant((centered.square().mean(-1, keepdim=True) + self.eps).rsqrt())
        return centered * scale * self.weight + self.bias


class Linear(nn.Linear):
    """A linear layer with the γ rule."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        return gamma_layer(lambda x, w, b: F.linear(x, w, b), x, self.weight, self.bias, RULES.linear)


class Conv2d(nn.Conv2d):
    """A convolution with the γ rule."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""

        def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

        return gamma_layer(convolve, x, self.weight, self.bias, RULES.convolution)


Layer = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def gamma_layer(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: float) -> Tensor:
    """Return the outputs of a layer whose backward pass has the γ rule; with γ = 0 it is the gradient."""
    if gamma == 0:
        return layer(x, weight, bias)
    outputs: Tensor = _Gamma.apply(x, weight, bias, layer, gamma)
    return outputs


class _Gamma(torch.autograd.Function):
    """The γ rule: inputs that act in the direction of an output's sign count 1 + γ times.

    The relevance of an input x is z g Σ x w' / Σ x w', so x is divided out, and no input may be 0.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Layer, gamma: float) -> Tensor:
        ctx.layer, ctx.gamma = layer, gamma
        ctx.save_for_backward(x, weight, bias)
        return layer(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias = ctx.saved_tensors
        layer: Layer = ctx.layer
        more, less = (weight + ctx.gamma * part for part in (weight.clamp(min=0), weight.clamp(max=0)))
        offsets = [None] * 2 if bias is None else [bias + ctx.gamma * p for p in (bias.clamp(min=0), bias.clamp(max=0))]
        with torch.enable_grad():
            positive, negative = (part.detach().requires_grad_() for part in (x.clamp(min=0), x.clamp(max=0)))
            up = layer(positive, more, offsets[0]) + layer(negative, less, None)
            down = layer(positive, less, offsets[1]) + layer(negative, more, None)
            z = layer(x.detach(), weight, bias)
            relevance = z * grads[0]
            shares = [
                torch.where(chosen, relevance / torch.where(chosen, total, 1.0).add(sign * STABILIZER), 0.0).detach()
                for chosen, total, sign in ((z > 0, up, 1), (z < 0, down, -1))
            ]
            found = torch.autograd.grad([up, down], [positive, negative], shares)
        return torch.where(x > 0, *found), None, None, None, None
