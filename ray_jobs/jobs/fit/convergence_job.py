"""A fit that periodically estimates the standard error of its patterns and stops when they have converged."""

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from patterns import Moments, Operator
from patterns.estimation import ESTIMATORS, check_convergence, has_converged, samples_needed
from patterns.io import TensorFile, load_moments, pattern_specs, write_atomically, write_tensors
from ray_jobs.config import Resources
from ray_jobs.engine.ray_tasks import PendingCall, Tasks
from ray_jobs.figures.convergence_curves import append_rows, check_rows, draw_convergence
from ray_jobs.io.object_store import locate, publish
from ray_jobs.jobs.moments_job import MomentsJob, MomentsSpec, Observe
from ray_jobs.models.loading import TracedModel
from ray_jobs.runs.lease import Heartbeat
from ray_jobs.runs.ledger import Ledger
from ray_jobs.runs.moments_store import MomentsStore

GROWTH = 1.25  # the samples must grow by this factor until the next check
POLL_INTERVAL = 0.1  # seconds between two questions whether a check has ended
CHECKED = "looked.safetensors"  # the patterns of the last check, in the folder of the partial moments


@dataclass(frozen=True)
class ConvergenceCriterion:
    """Condition for the convergence of a fit.

    Attributes:
        tolerance: The 90th percentile of the neurons' relative standard errors must be below it, for each operator
            and estimator.
        operators: The operators.
        estimators: The estimators.
        seed: The seed of the random order of shards, and of the estimators.
    """

    tolerance: float
    operators: Sequence[Operator]
    estimators: Sequence[str]
    seed: int


class ConvergingJob(MomentsJob):
    """A job that gathers moments until the patterns have converged.

    Shards are taken in a seeded random order, so that those seen are a random sample of all.
    """

    def __init__(
        self,
        name: str,
        heartbeat: Heartbeat,
        spec: MomentsSpec,
        tasks: Tasks,
        resources: Resources,
        criterion: ConvergenceCriterion,
    ) -> None:
        super().__init__(name, heartbeat, spec, tasks, resources)
        self.criterion = criterion
        self.checked_samples = 0  # the number of samples at the last check
        self.checking: PendingCall | None = None
        random.Random(criterion.seed).shuffle(self.remaining)
        self.converged: dict[str, Any] = {}  # the manifest's entry on the last check

    def gather(self, observe: Observe, model: TracedModel) -> Ledger:
        """Work as any job of moments does, unless the moments of an earlier call suffice."""
        self.check_everything()
        if not self.stop_reason:
            super().gather(observe, model)
            self.check_everything()
        return self.ledger

    def tick(self) -> None:
        """Also check the convergence when there are enough new samples."""
        super().tick()
        self.check_again(GROWTH)

    def check_again(self, growth: float) -> None:
        """Use the result of a check that has ended; start another if the samples have grown by a factor."""
        if self.checking is not None and self.checking.done():
            tables, self.checking = self.checking.result(), None
            self.judge_check(tables)
        if self.idle() and not self.stop_reason and self.samples > growth * self.checked_samples:
            self.flush()
            self.checked_samples = self.ledger.samples
            files = [entry.file for entry in self.ledger.entries]
            self.checking = self.tasks.submit(check_files, self.store, files, self.criterion, self.checked_samples)

    def idle(self) -> bool:
        """Return whether no task reads the store, so that files may be deleted."""
        return super().idle() and self.checking is None

    def judge_check(self, tables: list[pa.Table]) -> None:
        """Append a check to the curve, draw it, report the error, and stop the job if the patterns have converged."""
        run, tolerance = self.heartbeat.run.folder, self.criterion.tolerance
        with publish(run) as folder:
            path = folder / "convergence.parquet"
            if not path.exists():
                with suppress(FileNotFoundError):
                    path.write_bytes((run / path.name).read_bytes())
            draw_convergence(folder / "convergence.png", append_rows(path, tables), tolerance)
        errors = [error for table in tables for error in table["p90"].to_pylist()]
        known = [error for error in errors if error is not None]
        if not known:
            return
        worst: float = max(known)
        self.converged = {"samples": self.checked_samples, "error": worst, "tolerance": tolerance}
        text = f"relative standard error of the patterns {worst:.3g} after {self.checked_samples} samples"
        needed = samples_needed(errors, self.checked_samples, tolerance)
        self.reporter.remark = text if needed is None else f"{text}, {needed} needed for {tolerance:g}"
        self.reporter.log(self.reporter.remark, samples=self.checked_samples, error=worst)
        if has_converged(errors, tolerance):
            self.stop_reason = text

    def check_everything(self) -> None:
        """Check all samples that count now, and wait for the result."""
        while self.checking is not None or (not self.stop_reason and self.samples > self.checked_samples):
            self.check_again(1.0)
            time.sleep(0 if self.checking is None else POLL_INTERVAL)


def check_files(
    store: MomentsStore, files: Sequence[str], criterion: ConvergenceCriterion, samples: int
) -> list[pa.Table]:
    """Check the convergence of the patterns of some partial moments; runs in a task.

    The patterns are written to the store for the next check, which compares its patterns to them.

    Args:
        store: The store.
        files: The names of the files of partial moments.
        criterion: Operators and estimators.
        samples: The number of samples in the files.

    Returns:
        The rows of the check, a table for each operator.
    """
    torch.set_num_threads(1)
    operators, estimators, tables = criterion.operators, criterion.estimators, list[pa.Table]()
    specs = pattern_specs(operators, estimators)
    specs = {name: spec for name, spec in specs.items() if ESTIMATORS[name.rpartition("/")[2]].uses_data}

    def check(previous: TensorFile | None) -> Iterator[Tensor]:
        for operator in operators:
            loads = [partial(load_file, str(store.folder / file), operator) for file in files]
            found = check_convergence(operator, loads, estimators, criterion.seed)
            named = {row: f"{operator.name}/{row}" for row in found.solution.patterns if ESTIMATORS[row].uses_data}
            old = None
            if previous is not None:
                old = replace(found.solution, patterns={row: previous.get(name) for row, name in named.items()})
            tables.append(check_rows(samples, operator.name, found, old))
            yield from (found.solution.patterns[row] for row in named)

    with ExitStack() as stack, publish(store.folder) as out:
        path = store.folder / CHECKED
        previous = stack.enter_context(TensorFile(path)) if path.exists() else None
        write_atomically(out / CHECKED, lambda temporary: write_tensors(temporary, specs, check(previous), {}))
    return tables


def load_file(path: str, operator: Operator) -> Moments:
    """Return the moments of one operator in a file."""
    with TensorFile(locate(path)) as file:
        return load_moments([file], operator.name, Moments, operator)


def select_criterion_estimators(estimators: Sequence[str]) -> tuple[str, ...]:
    """Return the estimators that must converge: without `multivariate` unless all are, because it may never converge.

    If outputs are nearly dependent, the ridge decides its inverse of Cov[y] (see docs/convergence.md).
    """
    chosen = tuple(choice for choice in estimators if not choice.endswith("multivariate"))
    return chosen or tuple(estimators)
