"""Files of a pattern set: safetensors for tensors, Parquet for tables. Nothing is ever pickled.

Every file is written aside and renamed, so it is wholly there or not there.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from patterns.errors import UserError
from patterns.estimation.estimators import Choices, Solution, parse_estimators, select_choices, select_estimators
from patterns.io.atomic import temporary_path, write_atomically
from patterns.io.safetensors_stream import Specs, TensorFile, tensor_specs, write_tensors
from patterns.moments.gram import PatchMoments
from patterns.moments.moments import Moments
from patterns.operators.operator import Operator
from patterns.tracing.network import Network

FORMAT = "1"
Patterns = dict[str, dict[str, Tensor]]  # by operator and row of ESTIMATORS


def save(folder: str | Path, solutions: Mapping[str, Solution], weights_digest: str) -> None:
    """Write patterns.safetensors, patterns.parquet and neurons.parquet."""
    folder = Path(folder)
    named = {f"{operator}/{row}": p for operator, s in solutions.items() for row, p in s.patterns.items()}
    save_solutions(folder, tensor_specs(named), solutions.items(), weights_digest)


def save_solutions(folder: Path, specs: Specs, solutions: Iterable[tuple[str, Solution]], weights_digest: str) -> None:
    """As `save`, for solutions that come one by one, given what they will hold: see `solution_specs`."""
    names = ("patterns.safetensors", "patterns.parquet", "neurons.parquet")
    with ExitStack() as stack:
        tensors, patterns, neurons = (stack.enter_context(temporary_path(folder / name)) for name in names)
        pattern_rows = stack.enter_context(pq.ParquetWriter(patterns, PATTERN_SCHEMA))
        neuron_rows = stack.enter_context(pq.ParquetWriter(neurons, NEURON_SCHEMA))

        def written() -> Iterator[Tensor]:
            for item in solutions:
                neuron_rows.write_table(neuron_table(item))
                if item[1].patterns:
                    pattern_rows.write_table(pattern_table(item))
                yield from item[1].patterns.values()

        write_tensors(tensors, specs, written(), {"format": FORMAT, "weights": weights_digest})


def pattern_specs(operators: Iterable[Operator], choices: Choices) -> Specs:
    """What the patterns of some choices will be for some operators, before they are solved for."""
    return {
        f"{operator.name}/{row}": (
            torch.promote_types(operator.weight.dtype, torch.float32),
            tuple(operator.weight.shape),
        )
        for operator in operators
        for row in select_estimators(operator, choices)
    }


def load(folder: str | Path, weights_digest: str | None, operators: Collection[str] | None = None) -> Patterns:
    """The patterns of a run, for the model of this digest; of some operators only, where they are named.

    weights_digest: None takes them whatever weights they were fitted for.

    Raises UserError where there are none, or where they were fitted for other weights.
    """
    path = Path(folder) / "patterns.safetensors"
    with open_tensors(path, "Run `patternnet fit` first, or name a run that has finished") as file:
        fitted_for = (file.metadata() or {}).get("weights")
        if weights_digest is not None and fitted_for != weights_digest:
            raise UserError(
                str(path),
                f"these patterns were fitted for weights {fitted_for}, the model has {weights_digest}",
                "Load the weights of the fit, or fit again for these.",
            )
        patterns: Patterns = {}
        for key in file.keys():
            operator, _, name = key.rpartition("/")
            if operators is not None and operator not in operators:
                continue
            patterns.setdefault(operator, {})[name] = file.get_tensor(key)
    return patterns


def choose(network: Network, patterns: Patterns, choices: Choices = "default") -> dict[str, Tensor]:
    """One pattern tensor for each operator: the first that some choices mean for it.

    UserError where the run does not hold it, and for the identity, which has none.
    """
    used = {select_choices(name, choices)[0] for name in network.operators}
    if unused := [choice for _, choice in parse_estimators(choices, network.operators) if choice not in used]:
        what = f"{unused[0]!r} is never used, since an earlier estimator has all its operators"
        raise UserError("--estimator", what, "Write one for all operators, or OPERATORS=ESTIMATOR before it.")
    picked = {}
    for name, operator in network.operators.items():
        row = next(iter(select_estimators(operator, choices)), None)
        if row is None:
            raise UserError(name, "the identity has no pattern", "Choose another --estimator for this operator.")
        if row not in patterns.get(name, {}):
            remedy = "Run `patternnet solve` with an estimator that has it, or choose another --estimator."
            raise UserError(name, f"the run holds no pattern {row!r} for this operator", remedy)
        picked[name] = patterns[name][row]
    return picked


@dataclass(frozen=True)
class TraceOptions:
    """How the model of a run was traced: see `patterns.trace`. input_shape: without the batch."""

    input_shape: tuple[int, ...]
    pass_through: tuple[str, ...] = ()
    strip_softmax: bool = False


def load_trace_options(folder: Path) -> TraceOptions:
    """Read how the model of a run was traced. UserError if the folder has no manifest of a fit."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        model = manifest["fit"]["model"]
        shape = tuple(manifest["model"]["input_shape"])
        return TraceOptions(shape, tuple(model["pass_through"]), bool(model.get("strip_softmax", False)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "Name the folder of a finished fit, or give an example input."
        raise UserError(str(path), "no manifest of a fit", remedy) from error


M = TypeVar("M", Moments, PatchMoments)


def save_moments(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the named sums of some operators, `{operator}/total.xy` and so on: see `Observation.tensors`."""
    about = {"format": FORMAT, **metadata}
    write_atomically(path, lambda aside: write_tensors(aside, tensor_specs(tensors), tensors.values(), about))


def load_moments(files: Sequence[TensorFile], operator: str, kind: type[M] = Moments) -> M:  # type: ignore[assignment]
    """The moments of one operator over several files, of the kind that they hold; nothing else of them is read.

    UserError where a file lacks them; KeyError or ValueError for sums of another kind.
    """
    names = [name for name in sums_of(files[0]) if name.rpartition("/")[0] == operator]
    for file in files:
        if not names or not file.specs.keys() >= set(names):
            raise UserError(file.where, f"no moments of {operator}", "Delete the run's moments/ and fit again.")
    return kind.from_tensors({name.removeprefix(f"{operator}/"): summed(files, name) for name in names})


def sums_of(file: TensorFile) -> Specs:
    """What a file of moments holds, without the Σyyᵀ of version 0.2, which follows from the others."""
    return {name: spec for name, spec in file.specs.items() if not name.endswith("/outer")}


def summed(files: Iterable[TensorFile], name: str) -> Tensor:
    """One of the sums over several files: what merging moments adds, it adds name by name."""
    return reduce(Tensor.add_, (file.get(name) for file in files))


def merge_moments(path: Path, files: Sequence[TensorFile], metadata: Mapping[str, str]) -> None:
    """Write the sums over several files of moments, no more than two tensors in memory at a time.

    ValueError where the names or shapes differ.
    """
    specs = sums_of(files[0])
    if any(sums_of(file) != specs for file in files):
        raise ValueError("files of moments of different operators or sums")
    sums = (summed(files, name) for name in specs)
    write_atomically(path, lambda aside: write_tensors(aside, specs, sums, {"format": FORMAT, **metadata}))


def open_tensors(path: Path, remedy: str) -> safe_open:
    """A safetensors file, or a UserError with this remedy."""
    try:
        return safe_open(path, "pt")
    except FileNotFoundError as error:
        raise UserError(str(path), "no such file", f"{remedy}.") from error
    except SafetensorError as error:
        raise UserError(str(path), f"not a whole safetensors file ({error})", f"{remedy}.") from error


PATTERN_SCHEMA = pa.schema(
    [("operator", pa.string()), ("neuron", pa.int32()), ("estimator", pa.string()), ("pattern", pa.list_(pa.float32()))]
)
NEURON_SCHEMA = pa.schema(
    [
        ("operator", pa.string()),
        ("neuron", pa.int32()),
        ("n", pa.int64()),
        ("n_positive", pa.int64()),
        ("mean_y", pa.float64()),
        ("var_y", pa.float64()),
        ("flag", pa.string()),
    ]
)


def pattern_table(item: tuple[str, Solution]) -> pa.Table:
    operator, solution = item
    tables = []
    for name, pattern in solution.patterns.items():
        k, d = len(pattern), pattern[0].numel()
        values = pa.array(pattern.float().flatten().numpy())
        offsets = pa.array(range(0, k * d + 1, d), pa.int32()) if k * d < 2**31 else None
        lists = pa.ListArray.from_arrays(offsets, values)
        columns = [pa.array([operator] * k), pa.array(range(k), pa.int32()), pa.array([name] * k), lists]
        tables.append(pa.Table.from_arrays(columns, schema=PATTERN_SCHEMA))
    return pa.concat_tables(tables)


def neuron_table(item: tuple[str, Solution]) -> pa.Table:
    operator, s = item
    k = len(s.flags)
    columns = [[operator] * k, range(k), s.n.numpy(), s.n_positive.numpy(), s.mean_y.numpy(), s.var_y.numpy(), s.flags]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, NEURON_SCHEMA)]
    return pa.Table.from_arrays(arrays, schema=NEURON_SCHEMA)
