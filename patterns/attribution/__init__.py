"""From a network and its patterns to maps. The adapters for zennit and Quantus are in `adapters`."""

from patterns.attribution.channels import Channels, list_last_of_resolutions
from patterns.attribution.explanation import Explanation
from patterns.attribution.methods import BACKWARD_PASSES, BASELINES, WITH_PATTERNS, parse_method, resolve_settings
from patterns.attribution.rendering import (
    RenderedExplanation,
    center_values,
    encode_png,
    render_input,
    render_map,
    values_to_image,
)

__all__ = [
    "BACKWARD_PASSES",
    "BASELINES",
    "WITH_PATTERNS",
    "Channels",
    "Explanation",
    "RenderedExplanation",
    "center_values",
    "encode_png",
    "list_last_of_resolutions",
    "parse_method",
    "render_input",
    "render_map",
    "resolve_settings",
    "values_to_image",
]
