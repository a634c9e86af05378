"""Measures of how good maps are."""

from patterns.evaluation.degradation import (
    PATCH,
    REPLACEMENTS,
    STEPS,
    area_over,
    degraded,
    patch_of,
    patch_sums,
    relevance_of,
    turns,
)

__all__ = ["PATCH", "REPLACEMENTS", "STEPS", "area_over", "degraded", "patch_of", "patch_sums", "relevance_of", "turns"]
