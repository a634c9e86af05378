"""Statistics of a map: columns of explanations.parquet.

The *mass* of a map at a pixel is Σ|channel|. The *relevance* of the pixel for the target is the sum of the channels for
an attribution, and the mass for a signal.
"""

import math
from collections.abc import Callable, Sequence

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from patterns.evaluation import PATCH, compute_relevance
from ray_jobs.data.samples import Box

# The columns of a method are named `{method}_{name}`.
COLUMNS: dict[str, pa.DataType] = {
    "centre": pa.float32(),  # fraction of the mass in the middle half of height and width
    "entropy": pa.float32(),  # of the mass over pixels, relative to the largest possible: 0 one pixel, 1 uniform
    "top_y": pa.int32(),  # first row and column of the 9×9 patch with the largest relevance
    "top_x": pa.int32(),
    "inside": pa.float32(),  # fraction of the mass inside the boxes; null without boxes
    "hit": pa.bool_(),  # the pointing game: whether the most relevant pixel lies in a box (Zhang et al. 2018)
}


def summarize_maps(method: str, maps: Tensor, boxes: Sequence[Sequence[Box] | None]) -> list[dict[str, object]]:
    """Return the columns of each map.

    Args:
        method: The name of the method.
        maps: Its maps (N, C, H, W).
        boxes: The boxes of each sample, in the map's pixels; None if a sample has no boxes.
    """
    mass = maps.float().abs().sum(1)
    relevance = compute_relevance(method, maps)
    total = mass.flatten(1).sum(1)
    shares = mass / torch.where(total > 0, total, 1.0)[:, None, None]
    height, width = mass.shape[-2:]
    middle = shares[:, height // 4 : height - height // 4, width // 4 : width - width // 4].flatten(1).sum(1)
    entropy = torch.special.entr(shares).flatten(1).sum(1) / max(math.log(height * width), 1e-9)
    size = min(PATCH, height, width)
    patches = F.avg_pool2d(relevance[:, None], size, stride=1)[:, 0]
    top, peak = patches.flatten(1).argmax(1).tolist(), relevance.flatten(1).argmax(1).tolist()
    rows = []
    for k, (center, spread) in enumerate(zip(middle.tolist(), entropy.tolist())):
        row = {
            "centre": center,
            "entropy": spread,
            "top_y": top[k] // patches.shape[-1],
            "top_x": top[k] % patches.shape[-1],
            "inside": None,
            "hit": None,
        }
        if (regions := boxes[k]) is not None:
            mask = mask_boxes(regions, height, width, shares.device)
            row |= {"inside": float(shares[k][mask].sum()), "hit": bool(mask.flatten()[peak[k]])}
        rows.append({f"{method}_{name}": value for name, value in row.items()})
    return rows


def mask_boxes(boxes: Sequence[Box], height: int, width: int, device: torch.device) -> Tensor:
    """Return the pixels whose center lies in a box, bool (H, W)."""
    y, x = (torch.arange(n, device=device) + 0.5 for n in (height, width))
    inside = torch.zeros(height, width, dtype=torch.bool, device=device)
    for x0, y0, x1, y1 in boxes:
        inside |= ((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))
    return inside


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda maps: maps,
    "sum": lambda maps: maps.sum(1, keepdim=True),
    "abs-sum": lambda maps: maps.abs().sum(1, keepdim=True),
    "abs-max": lambda maps: maps.abs().amax(1, keepdim=True),
}


def reduce_maps(maps: Tensor, reduction: str, size: int | None) -> Tensor:
    """Reduce the channels of maps, and resize them linearly with anti-aliasing.

    Args:
        maps: (N, C, H, W).
        reduction: One of REDUCTIONS.
        size: The new height and width; None: unchanged.
    """
    maps = REDUCTIONS[reduction](maps)
    if size is None:
        return maps
    return F.interpolate(maps.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
