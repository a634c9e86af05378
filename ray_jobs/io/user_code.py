"""Python code of the user: import what `package.module:name` or `file.py:name` names."""

import hashlib
import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from patterns import UserError

PACKAGE = "_model_file_"  # prefix of the package in which a model's file is executed
SIBLINGS: set[str] = set()  # names of the modules that the last model's file imported from its own folder
LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def is_file_spec(spec: str) -> bool:
    """Return whether a spec is `file.py:name` and not `package.module:name`."""
    return spec.rpartition(":")[0].endswith(".py")


@contextmanager
def import_attribute(spec: str, place: str, remedy: str) -> Iterator[Any]:
    """Import what `package.module:name` or `file.py:name` names; inside the context, Python can import from its folder.

    Args:
        spec: The spec.
        place: The option in messages.
        remedy: The remedy in messages.

    Raises:
        UserError: If the import fails with any exception, or the module has no such attribute.
    """
    where, _, name = spec.rpartition(":")
    file, is_path = Path(where), is_file_spec(spec)  # the path of a user's file is interpreted here only
    if not is_path and file.is_file():
        raise UserError(place, f"{where} is not a .py file", remedy)
    with extend_import_path(file.absolute().parent if is_path else None):
        try:
            module = execute_file(file.absolute()) if is_path else importlib.import_module(where)
        except (Exception, SystemExit) as error:
            what = f"{where} cannot be imported ({describe_error(error)})"
            raise UserError(place, what, "Fix the file. " + remedy if is_path else remedy) from error
        if not hasattr(module, name):
            raise UserError(place, f"{where} has no attribute {name!r}", remedy)
        yield getattr(module, name)


@contextmanager
def extend_import_path(folder: Path | None) -> Iterator[None]:
    """Let Python import from a folder, before all other folders, and from the current folder, after all others.

    Modules that an earlier file imported from its folder are removed from `sys.modules`. So another
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


def describe_error(error: BaseException) -> str:
    """Return an exception's type, message, and the line of the user's code that raised it."""
    message = str(error).strip().partition("\n")[0]
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    if isinstance(error, SyntaxError):  # its message names the line
        return text
    skipped = (*LIBRARIES, str(Path(__file__).parents[1]), "<frozen ")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(skipped)]
    return f"{text}, at {frames[-1].filename}:{frames[-1].lineno}" if frames else text
