"""Files that a target needs: the names of classes, a vector, or the direction of a concept."""

from io import BytesIO
from typing import Any

import numpy as np

from ray_jobs.io.object_store import read_option_file
from ray_jobs.jobs.explain.targets import CONCEPT, SIMILARITY, load_target_names, target_error
from ray_jobs.runs.concept_table import find_direction
from ray_jobs.units import format_first_line


def load_target(target: str, run: str, spec: str, file: str | None) -> dict[str, Any]:
    """Return the fields `target`, `classes` and `vector` of a TargetConfig.

    Args:
        target: The target. A concept without an operator gets one.
        run: The folder or URL of the fit.
        spec: The model, whose library may know the names of its classes.
        file: A file of names; None: none.

    Raises:
        UserError: If a file cannot be read, or the fit has no such concept.
    """
    operator, found, concept = target.partition(CONCEPT)
    if found and (not operator or operator.endswith(":")):
        name, direction = find_direction(run, concept, operator.removesuffix(":") or None)
        return {"target": f"{name}:{CONCEPT}{concept}", "classes": (), "vector": tuple(direction.tolist())}
    return {
        "target": target,
        "classes": load_target_names(target, spec, file),
        "vector": load_target_vector(target),
    }


def load_target_vector(target: str) -> tuple[float, ...]:
    """Return the vector of a target `similarity:FILE.npy`; empty for other targets.

    Raises:
        UserError: If the file cannot be read, or holds no vector of finite numbers.
    """
    if not target.startswith(SIMILARITY):
        return ()
    content = read_option_file("--target", target.removeprefix(SIMILARITY))
    try:
        array = np.load(BytesIO(content), allow_pickle=False)
    except Exception as error:  # a damaged file raises many types
        what = f"not an npy file ({format_first_line(error)})"
        raise target_error(target, what, "Write it with numpy.save.") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf" or array.size != max(array.shape, default=0):
        what = f"not one vector of numbers, but {describe_array(array)}"
        raise target_error(target, what, "Save one vector of the length of the model's output.")
    values = array.reshape(-1).astype(np.float64)
    if not np.isfinite(values).all() or not values.any():
        raise target_error(target, "the vector is 0 or not finite", "Save a vector with a direction.")
    return tuple(values.tolist())


def describe_array(array: object) -> str:
    """Describe the content of an npy or npz file for a message."""
    return f"an array of shape {array.shape} and type {array.dtype}" if isinstance(array, np.ndarray) else "an archive"
