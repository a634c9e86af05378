"""Boxes around the relevance of maps, against scipy."""

import numpy as np
from scipy import ndimage

from ray_jobs.views.export.coco import find_box, find_regions


def test_regions_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random((9, 13)) < 0.5
        labels, count = ndimage.label(mask)
        found = {frozenset(region) for region in find_regions(mask)}
        assert found == {frozenset(map(tuple, np.argwhere(labels == k).tolist())) for k in range(1, count + 1)}


def test_box_of_a_large_map_surrounds_the_mark() -> None:
    relevance = np.full((224, 224), 0.01, np.float32)
    relevance[32:64, 96:144], relevance[200:208, 200:208] = 1, 1
    found = find_box(relevance, 0.5, 224, 224)
    assert found is not None
    assert found[0] == (96, 32, 144, 64)
    assert find_box(-relevance, 0.5, 224, 224) is None
