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
from patterns.estimation import CUTOFF, chosen, quality, selected, signals
from patterns.io import write_table
from patterns.moments import bytes_of
from ray_jobs.config import QualityConfig, Resources
from ray_jobs.data.samples import Rejected
from ray_jobs.engine.ray_session import connected
from ray_jobs.figures.drawing import draw_quality
from ray_jobs.io.object_store import published, read_table
from ray_jobs.jobs.moments_job import MomentsJob, MomentsSpec, apart
from ray_jobs.jobs.reduction import TASK_BYTES, grouped, merged
from ray_jobs.models import loading
from ray_jobs.runs.lease import hold_lease
from ray_jobs.runs.run_folder import Run, load_patterns

# An operator whose Gram matrix takes more is judged only where it is named.
GRAM_BYTES = 512 << 20
INVERSE = "pseudo-inverse: eigenvalues of Cov[x] below the cutoff times the largest are left out (docs/quality.md)"
SCHEMA = pa.schema(
    [("operator", pa.string()), ("neuron", pa.int32()), ("estimator", pa.string()), ("rho", pa.float64())]
)


def judged(network: Network, patterns: Sequence[str]) -> list[str]:
    """The operators that some patterns of names mean; without any, all those of moderate size with several inputs
    of images one by one.

    UserError for a pattern that matches none.
    """
    if not patterns:
        operators = network.operators.items()
        found = [n for n, op in operators if op.inputs_per_neuron > 1 and op.per_image and bytes_of(op) <= GRAM_BYTES]
        if not found:
            what = "every operator's Gram matrix is large, or has one input"
            raise UserError("--operators", what, "Name some; `patternnet plan` lists them.")
        return found
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in network.operators):
            raise UserError("--operators", f"no operator matches {pattern!r}", "`patternnet plan` lists their names.")
    return [n for n in network.operators if any(fnmatchcase(n, pattern) for pattern in patterns)]


def observer(operators: Collection[str], positions: int, seed: int, network: Network) -> PatchObserver:
    """What takes the moments of sampled patches of some operators."""
    return PatchObserver(network, operators, positions, seed)


def measure(config: QualityConfig, resources: Resources = Resources()) -> Run:  # noqa: B008 - frozen
    """ρ of every estimator of a finished fit, or go on with a job that ended early.

    Once the moments are there, the same call judges the estimators that were solved since, without data.
    UserError where the configuration or the data are wrong, StoppedShortError where a signal came.
    """
    fitted = Run(config.patterns)
    section = fitted.job("fit", "Run `patternnet fit` to the end first, or name another --patterns.")
    apart([("the fit", section["options"]["shards"]), ("--shards", config.shards), ("--evaluate", config.evaluate)])
    loaded = loading.load(config.model)
    names = judged(loaded.network, config.operators)
    operators = [loaded.network.operators[name] for name in names]
    choices = tuple(section.get("solved", section["options"]["estimators"]))
    load_patterns(str(fitted.folder), loaded.digest, [])
    if not any(signals(dict.fromkeys(chosen(operator, choices))) for operator in operators):
        what = "holds patterns of one side of the gate only, which make no estimator"
        raise UserError(config.patterns, what, "Run `patternnet solve RUN --estimators two-component` first.")
    run = Run(config.out)
    section = run.section("quality", config, loaded)
    sets = {"regressed": config.shards, "evaluated": config.evaluate}
    parts: list[list[str]] = []
    counted: dict[str, int] = {}
    refused: list[Rejected] = []
    missing: dict[str, str] = {}
    with hold_lease(run, "quality") as beat, connected(resources) as tasks:
        run.record("quality", section, loaded)
        for name, shards in sets.items():
            folder = run.folder / "quality" / name
            task = MomentsSpec(config.model, shards, str(folder), config.batch_size, config.max_samples)
            job = MomentsJob(f"quality, {name}", beat, task, tasks, resources)
            observe = partial(observer, names, config.positions, config.seed)
            try:
                ledger = job.gather(observe, loaded.digests)
            finally:
                refused += job.rejected()
                run.quarantine("quality", refused)
            parts.append([str(folder / part.file) for part in ledger.parts])
            counted[name] = ledger.samples
            missing |= job.missing
        job.reporter.line(f"judging the patterns of {len(names)} operators")
        groups = grouped(operators, [bytes_of(op) for op in operators], TASK_BYTES)
        calls = ((group, choices, str(fitted.folder), loaded.digest, *parts) for group in groups)
        about = {"inverse": INVERSE, "cutoff": CUTOFF, "positions": config.positions, "seed": config.seed, **counted}
        schema = SCHEMA.with_metadata({key: str(value) for key, value in about.items()})
        with published(run.folder) as out:
            write_table(out / "quality.parquet", schema, chain.from_iterable(tasks.each(judge, calls)))
            draw_quality(out / "quality.png", pq.read_table(out / "quality.parquet"))
        done = {"status": "complete", "samples": sum(counted.values()), **counted, "missing": missing}
        run.record("quality", section | done | {"cutoff": CUTOFF}, loaded)
    return run


def judge(
    operators: Sequence[Operator],
    choices: Sequence[str],
    run: str,
    weights: str,
    regressed: Sequence[str],
    evaluated: Sequence[str],
) -> list[pa.Table]:
    """The rows of some operators, one after the other."""
    tables = []
    names = [operator.name for operator in operators]
    patterns_of = load_patterns(run, weights, names)
    sets = (merged(parts, names, PatchMoments) for parts in (regressed, evaluated))
    for operator, b, c in zip(operators, *sets):
        patterns = patterns_of.get(operator.name, {})
        rho = quality(patterns, operator.weight, b, c)
        if "identity" in selected(operator.name, choices):
            rho["identity"] = torch.full((operator.neurons,), torch.nan)
        tables.append(rows_of(operator.name, rho))
    return tables


def rows_of(operator: str, rho: dict[str, Tensor]) -> pa.Table:
    """Rows of quality.parquet; null where ρ is undefined."""
    tables = [
        pa.table([[operator] * len(v), np.arange(len(v)), [name] * len(v), pa.array(v.numpy(), from_pandas=True)],
                 names=SCHEMA.names).cast(SCHEMA)
        for name, v in rho.items()
    ]  # fmt: skip
    return pa.concat_tables(tables) if tables else SCHEMA.empty_table()


def medians(run: Run) -> dict[str, float]:
    """The median ρ of each estimator over all neurons where it is defined."""
    table = read_table(run.folder / "quality.parquet").drop_null()
    return {
        name: float(np.median(table.filter(pa.compute.equal(table["estimator"], name))["rho"]))
        for name in table["estimator"].unique().to_pylist()
    }
