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

NO_CLASS = -2  # the value of no pixel of a mask
# The columns of a method are named `{method}_{name}`.
COLUMNS: dict[str, pa.DataType] = {
    "centre": pa.float32(),  # fraction of the mass in the middle half of height and width
    "entropy": pa.float32(),  # of the mass over pixels, relative to the largest possible: 0 one pixel, 1 uniform
    "top_y": pa.int32(),  # first row and column of the 9×9 patch with the largest relevance
    "top_x": pa.int32(),
    "inside": pa.float32(),  # fraction of the mass inside the mask, or the boxes; null without
    "hit": pa.bool_(),  # the pointing game: whether the most relevant pixel lies there (Zhang et al. 2018)
}


def summarize_maps(method: str, maps: Tensor, regions: Sequence[Tensor | None]) -> list[dict[str, object]]:
    """Return the columns of each map.

    Args:
        method: The name of the method.
        maps: Its maps (N, C, H, W).
        regions: Where each sample has its object, bool (H, W); None if it is not known.
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
        if (region := regions[k]) is not None:
            mask = region.to(shares.device)
            row |= {"inside": float(shares[k][mask].sum()), "hit": bool(mask.flatten()[peak[k]])}
        rows.append({f"{method}_{name}": value for name, value in row.items()})
    return rows


def find_region(
    mask: Tensor | None, boxes: Sequence[Box] | None, number: object, height: int, width: int
) -> Tensor | None:
    """Return the pixels of a sample's object, bool (H, W): the pixels of its mask, or of its boxes if it has no mask.

    Args:
        mask: The mask, see `parse_mask`; None if the sample has no mask.
        boxes: The boxes; None if the sample has no boxes.
        number: The explained class, or a list that begins with it. If the mask holds the class of each pixel, the
            object is the pixels of this class. Any other value is no class.
        height: The height of the input.
        width: The width of the input.

    Returns:
        The pixels; None if the sample has neither a mask nor boxes, or its mask has no pixel of the object.
    """
    if mask is None:
        return None if boxes is None else mask_boxes(boxes, height, width)
    number = number[0] if isinstance(number, list) else number
    wanted = number if isinstance(number, int) else NO_CLASS
    found = mask if mask.dtype == torch.bool else torch.eq(mask, wanted)
    return found if found.any() else None


def mask_boxes(boxes: Sequence[Box], height: int, width: int) -> Tensor:
    """Return the pixels whose center lies in a box, bool (H, W)."""
    y, x = (torch.arange(n) + 0.5 for n in (height, width))
    inside = torch.zeros(height, width, dtype=torch.bool)
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
