"""A fit that looks now and then how sure its patterns are, and ends once they are sure enough."""

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
from patterns.estimation import ESTIMATORS, converged, look, samples_needed
from patterns.io import TensorFile, load_moments, solution_specs, write_atomically, write_tensors
from ray_jobs.config import Resources
from ray_jobs.engine.ray_tasks import Pending, Tasks
from ray_jobs.figures.convergence_curves import append, draw_convergence, rows_of
from ray_jobs.io.object_store import located, published
from ray_jobs.jobs.moments_job import MomentsJob, MomentsSpec, Observe
from ray_jobs.models.loading import ModelDigests
from ray_jobs.runs.lease import Heartbeat
from ray_jobs.runs.ledger import Ledger

GROWTH = 1.25  # how many times the samples of the last look there must be for the next
WAIT = 0.1  # seconds between two questions whether a look is over
LOOKED = "looked.safetensors"  # the patterns of the last look, beside the parts


@dataclass(frozen=True)
class Until:
    """When a fit is sure enough. tolerance: for the p90 of the relative standard error of all operators' patterns."""

    tolerance: float
    operators: Sequence[Operator]
    choices: Sequence[str]
    seed: int


class ConvergingJob(MomentsJob):
    """Gathers until the patterns' standard errors are below a tolerance.

    Shards are taken in a seeded random order, so that those seen are a fair draw of all.
    """

    def __init__(
        self, name: str, beat: Heartbeat, task: MomentsSpec, tasks: Tasks, resources: Resources, until: Until
    ) -> None:
        super().__init__(name, beat, task, tasks, resources)
        self.until, self.seen = until, 0
        self.looking: Pending | None = None
        random.Random(until.seed).shuffle(self.left)
        self.sure: dict[str, Any] = {}

    def gather(self, observe: Observe, weights: ModelDigests) -> Ledger:
        """As for any job, unless what there is already is enough."""
        self.look_at_all()
        if not self.enough:
            super().gather(observe, weights)
            self.look_at_all()
        return self.ledger

    def tick(self) -> None:
        super().tick()
        self.look_again(GROWTH)

    def look_again(self, growth: float) -> None:
        """Take the result of a look under way; begin another where the samples are so many times those of the last."""
        if self.looking is not None and self.looking.done():
            tables, self.looking = self.looking.result(), None
            self.judge_look(tables)
        if self.idle() and not self.enough and self.samples > growth * self.seen:
            self.flush()
            self.seen = self.ledger.samples
            files = [part.file for part in self.ledger.parts]
            self.looking = self.tasks.start(look_at, str(self.parts), files, self.until, self.seen)

    def idle(self) -> bool:
        """Whether no part is being read by what goes on beside the workers, and may be deleted."""
        return super().idle() and self.looking is None

    def judge_look(self, tables: list[pa.Table]) -> None:
        """Keep and draw the curve; say how sure the patterns are, and whether that is enough."""
        run = self.beat.run.folder
        with published(run) as folder:
            path = folder / "convergence.parquet"
            if not path.exists():
                with suppress(FileNotFoundError):
                    path.write_bytes((run / path.name).read_bytes())
            draw_convergence(folder / "convergence.png", append(path, tables), self.until.tolerance)
        errors = [error for table in tables for error in table["p90"].to_pylist()]
        known = [error for error in errors if error is not None]
        if not known:
            return
        worst: float = max(known)
        self.sure = {"samples": self.seen, "error": worst, "tolerance": self.until.tolerance}
        text = f"patterns sure to {worst:.3g} after {self.seen} samples"
        needed = samples_needed(errors, self.seen, self.until.tolerance)
        self.reporter.remark = text if needed is None else f"{text}, {needed} needed for {self.until.tolerance:g}"
        self.reporter.line(self.reporter.remark, samples=self.seen, error=worst)
        if converged(errors, self.until.tolerance):
            self.enough = text

    def look_at_all(self) -> None:
        """Look at all that counts now, and wait for what is seen."""
        while self.looking is not None or (not self.enough and self.samples > self.seen):
            self.look_again(1.0)
            time.sleep(0 if self.looking is None else WAIT)


def look_at(folder: str, files: Sequence[str], until: Until, samples: int) -> list[pa.Table]:
    """The rows of a look at some parts, one table for each operator; its patterns are kept for the next look."""
    torch.set_num_threads(1)
    place, tables = located(folder), list[pa.Table]()
    specs = {n: s for n, s in solution_specs(until.operators, until.choices).items() if ESTIMATORS[row_of(n)].learns}

    def looked(before: TensorFile | None) -> Iterator[Tensor]:
        for operator in until.operators:
            loads = [partial(load_part, str(place / file), operator.name) for file in files]
            seen = look(operator, loads, until.choices, until.seed)
            named = {row: f"{operator.name}/{row}" for row in seen.solution.patterns if ESTIMATORS[row].learns}
            old = None
            if before is not None:
                old = replace(seen.solution, patterns={row: before.get(name) for row, name in named.items()})
            tables.append(rows_of(samples, operator.name, seen, old))
            yield from (seen.solution.patterns[row] for row in named)

    with ExitStack() as stack, published(place) as out:
        there = (place / LOOKED).exists()
        before = stack.enter_context(TensorFile(place / LOOKED)) if there else None
        write_atomically(out / LOOKED, lambda aside: write_tensors(aside, specs, looked(before), {}))
    return tables


def row_of(name: str) -> str:
    return name.rpartition("/")[2]


def load_part(part: str, operator: str) -> Moments:
    with TensorFile(located(part)) as file:
        return load_moments([file], operator)


def waited_for(estimators: Sequence[str]) -> tuple[str, ...]:
    """Those that `until_converged` looks at: not `multivariate` beside others, which may never be sure.

    Where outputs are nearly dependent, its inverse of Cov[y] is decided by the ridge (see docs/convergence.md).
    """
    sure = tuple(choice for choice in estimators if not choice.endswith("multivariate"))
    return sure or tuple(estimators)
