"""From a network and its patterns to maps. The adapters for zennit and Quantus are in `adapters`."""

from patterns.attribution.explainer import Explanation
from patterns.attribution.methods import BASELINES, WITH_PATTERNS, method_of, settings_of
from patterns.attribution.rendering import Shown, centred, coloured, photograph, picture, png

__all__ = [
    "BASELINES",
    "WITH_PATTERNS",
    "Explanation",
    "Shown",
    "centred",
    "coloured",
    "method_of",
    "photograph",
    "picture",
    "png",
    "settings_of",
]
