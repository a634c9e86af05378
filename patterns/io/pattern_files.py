"""Files of patterns and moments: safetensors for tensors, Parquet for tables. Nothing is pickled.

Every file is written atomically (see `patterns.io.atomic`).
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from patterns.errors import UserError
from patterns.estimation.estimators import CHOICES, Choices, select_estimators
from patterns.estimation.presets import resolve_estimators
from patterns.estimation.solution import Solution
from patterns.io.atomic import temporary_path
from patterns.io.safetensors_stream import Specs, tensor_specs, write_tensors
from patterns.operators.operator import Operator
from patterns.tracing.network import Network

FORMAT = "1"
PATTERNS = "patterns.safetensors"
Patterns = dict[str, dict[str, Tensor]]  # by operator and name from ESTIMATORS


@dataclass(frozen=True)
class TraceOptions:
    """Options with which a model was traced; see `patterns.trace`.

    Attributes:
        input_shape: Shape of a sample.
        pass_through: The operations whose usual gradient was accepted.
        strip_softmax: Whether a final softmax, log-softmax or sigmoid was left off.

    Example:
        >>> TraceOptions((3, 224, 224), pass_through=("gelu",)).strip_softmax
        False
    """

    input_shape: tuple[int, ...]
    pass_through: tuple[str, ...] = ()
    strip_softmax: bool = False


def save(
    folder: str | Path,
    solutions: Mapping[str, Solution],
    weights_digest: str,
    trace_options: TraceOptions | None = None,
) -> None:
    """Write patterns.safetensors, patterns.parquet and neurons.parquet.

    Args:
        folder: The folder, which is created if it does not exist.
        solutions: The solution of each operator by its name.
        weights_digest: The `patterns.digest` of the model.
        trace_options: How the model was traced. With it, `Explainer.load` needs no example input.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import patterns
        >>> model = torch.nn.Linear(3, 2)
        >>> network = patterns.trace(model, torch.zeros(2, 3))
        >>> moments = patterns.accumulate(network, [torch.rand(50, 3)])
        >>> solutions = {name: patterns.solve(op, moments[name]) for name, op in network.operators.items()}
        >>> with TemporaryDirectory() as folder:
        ...     save(folder, solutions, patterns.digest(model), TraceOptions((3,)))
        ...     patterns.load(folder, patterns.digest(model))["linear.0"]["linear"].shape
        torch.Size([2, 3])
    """
    named = {f"{operator}/{row}": p for operator, s in solutions.items() for row, p in s.patterns.items()}
    save_solutions(Path(folder), tensor_specs(named), solutions.items(), weights_digest, trace_options)


def save_solutions(
    folder: Path,
    specs: Specs,
    solutions: Iterable[tuple[str, Solution]],
    weights_digest: str,
    trace_options: TraceOptions | None = None,
) -> None:
    """Write the same files as `save` from solutions that are computed one by one.

    Args:
        folder: The folder, which is created if it does not exist.
        specs: The dtypes and shapes of the patterns; see `pattern_specs`.
        solutions: Operator names and solutions in the order of `specs`.
        weights_digest: The `patterns.digest` of the model.
        trace_options: How the model was traced.

    Raises:
        ValueError: If the patterns differ from `specs`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     save_solutions(Path(folder), {}, iter([]), "sha256:0")
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['neurons.parquet', 'patterns.parquet', 'patterns.safetensors']
    """
    metadata = {"format": FORMAT, "weights": weights_digest}
    if trace_options is not None:
        metadata["trace"] = json.dumps(asdict(trace_options))
    names = (PATTERNS, "patterns.parquet", "neurons.parquet")
    with ExitStack() as stack:
        tensors, patterns, neurons = (stack.enter_context(temporary_path(folder / name)) for name in names)
        pattern_rows = stack.enter_context(pq.ParquetWriter(patterns, PATTERN_SCHEMA))
        neuron_rows = stack.enter_context(pq.ParquetWriter(neurons, NEURON_SCHEMA))

        def write_rows() -> Iterator[Tensor]:
            for operator, solution in solutions:
                neuron_rows.write_table(neuron_table(operator, solution))
                if solution.patterns:
                    pattern_rows.write_table(pattern_table(operator, solution))
                yield from solution.patterns.values()

        write_tensors(tensors, specs, write_rows(), metadata)


def pattern_specs(operators: Iterable[Operator], estimators: Choices) -> Specs:
    """Return the dtypes and shapes of patterns before they are computed.

    Args:
        operators: The operators.
        estimators: Choices of estimators as for `patterns.solve`.

    Raises:
        UserError: If an estimator is unknown.

    Example:
        >>> import patterns
        >>> network = patterns.trace(torch.nn.Linear(3, 2), torch.zeros(2, 3))
        >>> pattern_specs(network.operators.values(), "linear")
        {'linear.0/linear': (torch.float32, (2, 3))}
    """
    return {
        f"{op.name}/{row}": (torch.promote_types(op.weight.dtype, torch.float32), tuple(op.weight.shape))
        for op in operators
        for row in select_estimators(op, estimators)
    }


def load(folder: str | Path, weights_digest: str | None, operators: Collection[str] | None = None) -> Patterns:
    """Load the patterns of a fit.

    Args:
        folder: The folder that they were saved in.
        weights_digest: The `patterns.digest` of the model. None loads the patterns of any weights.
        operators: Names of the operators whose patterns to load; None: all.

    Returns:
        The patterns by operator name and name from `ESTIMATORS`.

    Raises:
        UserError: If there are no patterns, or if they were fitted for other weights.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import patterns
        >>> with TemporaryDirectory() as folder:
        ...     patterns.save(folder, {}, "sha256:0")
        ...     load(folder, "sha256:0")
        {}
    """
    path = Path(folder) / PATTERNS
    with open_patterns(path) as file:
        fitted_for = (file.metadata() or {}).get("weights")
        if weights_digest is not None and fitted_for != weights_digest:
            what = f"these patterns were fitted for weights {fitted_for}, the model has {weights_digest}"
            remedy = "Load the weights of the fit (and seed random draws in the model's code), or fit again for these."
            raise UserError(str(path), what, remedy)
        patterns: Patterns = {}
        for key in file.keys():
            operator, _, row = key.rpartition("/")
            if operators is None or operator in operators:
                patterns.setdefault(operator, {})[row] = file.get_tensor(key)
    return patterns


def choose(network: Network, patterns: Patterns, estimator: Choices = "default") -> dict[str, Tensor | None]:
    """Select one pattern for each operator, for `Explainer`.

    Args:
        network: The network.
        patterns: Patterns by operator name and name from `ESTIMATORS`.
        estimator: Choices of estimators as for `patterns.solve`, or names of presets. The first that applies to an
            operator counts.

    Returns:
        The pattern of each operator by its name, in the weight's shape; None for the identity estimator.

    Raises:
        UserError: If an operator has no such pattern, or if a choice applies to no operator.

    Example:
        >>> import patterns
        >>> network = patterns.trace(torch.nn.Linear(3, 2), torch.zeros(2, 3))
        >>> choose(network, {"linear.0": {"filter": torch.ones(2, 3)}}, "filter")["linear.0"].shape
        torch.Size([2, 3])
    """
    selected: dict[str, Tensor | None] = {}
    for name, choice in resolve_estimators(network, estimator, patterns).items():
        if choice == "identity":
            selected[name] = None
            continue
        row = CHOICES[choice][network.operators[name].gate is None][0]
        if row not in patterns.get(name, {}):
            remedy = "Solve with an estimator that includes it, or pass another `estimator`."
            raise UserError(name, f"the run has no pattern {row!r} for this operator", remedy, "estimator")
        selected[name] = select_pattern(network.operators[name], patterns[name][row])
    return selected


def select_pattern(operator: Operator, pattern: Tensor) -> Tensor:
    """Return an operator's pattern; of a pattern for all rows of its layer, the rows of its neurons.

    Args:
        operator: The operator.
        pattern: The pattern, as a run has it.

    Raises:
        UserError: If the result does not have the shape of the operator's weight.

    Example:
        >>> import patterns
        >>> operator = patterns.trace(torch.nn.Linear(3, 2), torch.zeros(2, 3)).operators["linear.0"]
        >>> select_pattern(operator, torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """
    selected = operator.select_rows(pattern)
    if selected.shape != operator.weight.shape:
        what = f"the pattern has shape {tuple(pattern.shape)}, the weight {tuple(operator.weight.shape)}"
        raise UserError(operator.name, what, "Fit patterns for this model with this version.")
    return selected


def load_trace_options(folder: Path, input_shape: tuple[int, ...] | None = None) -> TraceOptions:
    """Load how the model of a fit was traced.

    It is recorded in patterns.safetensors; before version 0.3 it was recorded in manifest.json.

    Args:
        folder: The folder of the fit.
        input_shape: Shape of a sample, if it is known; otherwise, the recorded one.

    Raises:
        UserError: If neither file records it and `input_shape` is not given, or if there are no patterns.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     save(folder, {}, "sha256:0", TraceOptions((3, 224, 224), pass_through=("gelu",)))
        ...     load_trace_options(Path(folder)).pass_through
        ('gelu',)
    """
    with open_patterns(folder / PATTERNS) as file:
        recorded = (file.metadata() or {}).get("trace")
    options: dict[str, Any] = {}
    try:
        if recorded is not None:
            options = json.loads(recorded)
        elif input_shape is None or (folder / "manifest.json").exists():
            manifest = json.loads((folder / "manifest.json").read_text())
            options = {**manifest["fit"]["model"], "input_shape": manifest["model"]["input_shape"]}
        shape = tuple(options["input_shape"]) if input_shape is None else input_shape
        return TraceOptions(shape, tuple(options.get("pass_through", ())), bool(options.get("strip_softmax", False)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"neither {PATTERNS} nor manifest.json records how the model was traced"
        raise UserError(str(folder), what, "Pass the folder of a finished fit, or an `example`.", "example") from error


def list_patterns(folder: str | Path) -> dict[str, list[str]]:
    """List the patterns in the folder of a fit.

    Args:
        folder: The folder.

    Returns:
        Names from `ESTIMATORS` for each operator's name.

    Raises:
        UserError: If there are no patterns.

    Example:
        >>> import patterns, tempfile
        >>> run, network = tempfile.mkdtemp(), patterns.trace(torch.nn.Linear(3, 2), torch.zeros(2, 3))
        >>> moments = patterns.accumulate(network, [torch.rand(50, 3)])
        >>> solution = patterns.solve(network.operators["linear.0"], moments["linear.0"], "linear")
        >>> patterns.save(run, {"linear.0": solution}, "sha256:0")
        >>> list_patterns(run)
        {'linear.0': ['linear']}
    """
    found: dict[str, list[str]] = {}
    with open_patterns(Path(folder) / PATTERNS) as file:
        for key in file.keys():
            operator, _, row = key.rpartition("/")
            found.setdefault(operator, []).append(row)
    return found


def open_patterns(path: Path) -> safe_open:
    """Open a file of patterns. Raise UserError if there is no file, or if it is not complete."""
    remedy = "Finish the fit first, or pass the folder of a finished fit."
    try:
        return safe_open(path, "pt")
    except FileNotFoundError as error:
        raise UserError(str(path), "no such file", remedy) from error
    except SafetensorError as error:
        raise UserError(str(path), f"not a complete safetensors file ({error})", remedy) from error


PATTERN_SCHEMA = pa.schema(
    [("operator", pa.string()), ("neuron", pa.int32()), ("estimator", pa.string()), ("pattern", pa.list_(pa.float32()))]
)
NEURON_SCHEMA = pa.schema(
    [
        ("operator", pa.string()),
        ("neuron", pa.int32()),
        ("n", pa.int64()),
        ("n_positive", pa.float64()),  # the sum of weights for a smooth gate, else a number of samples
        ("mean_y", pa.float64()),
        ("var_y", pa.float64()),
        ("flag", pa.string()),
    ]
)


def pattern_table(operator: str, solution: Solution) -> pa.Table:
    """Return the rows of one operator in patterns.parquet."""
    tables = []
    for name, pattern in solution.patterns.items():
        k, d = len(pattern), pattern[0].numel()
        values = pa.array(pattern.float().flatten().numpy())
        offsets = pa.array(range(0, k * d + 1, d), pa.int32()) if k * d < 2**31 else None
        lists = pa.ListArray.from_arrays(offsets, values)
        columns = [pa.array([operator] * k), pa.array(range(k), pa.int32()), pa.array([name] * k), lists]
        tables.append(pa.Table.from_arrays(columns, schema=PATTERN_SCHEMA))
    return pa.concat_tables(tables)


def neuron_table(operator: str, s: Solution) -> pa.Table:
    """Return the rows of one operator in neurons.parquet."""
    k = len(s.flags)
    statistics = [t.numpy() for t in (s.n, s.n_positive.double(), s.mean_y, s.var_y)]
    columns = [[operator] * k, range(k), *statistics, s.flags]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, NEURON_SCHEMA)]
    return pa.Table.from_arrays(arrays, schema=NEURON_SCHEMA)
