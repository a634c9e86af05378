"""Files of patterns and moments."""

from typing import TYPE_CHECKING

from patterns.lazy import import_on_use

if TYPE_CHECKING:
    from patterns.io.atomic import TEMPORARY_PREFIX, temporary_path, write_atomically, write_json, write_table
    from patterns.io.moment_files import load_moments, merge_moments, require_moments_of, save_moments
    from patterns.io.network_files import load_network, save_network
    from patterns.io.pattern_files import (
        Patterns,
        TraceOptions,
        list_patterns,
        load,
        pattern_specs,
        save_solutions,
        select_pattern,
    )
    from patterns.io.safetensors_stream import TensorFile, write_tensors

__all__ = [
    "TEMPORARY_PREFIX",
    "Patterns",
    "TensorFile",
    "TraceOptions",
    "list_patterns",
    "load",
    "load_moments",
    "load_network",
    "merge_moments",
    "pattern_specs",
    "require_moments_of",
    "save_moments",
    "save_network",
    "save_solutions",
    "select_pattern",
    "temporary_path",
    "write_atomically",
    "write_json",
    "write_table",
    "write_tensors",
]

__getattr__, __dir__ = import_on_use(
    __name__,
    {
        "patterns.io.atomic": ["TEMPORARY_PREFIX", "temporary_path", "write_atomically", "write_json", "write_table"],
        "patterns.io.moment_files": ["load_moments", "merge_moments", "require_moments_of", "save_moments"],
        "patterns.io.network_files": ["load_network", "save_network"],
        "patterns.io.pattern_files": [
            "Patterns",
            "TraceOptions",
            "list_patterns",
            "load",
            "pattern_specs",
            "save_solutions",
            "select_pattern",
        ],
        "patterns.io.safetensors_stream": ["TensorFile", "write_tensors"],
    },
)
