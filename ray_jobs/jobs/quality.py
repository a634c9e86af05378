"""The quality job: patterns and the moments of other shards → ρ for each neuron, operator and estimator.

Three sets of shards, as in the paper: the patterns were fitted on one, v is regressed on the second, and
ρ is evaluated on the third.
"""

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from patterns import Network, Operator, PatchMoments, PatchObserver, UserError
from patterns.estimation import CUTOFF, group_by_estimator, quality, select_choices, select_estimators
from patterns.io import select_pattern, write_table
from patterns.moments import patch_moments_bytes
from ray_jobs.config import QualityConfig, Resources
from ray_jobs.data.samples import RejectedSample
from ray_jobs.figures.drawing import draw_quality
from ray_jobs.io.object_store import publish, read_table
from ray_jobs.jobs.job_session import JobSession
from ray_jobs.jobs.moments_job import MomentsJob, MomentsSpec, require_disjoint
from ray_jobs.jobs.reduction import TASK_BYTES, group_by_size, merge_operators
from ray_jobs.runs.moments_store import MomentsStore
from ray_jobs.runs.run_folder import Run, load_patterns

# ρ of an operator with a larger Gram matrix is computed only if the config names the operator.
GRAM_BYTES = 512 << 20
INVERSE = "pseudo-inverse: eigenvalues of Cov[x] below the cutoff times the largest are left out (docs/quality.md)"
SCHEMA = pa.schema(
    [("operator", pa.string()), ("neuron", pa.int32()), ("estimator", pa.string()), ("rho", pa.float64())]
)


def select_operators(network: Network, patterns: Sequence[str]) -> list[str]:
    """Return the names of the operators whose ρ is computed.

    Args:
        network: The model.
        patterns: Globs of names. If there are none, all operators are chosen that have several inputs and a Gram matrix
            of moderate size, and whose spatial positions can be sampled.

    Raises:
        UserError: If a glob matches no operator, or no operator is left.
    """
    if not patterns:
        found = [
            name
            for name, op in network.operators.items()
            if op.inputs_per_neuron > 1 and op.per_image and patch_moments_bytes(op) <= GRAM_BYTES
        ]
        if not found:
            what = "every operator has one input, or a large Gram matrix"
            raise UserError("", what, "Name some; `patternnet plan` lists them.", "operators")
        return found
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in network.operators):
            what = f"no operator matches {pattern!r}"
            raise UserError("", what, "`patternnet plan` lists their names.", "operators")
    return [name for name in network.operators if any(fnmatchcase(name, pattern) for pattern in patterns)]


def make_observer(operators: Collection[str], positions: int, seed: int, network: Network) -> PatchObserver:
    """Return the observer that takes the moments of sampled patches of some operators."""
    return PatchObserver(network, operators, positions, seed)


