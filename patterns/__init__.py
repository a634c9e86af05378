"""PatternNet and PatternAttribution (Kindermans et al., ICLR 2018) in plain torch.

trace a model → accumulate its moments over data → solve for patterns → judge their quality → explain.
"""

from patterns.attribution.captum_api import PatternAttribution, PatternNet
from patterns.attribution.explainer import Explainer, Explanation
from patterns.attribution.methods import METHODS
from patterns.errors import UserError
from patterns.estimation.estimators import CHOICES, ESTIMATORS, Solution, solve
from patterns.estimation.observer import Observer, PatchObserver, accumulate, accumulate_patches
from patterns.estimation.signal_quality import quality
from patterns.evaluation.conservation import Loss, conservation
from patterns.io.pattern_files import choose, load, save
from patterns.moments.gram import PatchMoments
from patterns.moments.moments import Moments, Sums
from patterns.operators.operator import Gate, Operator
from patterns.tracing.digests import digest
from patterns.tracing.network import Network, trace

__all__ = [
    "CHOICES",
    "ESTIMATORS",
    "METHODS",
    "Explainer",
    "Explanation",
    "Gate",
    "Loss",
    "Moments",
    "Network",
    "Observer",
    "Operator",
    "PatchMoments",
    "PatchObserver",
    "PatternAttribution",
    "PatternNet",
    "Solution",
    "Sums",
    "UserError",
    "accumulate",
    "accumulate_patches",
    "choose",
    "conservation",
    "digest",
    "load",
    "quality",
    "save",
    "solve",
    "trace",
]
