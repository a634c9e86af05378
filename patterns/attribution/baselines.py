"""Maps that know nothing of the model, beside which every score of a map is read: noise, and edges of the input."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from patterns.errors import UserError
from patterns.tracing.network import Network

Settings = Mapping[str, float]
Start = Callable[[Tensor], Tensor]  # from the network's output to what a gradient starts from, of the same shape
# From inputs (N, …), the start and a seed for each sample to the map, of the inputs' shape.
Map = Callable[[Tensor, Start, list[int]], Tensor]


def random(network: Network, settings: Settings) -> Map:
    """Standard normal noise: what a map that knows nothing scores."""
    return lambda inputs, _, seeds: noise(generators(seeds), inputs)


def edges(network: Network, settings: Settings) -> Map:
    """Sobel's edges of the input: what a map that knows nothing of the model scores. UserError without images."""
    if len(network.input_shape) != 3:
        what = f"inputs of shape {network.input_shape} are no images"
        raise UserError("sobel", what, "Leave it out of the methods.")
    return lambda inputs, start, seeds: sobel(inputs.detach())


def sobel(inputs: Tensor) -> Tensor:
    """The edges of each channel, the length of Sobel's two derivatives; borders are continued. (N, C, H, W), as given.

    A baseline that knows the input and nothing of the model.
    """
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]).to(inputs)
    kernels = torch.stack([across, across.T])[:, None]
    padded = F.pad(inputs, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[:, None]
    return F.conv2d(padded, kernels).norm(dim=1).view_as(inputs)


def generators(seeds: Iterable[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noise(drawn_by: list[torch.Generator], like: Tensor) -> Tensor:
    """Standard normal values, drawn on the CPU so that every device sees the same."""
    return torch.stack([torch.randn(like.shape[1:], generator=g) for g in drawn_by]).to(like)
