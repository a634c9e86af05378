"""Files of patterns and moments."""

from patterns.io.atomic import TEMPORARY, temporary_path, write_atomically, write_json, write_table
from patterns.io.pattern_files import (
    Patterns,
    load,
    load_moments,
    merge_moments,
    save_in_turn,
    save_moments,
    solution_specs,
)
from patterns.io.safetensors_stream import TensorFile, write_tensors

__all__ = [
    "TEMPORARY",
    "Patterns",
    "TensorFile",
    "load",
    "load_moments",
    "merge_moments",
    "save_in_turn",
    "save_moments",
    "solution_specs",
    "temporary_path",
    "write_atomically",
    "write_json",
    "write_table",
    "write_tensors",
]
