"""Image degradation: how fast a prediction falls as the patches that a map marks as relevant are replaced.

Samek et al. 2016 (arXiv 1509.06321), as in Kindermans et al. 2018, §5 and Figure 4: the image is divided into patches,
these are sorted by the sum of the map in each, and one patch after another is replaced by its own mean per channel.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from patterns.attribution.methods import parse_method

PATCH = 9  # height and width of a patch in pixels (Kindermans et al. 2018, §5)
STEPS = 100  # maximum number of replaced patches in the paper


def compute_relevance(method: str, maps: Tensor) -> Tensor:
    """Reduce the channels of maps to the relevance of each pixel.

    Args:
        method: The name of the method.
        maps: Shape (N, C, H, W).

    Returns:
        float32, shape (N, H, W): of an attribution the sum over channels, of a signal, whose sign has no meaning,
        Σ|channel|.

    Example:
        >>> maps = torch.tensor([[[[1.0]], [[-3.0]]]])
        >>> compute_relevance("patternattribution", maps).item(), compute_relevance("patternnet", maps).item()
        (-2.0, 4.0)
    """
    values = maps.float()
    return values.sum(1) if parse_method(method).is_attribution else values.abs().sum(1)


def index_patches(height: int, width: int, size: int) -> Tensor:
    """Return the number of the patch of each pixel, int64 (H, W), row by row from 0.

    Patches at the lower and right edges can be smaller than `size`.
    """
    y, x = (torch.arange(n) // size for n in (height, width))
    return y[:, None] * -(-width // size) + x


def sum_patches(values: Tensor, size: int) -> Tensor:
    """Return the sums of values (N, H, W) in each patch, shape (N, patches)."""
    height, width = values.shape[1:]
    padded = F.pad(values, (0, -width % size, 0, -height % size))
    return padded.unflatten(2, (-1, size)).unflatten(1, (-1, size)).sum((2, 4)).flatten(1)


def rank_patches(sums: Tensor, least_first: bool = False) -> Tensor:
    """Return the step in which each patch is replaced, int64 (N, patches), from 0.

    Args:
        sums: The sums of the map in each patch, shape (N, patches). Patches with equal sums keep their order.
        least_first: Replace patches with small sums first instead of patches with large sums.
    """
    return torch.argsort(sums, dim=1, descending=not least_first, stable=True).argsort(1)


def patch_means(images: Tensor, size: int, black: Tensor) -> Tensor:
    """Replace each patch by its own mean per channel."""
    height, width = images.shape[2:]
    sums = sum_patches(images.flatten(0, 1), size)
    counts = sum_patches(images.new_ones(1, height, width), size)
    patches = index_patches(height, width, size).to(images.device)
    return (sums / counts)[:, patches].view_as(images)


def blur(images: Tensor, size: int, black: Tensor) -> Tensor:
    """Replace by the image blurred with a Gaussian whose standard deviation is the patch size."""
    radius = 2 * size
    x = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-0.5 * (x / size) ** 2)
    kernel /= kernel.sum()
    planes = images.flatten(0, 1)[:, None]
    across = F.conv2d(F.pad(planes, (radius, radius, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    return F.conv2d(F.pad(across, (0, 0, radius, radius), mode="replicate"), kernel.view(1, 1, -1, 1)).view_as(images)


def black_pixels(images: Tensor, size: int, black: Tensor) -> Tensor:
    """Replace by black."""
    return black.to(images).expand_as(images)


def dataset_mean(images: Tensor, size: int, black: Tensor) -> Tensor:
    """Replace by the mean that images are normalized by, which is 0 in the model's input."""
    return torch.zeros_like(images)


# Functions from images (N, C, H, W), the size of a patch, and the value of black in the model's input, shape (C, 1, 1),
# to the replacement of each pixel, shape (N, C, H, W).
REPLACEMENTS: dict[str, Callable[[Tensor, int, Tensor], Tensor]] = {
    "mean": patch_means,
    "blur": blur,
    "zero": black_pixels,
    "dataset-mean": dataset_mean,
}


def degrade_stepwise(
    images: Tensor,
    replacement: Tensor,
    relevance: Tensor,
    size: int,
    steps: int,
    group: int = 10,
    least_first: bool = False,
) -> Iterator[Tensor]:
    """Yield images after 1, 2, …, `steps` patches were replaced, in groups of shape (N, S, C, H, W), S ≤ `group`.

    Args:
        images: Shape (N, C, H, W).
        replacement: The replacement of each pixel, shape (N, C, H, W).
        relevance: The relevance of each pixel, shape (N, H, W); see `compute_relevance`.
        size: The height and width of a patch in pixels.
        steps: The number of patches to replace.
        group: The number of steps in a group, at least 1.
        least_first: Replace the patches with the least relevance first instead of those with the most.

    Example:
        >>> images = torch.rand(2, 3, 8, 8)
        >>> groups = degrade_stepwise(images, torch.zeros_like(images), images.sum(1), size=4, steps=4, group=3)
        >>> [tuple(group.shape) for group in groups]
        [(2, 3, 3, 8, 8), (2, 1, 3, 8, 8)]
    """
    patches = index_patches(images.shape[2], images.shape[3], size).to(images.device)
    ranks = rank_patches(sum_patches(relevance, size), least_first)[:, patches]
    for numbers in torch.arange(1, steps + 1, device=images.device).split(group):
        replaced = ranks[:, None, None] < numbers.view(1, -1, 1, 1, 1)
        yield torch.where(replaced, replacement[:, None], images[:, None])


def area_over_curve(curve: Tensor) -> Tensor:
    """Return the area over curves: the mean fall from the value of the whole image (Samek et al. 2016).

    Args:
        curve: The values after 0, 1, … steps, shape (…, steps + 1).

    Example:
        >>> area_over_curve(torch.tensor([1.0, 0.5, 0.0])).item()
        0.5
    """
    return (curve[..., :1] - curve).mean(-1)
