"""Similarity of pairs of maps: cosine, rank correlation, and structural similarity (SSIM).

Adebayo et al. 2018 (arXiv 1810.03292) compare the maps of a trained and of a randomized network by SSIM and by rank
correlation. Two classes of one image are compared by the cosine of their maps: an absolute cosine of 1 means that the
map does not depend on the class. All functions return one number for each pair, shape (N,), float64.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from patterns.errors import UserError

WINDOW, SPREAD = 11, 1.5  # of SSIM, in pixels: Wang et al. 2004, §III.C
CONSTANTS = 0.01**2, 0.03**2  # (K₁L)² and (K₂L)² there, for values of the range L = 1


def heat(maps: Tensor) -> Tensor:
    """Return Σ|channel| of each map divided by its maximum: the map as SSIM and rank correlation compare it.

    Args:
        maps: Shape (N, C, H, W), any floating-point dtype.

    Returns:
        float64, shape (N, H, W), in [0, 1]; 0 for a map of zeros.

    Example:
        >>> heat(torch.tensor([[[[1.0, -2.0]], [[-3.0, 0.0]]]]))
        tensor([[[1.0000, 0.5000]]], dtype=torch.float64)
    """
    mass = maps.double().abs().sum(1)
    largest = mass.amax((1, 2), keepdim=True)
    return mass / torch.where(largest > 0, largest, 1.0)


def cosine(maps: Tensor, others: Tensor) -> Tensor:
    """Return the cosine of pairs of maps; it does not depend on the size of a map.

    Args:
        maps: Shape (N, …), any floating-point dtype.
        others: Maps of the same shape.

    Returns:
        float64, shape (N,), in [-1, 1]; NaN if one of the two maps is 0.

    Example:
        >>> cosine(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [-3.0, -3.0]])).round(decimals=12)
        tensor([ 0., -1.], dtype=torch.float64)
    """
    rows, columns = (m.flatten(1).double() for m in (maps, others))
    rows, columns = (m / m.abs().amax(1, keepdim=True) for m in (rows, columns))
    return (rows * columns).sum(1) / (rows.norm(dim=1) * columns.norm(dim=1))


def spearman(maps: Tensor, others: Tensor) -> Tensor:
    """Return Spearman's rank correlation of pairs of maps; ties share their mean rank.

    Args:
        maps: Shape (N, …), any floating-point dtype.
        others: Maps of the same shape.

    Returns:
        float64, shape (N,), in [-1, 1]; NaN if one of the two maps is constant.

    Example:
        >>> spearman(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 10.0, 100.0]])).round(decimals=12)
        tensor([1.], dtype=torch.float64)
    """
    rows, columns = ranks(maps.flatten(1)), ranks(others.flatten(1))
    return cosine(rows - rows.mean(1, keepdim=True), columns - columns.mean(1, keepdim=True))


def ranks(values: Tensor) -> Tensor:
    """Return the rank of each value in its row; ties share their mean rank.

    Args:
        values: Shape (N, n).

    Returns:
        float64, shape (N, n), from 1.

    Example:
        >>> ranks(torch.tensor([[5.0, 7.0, 5.0]]))
        tensor([[1.5000, 3.0000, 1.5000]], dtype=torch.float64)
    """
    found = []
    for row in values:
        _, index, count = torch.unique(row, return_inverse=True, return_counts=True)
        found.append((count.cumsum(0) - (count - 1) / 2.0).double()[index])
    return torch.stack(found)


def ssim(heats: Tensor, others: Tensor) -> Tensor:
    """Return the structural similarity of images: the mean over all positions of a Gaussian window inside the image.

    Args:
        heats: Images with values in [0, 1], such as those of `heat`, shape (N, H, W), any floating-point dtype.
        others: Images of the same shape.

    Returns:
        float64, shape (N,), in [-1, 1].

    Raises:
        UserError: If the images are smaller than the window of 11×11 pixels.

    Example:
        >>> image = torch.rand(1, 16, 16, dtype=torch.float64)
        >>> bool(ssim(image, image) > ssim(image, 1 - image))
        True

    Source: Wang et al. 2004, eq. 13.
    """
    if min(heats.shape[1:]) < WINDOW:
        what = f"a map of {heats.shape[1]}×{heats.shape[2]} pixels is smaller than SSIM's window of {WINDOW}×{WINDOW}"
        raise UserError("", what, "Compare these maps by rank correlation.", "heats")
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=heats.device) - WINDOW // 2
    line = torch.exp(-(offsets**2) / (2 * SPREAD**2))
    line = line / line.sum()

    def mean(values: Tensor) -> Tensor:
        down = F.conv2d(values[:, None], line[None, None, :, None])
        return F.conv2d(down, line[None, None, None, :])[:, 0]

    x, y = heats.double(), others.double()
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y, cov = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2, mean(x * y) - mean_x * mean_y
    c1, c2 = CONSTANTS
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * cov + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean((1, 2))
