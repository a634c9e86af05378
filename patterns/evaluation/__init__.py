"""Measures of the quality of maps."""

from patterns.evaluation.degradation import (
    PATCH,
    REPLACEMENTS,
    STEPS,
    area_over_curve,
    compute_relevance,
    degrade_images,
    index_patches,
    rank_patches,
    sum_patches,
)

__all__ = [
    "PATCH",
    "REPLACEMENTS",
    "STEPS",
    "area_over_curve",
    "compute_relevance",
    "degrade_images",
    "index_patches",
    "rank_patches",
    "sum_patches",
]
