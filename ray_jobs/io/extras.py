"""Packages that only some uses need: import them, or name the extra that installs them in an error."""

import importlib
from typing import Any

from patterns import UserError

PROJECTS = {"sklearn": "scikit-learn", "huggingface_hub": "huggingface-hub"}  # names on PyPI, if they differ


def import_extra(extra: str, *modules: str, where: str = "", parameter: str | None = None) -> Any:
    """Import modules of packages that an extra of this project installs.

    Args:
        extra: The extra of `patternnet-ray`.
        modules: The modules; all are imported.
        where: What needs the packages, in the error.
        parameter: The parameter that asks for them, in the error.

    Returns:
        The top package of the first module.

    Raises:
        UserError: If a package is missing, or cannot be imported.

    Example:
        >>> import_extra("zarr", "no_such_zarr", where="maps")
        Traceback (most recent call last):
            ...
        patterns.errors.UserError: maps: no_such_zarr is not installed. Run pip install 'patternnet-ray[zarr]'.
    """
    tops = [module.partition(".")[0] for module in modules]
    for module, top in zip(modules, tops):
        try:
            importlib.import_module(module)
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name in (top, module)
            what = "is not installed" if missing else f"cannot be imported ({' '.join(str(error).split())})"
            remedy = f"Run pip install 'patternnet-ray[{extra}]'."
            raise UserError(where, f"{PROJECTS.get(top, top)} {what}", remedy, parameter) from error
    return importlib.import_module(tops[0])
