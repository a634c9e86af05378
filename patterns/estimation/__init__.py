"""From moments to patterns, with their quality and their standard error."""

from patterns.estimation.estimators import ESTIMATORS, Solution, chosen, parsed, selected, wanted
from patterns.estimation.jackknife import FEWEST_GROUPS, ConvergenceCheck, converged, look, samples_needed
from patterns.estimation.observer import Observation
from patterns.estimation.position_pilot import positions_needed
from patterns.estimation.signal_quality import CUTOFF, quality, signals

__all__ = [
    "CUTOFF",
    "ESTIMATORS",
    "FEWEST_GROUPS",
    "ConvergenceCheck",
    "Observation",
    "Solution",
    "chosen",
    "converged",
    "look",
    "parsed",
    "positions_needed",
    "quality",
    "samples_needed",
    "selected",
    "signals",
    "wanted",
]
