"""Baseline maps that do not depend on the model. Every score of a map is compared with theirs."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from patterns.errors import UserError
from patterns.tracing.network import Network

Settings = Mapping[str, float]
OutputGradient = Callable[[Tensor], Tensor]  # from the network's output to the gradient there, of the same shape
# From inputs (N, …), the output gradient and one seed per sample to the maps, of the inputs' shape.
MapFunction = Callable[[Tensor, OutputGradient, list[int]], Tensor]


def random(network: Network, settings: Settings) -> MapFunction:
    """Return the function that draws standard normal noise, which depends on neither the input nor the model."""
    return lambda inputs, _, seeds: draw_noise(make_generators(seeds), inputs)


def edges(network: Network, settings: Settings) -> MapFunction:
    """Return the function that computes Sobel edges, which depend on the input but not on the model.

    Raises:
        UserError: If the inputs are not images.
    """
    if len(network.input_shape) != 3:
        what = f"the method sobel needs images, but the inputs have shape {network.input_shape}"
        raise UserError("", what, "Leave sobel out of `methods`.", "methods")
    return lambda inputs, output_gradient, seeds: sobel(inputs.detach())


def sobel(inputs: Tensor) -> Tensor:
    """Return the length of Sobel's gradient of each channel, same shape (N, C, H, W); borders are replicated."""
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]).to(inputs)
    kernels = torch.stack([across, across.T])[:, None]
    padded = F.pad(inputs, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[:, None]
    return F.conv2d(padded, kernels).norm(dim=1).view_as(inputs)


def make_generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """Return a CPU generator for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_noise(generators: list[torch.Generator], like: Tensor) -> Tensor:
    """Draw standard normal values, each sample from its own generator.

    They are drawn on the CPU, so that the values are equal on all devices.
    """
    return torch.stack([torch.randn(like.shape[1:], generator=g) for g in generators]).to(like)
