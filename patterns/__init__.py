"""PatternNet and PatternAttribution (Kindermans et al., ICLR 2018) in plain torch.

trace a model → accumulate its moments over data → solve for patterns → judge their quality → explain.
"""

from patterns.attribution import PatternAttribution, PatternNet
from patterns.digests import digest
from patterns.errors import UserError
from patterns.estimators import CHOICES, ESTIMATORS, Solution, solve
from patterns.explain import Explainer, Explanation
from patterns.graph import Network, trace
from patterns.losses import Loss, conservation
from patterns.methods import METHODS
from patterns.moments import Moments, Sums
from patterns.observe import Observer, PatchObserver, accumulate, accumulate_patches
from patterns.operators import Gate, Operator
from patterns.patches import PatchMoments
from patterns.rho import quality
from patterns.storage import choose, load, save

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
