"""Files of patterns and moments."""

from patterns.io.atomic import TEMPORARY_PREFIX, temporary_path, write_atomically, write_json, write_table
from patterns.io.moment_files import load_moments, merge_moments, save_moments
from patterns.io.pattern_files import Patterns, TraceOptions, list_patterns, load, pattern_specs, save_solutions
from patterns.io.safetensors_stream import TensorFile, write_tensors

__all__ = [
    "TEMPORARY_PREFIX",
    "Patterns",
    "TensorFile",
    "TraceOptions",
    "list_patterns",
    "load",
    "load_moments",
    "merge_moments",
    "pattern_specs",
    "save_moments",
    "save_solutions",
    "temporary_path",
    "write_atomically",
    "write_json",
    "write_table",
    "write_tensors",
]
