"""A map in a few numbers: columns of explanations.parquet.

The *mass* of a map at a pixel is Σ|channel|; what *speaks for* its target there is, for an attribution, the channels'
sum, and for a signal the mass.
"""

import math
from collections.abc import Callable, Sequence

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from patterns.evaluation import PATCH, relevance_of
from ray_jobs.data.samples import Box

# The columns of a method: `{method}_{name}`.
COLUMNS: dict[str, pa.DataType] = {
    "centre": pa.float32(),  # share of mass in the middle half of height and width
    "entropy": pa.float32(),  # of the mass over pixels, by the largest possible: 0 one pixel, 1 all alike
    "top_y": pa.int32(),  # first row and column of the 9×9 patch that speaks most for the target
    "top_x": pa.int32(),
    "inside": pa.float32(),  # share of mass inside the boxes, null without any
    "hit": pa.bool_(),  # the pointing game: whether the pixel that speaks most lies in a box (Zhang et al. 2018)
}


def summaries(method: str, maps: Tensor, boxes: Sequence[Sequence[Box] | None]) -> list[dict[str, object]]:
    """For each map of (N, C, H, W), its columns. boxes: of each sample, in the map's pixels, None where it has
    none."""
    mass = maps.float().abs().sum(1)
    relevance = relevance_of(method, maps)
    total = mass.flatten(1).sum(1)
    shares = mass / torch.where(total > 0, total, 1.0)[:, None, None]
    height, width = mass.shape[-2:]
    middle = shares[:, height // 4 : height - height // 4, width // 4 : width - width // 4].flatten(1).sum(1)
    entropy = torch.special.entr(shares).flatten(1).sum(1) / max(math.log(height * width), 1e-9)
    size = min(PATCH, height, width)
    patches = F.avg_pool2d(relevance[:, None], size, stride=1)[:, 0]
    top, peak = patches.flatten(1).argmax(1).tolist(), relevance.flatten(1).argmax(1).tolist()
    rows = []
    for k, (centre, spread) in enumerate(zip(middle.tolist(), entropy.tolist())):
        row = {
            "centre": centre,
            "entropy": spread,
            "top_y": top[k] // patches.shape[-1],
            "top_x": top[k] % patches.shape[-1],
            "inside": None,
            "hit": None,
        }
        if (regions := boxes[k]) is not None:
            mask = covered(regions, height, width, shares.device)
            row |= {"inside": float(shares[k][mask].sum()), "hit": bool(mask.flatten()[peak[k]])}
        rows.append({f"{method}_{name}": value for name, value in row.items()})
    return rows


def covered(boxes: Sequence[Box], height: int, width: int, device: torch.device) -> Tensor:
    """The pixels whose centre lies in one of some boxes, bool (H, W)."""
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


def shaped(maps: Tensor, reduction: str, size: int | None) -> Tensor:
    """Maps (N, C, H, W) with their channels reduced, at another height and width: linear, with anti-aliasing."""
    maps = REDUCTIONS[reduction](maps)
    if size is None:
        return maps
    return F.interpolate(maps.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
