"""Custom models: load an nn.Module from `package.module:name` or `file.py:name`."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from patterns import UserError
from ray_jobs.io.user_code import describe_error, import_attribute, is_file_spec

REMEDY = "Pass FILE.py:NAME or MODULE:NAME, where NAME is a function without arguments, or a model."
# Specs that version 0.2.0 wrote into manifests, of models that have been moved since.
MOVED_SPECS = {"ray_jobs.small:small_cnn": "ray_jobs.studies.small_cnn:small_cnn"}


def load_custom_model(spec: str) -> nn.Module:
    """Return the model of `package.module:name` or `file.py:name`.

    The model can import from the current folder and from the folder of its file.

    Args:
        spec: The spec. `name` is a function or class that is called without arguments, or an nn.Module.

    Raises:
        UserError: If the import or the call fails with any exception, or the result is not an nn.Module.
    """
    spec = MOVED_SPECS.get(spec, spec)
    name, is_path = spec.rpartition(":")[2], is_file_spec(spec)
    with import_attribute(spec, f"--model {spec}", REMEDY) as found:
        if not isinstance(found, nn.Module | torch.export.ExportedProgram):
            require_no_arguments(spec, found)
        try:
            # An imported module keeps its model, which must not change. A file is executed again by every load.
            made = copy.deepcopy(found) if isinstance(found, nn.Module) and not is_path else found
            if callable(made) and not isinstance(made, nn.Module):
                made = made()
            if isinstance(made, torch.export.ExportedProgram):
                made = made.module()
        except (Exception, SystemExit) as error:
            what = f"{name} failed ({describe_error(error)})"
            raise UserError(
                f"--model {spec}", what, "Fix the function, and test it by calling it in Python."
            ) from error
    if not isinstance(made, nn.Module):
        what = f"{name} {'returns' if callable(found) else 'is'} {describe_value(made)}, not a torch.nn.Module"
        raise UserError(f"--model {spec}", what, suggest_remedy(made))
    return made


def require_no_arguments(spec: str, function: Any) -> None:
    """Raise UserError for a function or class that cannot be called without arguments."""
    if not callable(function):
        return
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):  # some functions written in C have no signature
        return
    variable = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in variable]
    if needed:
        what = f"{spec.rpartition(':')[2]} needs arguments: {', '.join(needed)}"
        raise UserError(f"--model {spec}", what, "Write a function without arguments that returns the model.")


def describe_value(value: Any) -> str:
    """Describe a value for a message."""
    if value is None:
        return "None"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {', '.join(type(v).__name__ for v in value[:4]) or 'nothing'}"
    if isinstance(value, Mapping):
        tensors = bool(value) and all(isinstance(v, torch.Tensor) for v in value.values())
        return f"a {'state dict' if tensors else 'dictionary'} ({type(value).__name__})"
    return f"{value!r}" if isinstance(value, int | float | str) else f"an object of type {type(value).__name__}"


def suggest_remedy(value: Any) -> str:
    """Return the remedy for a value that is not a model."""
    if isinstance(value, Mapping):
        return "Return the torch.nn.Module, and pass its state dict as --weights FILE."
    return "Return only the torch.nn.Module."
