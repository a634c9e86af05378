"""Measures of the quality of maps, and the modified networks and images that they need."""

from patterns.evaluation.constant_shift import absorb_shift, find_shift_obstacle, shift_sensitivity
from patterns.evaluation.degradation import (
    PATCH,
    REPLACEMENTS,
    STEPS,
    area_over_curve,
    compute_relevance,
    degrade_stepwise,
)
from patterns.evaluation.pointing import draw_quadruples, make_grids, pointing_shares
from patterns.evaluation.randomization import (
    cascade,
    randomize,
    redraw,
    replace_operators,
    trained_operators,
)
from patterns.evaluation.similarity import cosine, heat, ranks, spearman, ssim
from patterns.operators.copies import with_weights

__all__ = [
    "PATCH",
    "REPLACEMENTS",
    "STEPS",
    "absorb_shift",
    "area_over_curve",
    "cascade",
    "compute_relevance",
    "cosine",
    "degrade_stepwise",
    "draw_quadruples",
    "find_shift_obstacle",
    "heat",
    "make_grids",
    "pointing_shares",
    "randomize",
    "ranks",
    "redraw",
    "replace_operators",
    "shift_sensitivity",
    "spearman",
    "ssim",
    "trained_operators",
    "with_weights",
]
