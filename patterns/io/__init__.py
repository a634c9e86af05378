"""Files of patterns and moments."""

from patterns.io.safetensors_stream import TensorFile, write_tensors
from patterns.io.storage import (
    TEMPORARY,
    Patterns,
    load,
    load_moments,
    merge_moments,
    save_in_turn,
    save_moments,
    solution_specs,
    temporary_path,
    write_atomically,
    write_json,
    write_table,
)

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