def measure(config: QualityConfig, resources: Resources = Resources()) -> Run:  # noqa: B008 - frozen
    """Compute ρ for every estimator of a finished fit, or resume a job that ended early.

    If patterns of further estimators were solved later, the same call computes their ρ from the stored moments, without
    reading data.

    Args:
        config: The job.
        resources: The workers, and the limits on failures.

    Returns:
        The run.

    Raises:
        UserError: If the configuration or the data are wrong.
        StoppedShortError: If a signal stopped the job.
    """
    fitted = Run(config.patterns)
    fit = fitted.require_job("fit", "Run `patternnet fit` to the end first, or name another --patterns.")
    require_disjoint(
        [("the fit", fit["options"]["shards"]), ("--shards", config.shards), ("--evaluate", config.evaluate)]
    )
    session = JobSession("quality", config)
    run, loaded = session.run, session.loaded
    names = select_operators(loaded.network, config.operators)
    operators = [loaded.network.operators[name] for name in names]
    estimators = tuple(fit.get("solved", fit["options"]["estimators"]))
    load_patterns(str(fitted.folder), loaded.digest, [])
    if not any(group_by_estimator(dict.fromkeys(select_estimators(operator, estimators))) for operator in operators):
        what = "the run holds patterns of only one side of the gate, which make no estimator"
        raise UserError(config.patterns, what, "Run `patternnet solve RUN --estimators two-component` first.")
    files: list[list[str]] = []
    counted: dict[str, int] = {}
    rejected: list[RejectedSample] = []
    missing: dict[str, str] = {}
    with session.work(resources):
        for name, shards in (("regressed", config.shards), ("evaluated", config.evaluate)):
            store = MomentsStore(run.folder / "quality" / name)
            spec = MomentsSpec(shards, store, config.batch_size, config.max_samples)
            job = MomentsJob(f"quality, {name}", session.heartbeat, spec, session.tasks, resources)
            try:
                ledger = job.gather(partial(make_observer, names, config.positions, config.seed), loaded.traced)
            finally:
                rejected += job.read_rejected()
                run.write_quarantine("quality", rejected)
            files.append(store.list_files())
            counted[name] = ledger.samples
            missing |= job.missing
        job.reporter.log(f"judging the patterns of {len(names)} operators")
        groups = group_by_size(operators, [patch_moments_bytes(op) for op in operators], TASK_BYTES)
        calls = ((group, estimators, str(fitted.folder), loaded.digest, *files) for group in groups)
        about = {"inverse": INVERSE, "cutoff": CUTOFF, "positions": config.positions, "seed": config.seed, **counted}
        schema = SCHEMA.with_metadata({key: str(value) for key, value in about.items()})
        with publish(run.folder) as out:
            write_table(out / "quality.parquet", schema, chain.from_iterable(session.tasks.map(judge_group, calls)))
            draw_quality(out / "quality.png", pq.read_table(out / "quality.parquet"))
        session.section |= {"samples": sum(counted.values()), **counted, "missing": missing, "cutoff": CUTOFF}
    return run


def judge_group(
    operators: Sequence[Operator],
    estimators: Sequence[str],
    run: str,
    weights: str,
    regressed: Sequence[str],
    evaluated: Sequence[str],
) -> list[pa.Table]:
    """Return the rows of quality.parquet for some operators; runs in a task.

    Args:
        operators: The operators.
        estimators: The estimators of the fit.
        run: The folder of the fit.
        weights: The digest of the model's weights.
        regressed: The files of partial moments to regress v on.
        evaluated: The files of partial moments to evaluate ρ on.
    """
    patterns = load_patterns(run, weights, [operator.name for operator in operators])
    moments = (merge_operators(files, operators, PatchMoments) for files in (regressed, evaluated))
    tables = []
    for operator, b, c in zip(operators, *moments):
        own = {row: select_pattern(operator, pattern) for row, pattern in patterns.get(operator.name, {}).items()}
        rho = quality(own, operator.weight, b, c)
        if "identity" in select_choices(operator.name, estimators):
            rho["identity"] = torch.full((operator.neurons,), torch.nan)
        tables.append(to_table(operator.name, rho))
    return tables


def to_table(operator: str, rho: dict[str, Tensor]) -> pa.Table:
    """Return the rows of an operator in quality.parquet; they are null if ρ is undefined."""
    tables = [
        pa.table([[operator] * len(v), np.arange(len(v)), [name] * len(v), pa.array(v.numpy(), from_pandas=True)],
                 names=SCHEMA.names).cast(SCHEMA)
        for name, v in rho.items()
    ]  # fmt: skip
    return pa.concat_tables(tables) if tables else SCHEMA.empty_table()


def compute_medians(run: Run) -> dict[str, float]:
    """Return the median ρ of each estimator over all neurons for which it is defined."""
    table = read_table(run.folder / "quality.parquet").drop_null()
    return {
        name: float(np.median(table.filter(pa.compute.equal(table["estimator"], name))["rho"]))
        for name in table["estimator"].unique().to_pylist()
    }
