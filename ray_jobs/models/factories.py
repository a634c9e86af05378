"""Custom models: load an nn.Module from `package.module:name` or `file.py:name`."""

import copy
import hashlib
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from patterns import UserError

REMEDY = "Pass FILE.py:NAME or MODULE:NAME, where NAME is a function without arguments, or a model."
# Specs that version 0.2.0 wrote into manifests, of models that have been moved since.
MOVED_SPECS = {"ray_jobs.small:small_cnn": "ray_jobs.studies.small_cnn:small_cnn"}
PACKAGE = "_model_file_"  # prefix of the package in which a model's file is executed
SIBLINGS: set[str] = set()  # names of the modules that the last model's file imported from its own folder
LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def load_custom_model(spec: str) -> nn.Module:
    """Return the model of `package.module:name` or `file.py:name`.

    The model can import from the current folder and from the folder of its file.

    Args:
        spec: The spec. `name` is a function or class that is called without arguments, or an nn.Module.

    Raises:
        UserError: If the import or the call fails with any exception, or the result is not an nn.Module.
    """
    where, _, name = MOVED_SPECS.get(spec, spec).rpartition(":")
    file = Path(where)  # the path of a model's file is interpreted here only
    is_path = file.suffix == ".py"
    if not is_path and file.is_file():
        raise UserError(f"--model {spec}", f"{where} is not a .py file", REMEDY)
    with extend_import_path(file.absolute().parent if is_path else None):
        try:
            module = execute_file(file.absolute()) if is_path else importlib.import_module(where)
        except (Exception, SystemExit) as error:
            what = f"{where} cannot be imported ({describe_error(error)})"
            raise UserError(f"--model {spec}", what, "Fix the file. " + REMEDY if is_path else REMEDY) from error
        if not hasattr(module, name):
            raise UserError(f"--model {spec}", f"{where} has no function or model {name!r}", REMEDY)
        found = getattr(module, name)
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


@contextmanager
def extend_import_path(folder: Path | None) -> Iterator[None]:
    """Let Python import from a folder, before all other folders, and from the current folder, after all others.

    Modules that an earlier model's file imported from its folder are removed from `sys.modules`. So another model's
    file finds its own modules of the same names, and every load draws the same random numbers.
    """
    for name in SIBLINGS:
        sys.modules.pop(name, None)
    SIBLINGS.clear()
    before, path, arguments = set(sys.modules), list(sys.path), list(sys.argv)
    sys.path[:] = [*([str(folder)] if folder else []), *path, ""]
    sys.argv[1:] = []  # a file that parses its command line must not see this program's arguments
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:], sys.argv[:] = path, arguments
        if folder is not None:
            new = (name for name in set(sys.modules) - before if name.partition(".")[0] not in before)
            SIBLINGS.update(name for name in new if name.startswith(PACKAGE) or is_sibling(sys.modules[name], folder))


def is_sibling(module: ModuleType, folder: Path) -> bool:
    """Return whether a module's file is below a folder, but not in an environment with libraries there."""
    file = getattr(module, "__file__", None) or "/"
    return folder in Path(file).parents and not file.startswith(LIBRARIES)


def execute_file(file: Path) -> ModuleType:
    """Execute a file as a module of a package for its folder, so that relative imports work."""
    package = f"{PACKAGE}{hashlib.sha256(str(file.parent).encode()).hexdigest()[:12]}"
    sys.modules[package] = ModuleType(package)
    sys.modules[package].__path__ = [str(file.parent)]
    name = f"{package}.{file.stem.replace('.', '_')}"
    description = importlib.util.spec_from_file_location(name, file)
    assert description is not None
    assert description.loader is not None
    module = importlib.util.module_from_spec(description)
    sys.modules[name] = module
    description.loader.exec_module(module)
    return module


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


def describe_error(error: BaseException) -> str:
    """Return an exception's type, message, and the line of the user's code that raised it."""
    message = str(error).strip().partition("\n")[0]
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    if isinstance(error, SyntaxError):  # its message names the line
        return text
    skipped = (*LIBRARIES, str(Path(__file__).parents[1]), "<frozen ")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(skipped)]
    return f"{text}, at {frames[-1].filename}:{frames[-1].lineno}" if frames else text


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
