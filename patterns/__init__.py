"""PatternNet and PatternAttribution (Kindermans et al., ICLR 2018) in plain torch.

The steps are: `trace` a model into a network of linear operators, `accumulate` the moments of data, `solve` for the
patterns of each operator, measure their `quality`, and explain inputs with an `Explainer`.

Names are imported on first use, because importing torch takes seconds and zennit is slow.

Example:
    >>> import torch
    >>> from patterns import Explainer, accumulate, choose, solve, trace
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> data = torch.randn(64, 4)
    >>> network = trace(model, data[:2])
    >>> moments = accumulate(network, [data])
    >>> solutions = {name: solve(op, moments[name]).patterns for name, op in network.operators.items()}
    >>> explainer = Explainer(network, choose(network, solutions), ["patternattribution"])
    >>> explainer(data[:5]).maps["patternattribution"].shape
    torch.Size([5, 4])
"""

from typing import TYPE_CHECKING

from patterns.lazy import import_on_use

if TYPE_CHECKING:
    from patterns.attribution.adapters import PatternAttributionComposite, quantus_explain
    from patterns.attribution.captum_api import PatternAttribution, PatternNet
    from patterns.attribution.explainer import Explainer
    from patterns.attribution.explanation import Explanation
    from patterns.attribution.methods import METHODS
    from patterns.attribution.programs import export_program
    from patterns.errors import UserError
    from patterns.estimation.estimators import CHOICES, ESTIMATORS
    from patterns.estimation.observer import Observer, PatchObserver, accumulate, accumulate_patches
    from patterns.estimation.presets import PRESETS
    from patterns.estimation.signal_quality import quality
    from patterns.estimation.solution import Solution, solve
    from patterns.evaluation.conservation import Loss, conservation
    from patterns.io.pattern_files import choose, load, save
    from patterns.moments.gram import PatchMoments
    from patterns.moments.moments import Moments, Sums
    from patterns.operators.gates import Gate, SmoothGate
    from patterns.operators.operator import Operator
    from patterns.tracing.digests import digest
    from patterns.tracing.inputs import contrast
    from patterns.tracing.network import Network, trace

__all__ = [
    "CHOICES",
    "ESTIMATORS",
    "METHODS",
    "PRESETS",
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
    "PatternAttributionComposite",
    "PatternNet",
    "SmoothGate",
    "Solution",
    "Sums",
    "UserError",
    "accumulate",
    "accumulate_patches",
    "choose",
    "conservation",
    "contrast",
    "digest",
    "export_program",
    "load",
    "quality",
    "quantus_explain",
    "save",
    "solve",
    "trace",
]

__getattr__, __dir__ = import_on_use(
    __name__,
    {
        "patterns.attribution.adapters": ("PatternAttributionComposite", "quantus_explain"),
        "patterns.attribution.captum_api": ("PatternAttribution", "PatternNet"),
        "patterns.attribution.explainer": ("Explainer",),
        "patterns.attribution.explanation": ("Explanation",),
        "patterns.attribution.methods": ("METHODS",),
        "patterns.attribution.programs": ("export_program",),
        "patterns.errors": ("UserError",),
        "patterns.estimation.estimators": ("CHOICES", "ESTIMATORS"),
        "patterns.estimation.observer": ("Observer", "PatchObserver", "accumulate", "accumulate_patches"),
        "patterns.estimation.presets": ("PRESETS",),
        "patterns.estimation.signal_quality": ("quality",),
        "patterns.estimation.solution": ("Solution", "solve"),
        "patterns.evaluation.conservation": ("Loss", "conservation"),
        "patterns.io.pattern_files": ("choose", "load", "save"),
        "patterns.moments.gram": ("PatchMoments",),
        "patterns.moments.moments": ("Moments", "Sums"),
        "patterns.operators.gates": ("Gate", "SmoothGate"),
        "patterns.operators.operator": ("Operator",),
        "patterns.tracing.digests": ("digest",),
        "patterns.tracing.inputs": ("contrast",),
        "patterns.tracing.network": ("Network", "trace"),
    },
)
