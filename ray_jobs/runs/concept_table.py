"""The table of a fit's concepts, concepts.parquet: one row for each operator and concept."""

from collections.abc import Collection

import numpy as np
import pyarrow as pa

from patterns import UserError
from ray_jobs.io.object_store import locate, read_table

CONCEPT_TABLE = "concepts.parquet"
CONCEPTS_SCHEMA = pa.schema(
    [
        ("operator", pa.string()),
        ("concept", pa.string()),
        ("n", pa.int64()),
        ("mean", pa.float64()),
        ("variance", pa.float64()),
        ("relative_error", pa.float64()),
        ("direction", pa.list_(pa.float64())),
        ("standard_error", pa.list_(pa.float64())),
    ]
)


def read_directions(run: str) -> dict[str, dict[str, np.ndarray]]:
    """Return the directions of a run's concepts by operator and concept, in the order of the network.

    Args:
        run: The folder or URL of a fit with concepts.

    Raises:
        UserError: If the fit has no concepts.
    """
    try:
        table = read_table(locate(run) / CONCEPT_TABLE)
    except FileNotFoundError as error:
        raise UserError(run, "this fit has no concepts", "Fit with --concepts LABELS.parquet.") from error
    found: dict[str, dict[str, np.ndarray]] = {}
    for row in table.select(["operator", "concept", "direction"]).to_pylist():
        found.setdefault(row["operator"], {})[row["concept"]] = np.array(row["direction"])
    return found


def find_direction(run: str, concept: str, operator: str | None) -> tuple[str, np.ndarray]:
    """Return the direction of a concept, and the operator in whose outputs it lies.

    Args:
        run: The folder or URL of a fit with concepts.
        concept: The name of the concept.
        operator: The operator; None: the one before the last, whose outputs the class layer reads.

    Raises:
        UserError: If there is no such concept or operator, or the concept has no direction.
    """
    directions = read_directions(run)
    operators = list(directions)
    name = operator or operators[-2 if len(operators) > 1 else -1]
    require_known(run, "operator", name, operators)
    require_known(run, "concept", concept, directions[name])
    found = directions[name][concept]
    if not found.any():
        what = f"the concept {concept!r} has no direction in {name}, because it is constant in the samples of the fit"
        raise UserError(run, what, "Fit with labels of images with and without it.", "target")
    return name, found


def require_known(run: str, noun: str, name: str, known: Collection[str]) -> None:
    """Raise UserError if a run has no concept or operator of a name."""
    if name not in known:
        shown = ", ".join(list(known)[-8:])
        raise UserError(run, f"no {noun} {name!r} with directions", f"Choose from {shown}.", "target")
