"""From moments to patterns, their quality and their standard error."""

from patterns.estimation.concepts import ConceptDirections, solve_concepts
from patterns.estimation.estimators import (
    ESTIMATORS,
    parse_estimators,
    required_sums,
    select_choices,
    select_estimators,
)
from patterns.estimation.jackknife import (
    FEWEST_GROUPS,
    ConvergenceCheck,
    check_convergence,
    has_converged,
    samples_needed,
)
from patterns.estimation.observer import OperatorObserver
from patterns.estimation.position_pilot import PositionChoice, choose_positions
from patterns.estimation.presets import PRESETS, Preset, expand_presets, find_top, resolve_estimators
from patterns.estimation.signal_quality import CUTOFF, group_by_estimator, quality
from patterns.estimation.solution import LARGEST_SHARE, TOP_TOKENS, Solution

__all__ = [
    "CUTOFF",
    "ESTIMATORS",
    "FEWEST_GROUPS",
    "LARGEST_SHARE",
    "PRESETS",
    "TOP_TOKENS",
    "ConceptDirections",
    "ConvergenceCheck",
    "OperatorObserver",
    "PositionChoice",
    "Preset",
    "Solution",
    "check_convergence",
    "choose_positions",
    "expand_presets",
    "find_top",
    "group_by_estimator",
    "has_converged",
    "parse_estimators",
    "quality",
    "required_sums",
    "resolve_estimators",
    "samples_needed",
    "select_choices",
    "select_estimators",
    "solve_concepts",
]
