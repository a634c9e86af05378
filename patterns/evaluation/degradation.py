"""Image degradation: how soon a prediction falls when what a map says matters is taken away.

Samek et al. 2016 (arXiv 1509.06321), as Kindermans et al. 2018 do it in §5 and Figure 4: the image is parted in
patches, these are sorted by the sum of the map in each, and patch after patch is replaced by its own mean per channel.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from patterns.attribution.methods import method_of

PATCH = 9  # pixels: the height and width of a patch in the paper's §5
STEPS = 100  # patches that the paper replaces at most


def relevance_of(method: str, maps: Tensor) -> Tensor:
    """What of a map (N, C, H, W) speaks for its target, float32 (N, H, W): of an attribution the channels' sum, of a
    signal, whose sign says nothing, Σ|channel|."""
    values = maps.float()
    return values.sum(1) if method_of(method).attributes else values.abs().sum(1)


def patch_of(height: int, width: int, size: int) -> Tensor:
    """The patch that each pixel is in, row by row from 0: int64 (H, W). Those at the lower and right edge may be
    smaller."""
    y, x = (torch.arange(n) // size for n in (height, width))
    return y[:, None] * -(-width // size) + x


def patch_sums(values: Tensor, size: int) -> Tensor:
    """The sum of values (N, H, W) in each patch: (N, patches)."""
    height, width = values.shape[1:]
    padded = F.pad(values, (0, -width % size, 0, -height % size))
    return padded.unflatten(2, (-1, size)).unflatten(1, (-1, size)).sum((2, 4)).flatten(1)


def turns(sums: Tensor, least_first: bool = False) -> Tensor:
    """When each patch has its turn, int64 (N, patches), 0 first: by decreasing sums, or by increasing ones.

    Of patches with the same sum, the one above or to the left has its turn first.
    """
    return torch.argsort(sums, dim=1, descending=not least_first, stable=True).argsort(1)


def means(images: Tensor, size: int, black: Tensor) -> Tensor:
    """Each patch's own mean per channel."""
    height, width = images.shape[2:]
    sums = patch_sums(images.flatten(0, 1), size)
    counts = patch_sums(images.new_ones(1, height, width), size)
    where = patch_of(height, width, size).to(images.device)
    return (sums / counts)[:, where].view_as(images)


def blurred(images: Tensor, size: int, black: Tensor) -> Tensor:
    """The image through a Gaussian whose deviation is a patch's size: what is replaced stays like an image."""
    reach = 2 * size
    x = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-0.5 * (x / size) ** 2)
    kernel /= kernel.sum()
    planes = images.flatten(0, 1)[:, None]
    across = F.conv2d(F.pad(planes, (reach, reach, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    return F.conv2d(F.pad(across, (0, 0, reach, reach), mode="replicate"), kernel.view(1, 1, -1, 1)).view_as(images)


def black_pixels(images: Tensor, size: int, black: Tensor) -> Tensor:
    """Black."""
    return black.to(images).expand_as(images)


def dataset_mean(images: Tensor, size: int, black: Tensor) -> Tensor:
    """The mean that pixels are normalised by, which is 0 in the model's input."""
    return torch.zeros_like(images)


# From images (N, C, H, W), the size of a patch and black's values (C, 1, 1) in the model's input, to what replaces
# each pixel.
REPLACEMENTS: dict[str, Callable[[Tensor, int, Tensor], Tensor]] = {
    "mean": means,
    "blur": blurred,
    "zero": black_pixels,
    "dataset-mean": dataset_mean,
}


def degraded(images: Tensor, replaced: Tensor, turn: Tensor, steps: Tensor) -> Tensor:
    """Images (N, C, H, W) after some numbers of patches, int64 (S,), were replaced: (N, S, C, H, W).

    replaced: what replaces each pixel, of the images' shape.  turn: of each pixel's patch, int64 (N, H, W).
    """
    gone = turn[:, None, None] < steps.view(1, -1, 1, 1, 1)
    return torch.where(gone, replaced[:, None], images[:, None])


def area_over(curve: Tensor) -> Tensor:
    """The area over curves (…, steps + 1) that begin at the whole image: the mean fall from there (Samek et al.)."""
    return (curve[..., :1] - curve).mean(-1)
