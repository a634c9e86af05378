"""Partial moments → moments → patterns; no process holds more than the moments of a few operators."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from typing import TypeVar

from patterns import Moments, Operator, PatchMoments, Solution, solve
from patterns.io import TensorFile, load_moments
from patterns.moments import RequiredSums, moments_bytes
from ray_jobs.engine.ray_tasks import Tasks
from ray_jobs.io.object_store import locate

TASK_BYTES = 256 << 20  # of moments in one task, unless a single operator has more
M = TypeVar("M", Moments, PatchMoments)
T = TypeVar("T")


def solve_group(
    files: Sequence[str], operators: Sequence[Operator], estimators: Sequence[str], seed: int
) -> list[Solution]:
    """Merge the partial moments of some operators and compute their patterns; runs in a task."""
    merged = merge_operators(files, operators, Moments)
    return [solve(operator, moments, estimators, seed) for operator, moments in zip(operators, merged)]


def merge_operators(files: Iterable[str], operators: Iterable[Operator], moments_type: type[M]) -> Iterator[M]:
    """Yield the moments of each operator, summed over files of partial moments.

    Args:
        files: The paths or URLs of the files.
        operators: The operators.
        moments_type: The type of the moments in the files.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(TensorFile(locate(file))) for file in files]
        for operator in operators:
            yield load_moments(opened, operator.name, moments_type, operator)


def solve_all(
    files: Mapping[str, Sequence[str]],
    operators: Sequence[Operator],
    sums: Callable[[Operator], RequiredSums],
    estimators: Sequence[str],
    seed: int,
    tasks: Tasks,
) -> Iterator[tuple[str, Solution]]:
    """Yield the name and the patterns of every operator, in order.

    Args:
        files: The files of partial moments of each operator.
        operators: The operators.
        sums: Returns the sums that were taken of an operator.
        estimators: The estimators.
        seed: The seed of the `random` estimator.
        tasks: Runs functions on the cluster.
    """
    groups = group_by_size(operators, [moments_bytes(op, sums(op)) for op in operators], TASK_BYTES)
    # The operators of a group may come from different passes over the data, and then have different files.
    groups = [list(same) for group in groups for _, same in groupby(group, lambda op: files[op.name])]
    solved = tasks.map(solve_group, ((files[group[0].name], group, estimators, seed) for group in groups))
    for group, solutions in zip(groups, solved):
        yield from zip((operator.name for operator in group), solutions)


def group_by_size(items: Sequence[T], sizes: Sequence[int], limit: int) -> list[list[T]]:
    """Split items into groups of consecutive items whose sizes sum up to at most `limit`, or of a single item."""
    groups: list[list[T]] = []
    total = 0
    for item, size in zip(items, sizes):
        if not groups or total + size > limit:
            groups.append([])
            total = 0
        groups[-1].append(item)
        total += size
    return groups
