"""COCO: images, and for each a box around the region that is most relevant for the explained class.

The relevance is averaged over a grid of at most 28 × 28 cells. Cells from a share of the largest value on (`threshold`)
belong to regions; cells that share a side belong to the same. The region with the largest sum is the box. Its score is
the share of the positive relevance in it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from ray_jobs.data.samples import Box
from ray_jobs.views.export.files import JsonList, finite, write_json_file, write_picture
from ray_jobs.views.export.samples import NO_CLASS, Description, ExportedSample, Writer

CELLS = 28  # along a side


def find_box(relevance: np.ndarray, threshold: float, width: int, height: int) -> tuple[Box, float] | None:
    """Return the box around the most relevant region, and its share of the positive relevance.

    Args:
        relevance: The relevance of each cell of a map (H, W).
        threshold: The share of the largest value from which a cell of the grid belongs to a region.
        width: Width of the image in pixels.
        height: Height of the image in pixels.

    Returns:
        The box in pixels of the image, and its score; None if nothing is relevant.

    Example:
        >>> relevance = np.zeros((4, 4), np.float32)
        >>> relevance[1, 2], relevance[2, 2], relevance[0, 0] = 3, 3, 2
        >>> find_box(relevance, 0.5, 40, 80)
        ((20.0, 20.0, 30.0, 60.0), 0.75)
    """
    positive = torch.from_numpy(relevance).clamp(min=0).nan_to_num(0, 0, 0)[None, None]
    sides = min(CELLS, relevance.shape[0]), min(CELLS, relevance.shape[1])
    grid = F.adaptive_avg_pool2d(positive, sides)[0, 0].double().numpy()
    if grid.max() <= 0:
        return None
    regions = find_regions(grid >= threshold * grid.max())
    best = max(regions, key=lambda cells: sum(grid[cell] for cell in cells))
    rows, columns = zip(*best)
    scale_y, scale_x = height / sides[0], width / sides[1]
    box = (min(columns) * scale_x, min(rows) * scale_y, (max(columns) + 1) * scale_x, (max(rows) + 1) * scale_y)
    return box, float(sum(grid[cell] for cell in best) / grid.sum())


def find_regions(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Return the cells of each region of a mask (H, W): cells that share a side are in the same region."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    regions = []
    for cell in sorted(left):
        if cell in left:
            left.remove(cell)
            region = [cell]
            for y, x in region:  # grows while it is read
                for neighbor in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                    if neighbor in left:
                        left.remove(neighbor)
                        region.append(neighbor)
            regions.append(region)
    return regions


@dataclass
class CocoWriter:
    """Writes the photographs, and the entries of images and annotations."""

    folder: Path
    description: Description
    images: JsonList
    annotations: JsonList
    classes: set[int]

    def write(self, sample: ExportedSample) -> None:
        """Write a sample."""
        row, (width, height) = sample.row, sample.picture.size
        name = self.description.name_class
        image = {
            "id": sample.number + 1,
            "file_name": write_picture(self.folder / "images", sample),
            "width": width,
            "height": height,
            "shard": sample.shard,
            "key": row.key,
            "label": name(row.label),
            "prediction": name(row.prediction),
            "probability": finite(row.probability),
            "explained_score": finite(row.score),
        }
        if row.place is not None:
            image |= {name: finite(getattr(row.place, name)) for name in ("cluster", "suspicion", "distance")}
        self.images.append(image)
        category = NO_CLASS if row.explained is None else row.explained
        self.classes |= {number for number in (category, row.label, row.prediction) if number is not None}
        if found := find_box(sample.relevance, self.description.threshold, width, height):
            (x0, y0, x1, y1), score = found
            annotation = {
                "id": self.annotations.count + 1,  # pycocotools takes 0 for no match
                "image_id": sample.number + 1,
                "category_id": category,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
                "iscrowd": 0,
                "score": score,
            }
            self.annotations.append(annotation)


@contextmanager
def open_coco(folder: Path, description: Description) -> Iterator[Writer]:
    """Open a folder with `images/` and `annotations.json`."""
    with JsonList(folder / "images.part") as images, JsonList(folder / "annotations.part") as annotations:
        writer = CocoWriter(folder, description, images, annotations, set(description.names))
        yield writer
        names = {number: description.name_class(number) for number in sorted(writer.classes)} | (
            {NO_CLASS: "none"} if NO_CLASS in writer.classes else {}
        )
        info = {
            "description": f"Regions that are relevant for {description.target} of {description.model}",
            "method": description.method,
            "threshold": description.threshold,
        }
        categories = [{"id": number, "name": name, "supercategory": "class"} for number, name in names.items()]
        values = {"info": info, "licenses": [], "categories": categories, "images": images, "annotations": annotations}
        write_json_file(folder / "annotations.json", values)
