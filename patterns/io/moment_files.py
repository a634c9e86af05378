"""Files of moments: partial moments of some shards, which are merged into one file or one operator's moments."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from patterns.errors import UserError
from patterns.io.atomic import write_atomically
from patterns.io.safetensors_stream import REMEDY, Specs, TensorFile, tensor_specs, write_tensors
from patterns.moments.gram import PatchMoments
from patterns.moments.moments import Moments
from patterns.operators.operator import Operator

FORMAT = "1"
M = TypeVar("M", Moments, PatchMoments)


def save_moments(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write moments of some operators.

    Args:
        path: The file.
        tensors: The sums by name, such as `{operator}/total.xy`: see `OperatorObserver.tensors`.
        metadata: Texts to write to the header.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import patterns, torch
        >>> observer = patterns.Observer(patterns.trace(torch.nn.Linear(3, 2), torch.zeros(2, 3)))
        >>> _ = observer.update(torch.rand(5, 3))
        >>> with TemporaryDirectory() as folder:
        ...     save_moments(Path(folder) / "part", observer.tensors(), {})
        ...     with TensorFile(Path(folder) / "part") as file:
        ...         load_moments([file], "linear.0").total.n.tolist()
        [5, 5]
    """
    header = {"format": FORMAT, **metadata}
    write_atomically(path, lambda temporary: write_tensors(temporary, tensor_specs(tensors), tensors.values(), header))


def load_moments(
    files: Sequence[TensorFile],
    operator: str,
    moments_type: type[M] = Moments,  # type: ignore[assignment]
    select: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> M:
    """Load the moments of one operator, summed over several files. Other tensors are not read.

    Args:
        files: The files.
        operator: The operator's name.
        moments_type: The type of the moments: `Moments` or `PatchMoments`.
        select: Selects the operator's neurons in the sums of one file; see `Operator.select_rows`.

    Raises:
        UserError: If a file lacks the moments of this operator, or has other sums of it than another file.
        KeyError, ValueError: If they are of the other type.

    Example:
        See `save_moments`.
    """
    names = [name for name in list_sums(files[0]) if name.rpartition("/")[0] == operator]
    for file in files:
        if not names or not file.specs.keys() >= set(names):
            raise UserError(file.where, f"no moments of {operator}", REMEDY)
    return moments_type.from_tensors({name.removeprefix(f"{operator}/"): add_up(files, name, select) for name in names})


def list_sums(file: TensorFile) -> Specs:
    """Return the sums in a file of moments. Version 0.2 also stored Σyyᵀ, which follows from the others."""
    return {name: spec for name, spec in file.specs.items() if not name.endswith("/outer")}


def add_up(files: Sequence[TensorFile], name: str, select: Callable[[Tensor], Tensor] = lambda sums: sums) -> Tensor:
    """Return the sum of a tensor over files. Moments are merged in this way, tensor by tensor."""
    first, *others = files
    total = select(first.get(name))
    for file in others:
        sums = select(file.get(name))
        if (sums.dtype, sums.shape) != (total.dtype, total.shape):
            what = f"another version than that of {first.where} took the sums {name}, and they cannot be added"
            raise UserError(file.where, what, "Fit all data with one version.")
        total.add_(sums)
    return total


def require_moments_of(file: TensorFile, operators: Mapping[str, Operator]) -> None:
    """Raise UserError if a file has moments of other neurons or another gate than an operator has.

    Args:
        file: The file.
        operators: The operators by name; moments of others are not checked.

    Example:
        See `save_moments`.
    """
    for name, (dtype, shape) in file.specs.items():
        operator, _, field = name.rpartition("/")
        if field not in ("total.n", "open.n") or operator not in operators:
            continue
        neurons, gate = operators[operator].neurons, operators[operator].gate
        if shape != (neurons,):
            what = f"the moments of {operator} are those of {shape[0]} neurons, and the model now has {neurons}"
        elif field == "open.n" and (gate is None or gate.is_smooth != dtype.is_floating_point):
            what = f"the moments of {operator} are those of another gate than the model now has"
        else:
            continue
        raise UserError(file.where, f"{what}: an earlier version took them", "Go on with that version, or fit again.")


def merge_moments(path: Path, files: Sequence[TensorFile], metadata: Mapping[str, str]) -> None:
    """Write the sum of several files of moments. At most two tensors are in memory at once.

    Args:
        path: The file to write.
        files: The files to merge.
        metadata: Texts to write to the header.

    Raises:
        ValueError: If the names, dtypes or shapes of their tensors differ.

    Example:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     save_moments(Path(folder) / "part", {"conv/total.n": torch.tensor([5])}, {})
        ...     with TensorFile(Path(folder) / "part") as file:
        ...         merge_moments(Path(folder) / "merged", [file, file], {})
        ...     with TensorFile(Path(folder) / "merged") as merged:
        ...         merged.get("conv/total.n").tolist()
        [10]
    """
    specs = list_sums(files[0])
    if any(list_sums(file) != specs for file in files):
        raise ValueError("files of moments of different operators or sums")
    sums, header = (add_up(files, name) for name in specs), {"format": FORMAT, **metadata}
    write_atomically(path, lambda temporary: write_tensors(temporary, specs, sums, header))
