"""Files of moments: partial moments of some shards, which are merged into one file or one operator's moments."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from patterns.errors import UserError
from patterns.io.atomic import write_atomically
from patterns.io.safetensors_stream import REMEDY, Specs, TensorFile, tensor_specs, write_tensors
from patterns.moments.concepts import ConceptSums
from patterns.moments.gram import PatchMoments
from patterns.moments.moments import TOKENS, Moments
from patterns.operators.operator import Operator

FORMAT = "1"
EARLIER, REMEDY_EARLIER = "an earlier version took them", "Go on with that version, or fit again."
M = TypeVar("M", Moments, PatchMoments, ConceptSums)


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
    like: Operator | None = None,
) -> M:
    """Load the moments of one operator, summed over several files. Other tensors are not read.

    Args:
        files: The files.
        operator: The operator's name; for `ConceptSums`, followed by `/concepts`.
        moments_type: The type of the moments: `Moments`, `PatchMoments` or `ConceptSums`.
        like: The operator, if its neurons are to be checked. Of moments of its whole layer, its rows are selected.

    Raises:
        UserError: If a file lacks the moments of this operator, has those of other neurons, or has other sums of it
            than another file.
        KeyError, ValueError: If they are of the other type.

    Example:
        See `save_moments`.
    """
    names = [name for name in common_sums(files) if name.rpartition("/")[0] == operator]
    for file in files:
        if not names or not file.specs.keys() >= set(names):
            raise UserError(file.where, f"no moments of {operator}", REMEDY)
        if like is not None:
            require_neurons(file, like, whole_layer=True)
    sums = (add_up(files, name) if like is None else add_up(files, name, like.select_rows) for name in names)
    return moments_type.from_tensors(dict(zip((name.removeprefix(f"{operator}/") for name in names), sums)))


def list_sums(file: TensorFile) -> Specs:
    """Return the sums in a file of moments. Version 0.2 also stored Σyyᵀ, which follows from the others."""
    return {name: spec for name, spec in file.specs.items() if not name.endswith("/outer")}


def common_sums(files: Sequence[TensorFile]) -> Specs:
    """Return the sums in the first file, without the norms of tokens if another file lacks them."""

    def is_common(name: str) -> bool:
        return name.rpartition("/")[2] not in TOKENS or all(name in file.specs for file in files)

    return {name: spec for name, spec in list_sums(files[0]).items() if is_common(name)}


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
    for name, operator in operators.items():
        if f"{name}/total.n" in file.specs:
            require_neurons(file, operator, whole_layer=False)
            dtype, _ = file.specs.get(f"{name}/open.n", (None, ()))
            smooth = None if operator.gate is None else operator.gate.is_smooth
            if (None if dtype is None else dtype.is_floating_point) is not smooth:
                what = f"the moments of {name} are those of another gate than the model now has"
                raise UserError(file.where, f"{what}: {EARLIER}", REMEDY_EARLIER)


def require_neurons(file: TensorFile, operator: Operator, whole_layer: bool) -> None:
    """Raise UserError if a file has moments of other neurons than an operator has; see `Operator.select_rows`.

    Args:
        file: The file.
        operator: The operator.
        whole_layer: Whether moments of all rows of its layer are accepted.
    """
    _, (count,) = file.specs[f"{operator.name}/total.n"]
    is_whole = operator.rows is not None and count > operator.rows[-1]
    if count != operator.neurons and not (whole_layer and is_whole):
        what = f"the moments of {operator.name} are those of {count} neurons, and the model now has {operator.neurons}"
        raise UserError(file.where, f"{what}: {EARLIER}", REMEDY_EARLIER)


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
    specs = common_sums(files)
    if any(common_sums([file, *files]) != specs for file in files):
        raise ValueError("files of moments of different operators or sums")
    sums, header = (add_up(files, name) for name in specs), {"format": FORMAT, **metadata}
    write_atomically(path, lambda temporary: write_tensors(temporary, specs, sums, header))
