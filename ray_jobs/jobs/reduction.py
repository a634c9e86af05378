"""Parts → moments → patterns, so that no process holds more than a few operators' moments."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TypeVar

from patterns import Moments, Operator, PatchMoments, Solution, solve
from patterns.io import TensorFile, load_moments
from patterns.moments import Wanted, planned_bytes
from ray_jobs.engine.ray_tasks import Tasks
from ray_jobs.io.object_store import located

TASK_BYTES = 256 << 20  # of moments that one task holds at a time, unless one operator's are more
M = TypeVar("M", Moments, PatchMoments)
T = TypeVar("T")


def solve_group(
    parts: Sequence[str], operators: Sequence[Operator], choices: Sequence[str], seed: int
) -> list[Solution]:
    """Merge the parts of some operators and solve for their patterns."""
    names = [operator.name for operator in operators]
    return [solve(op, m, choices, seed) for op, m in zip(operators, merged(parts, names, Moments))]


def merged(parts: Iterable[str], operators: Iterable[str], kind: type[M]) -> Iterator[M]:
    """The moments of some operators over all parts, one after the other."""
    with ExitStack() as stack:
        files = [stack.enter_context(TensorFile(located(part))) for part in parts]
        for operator in operators:
            yield load_moments(files, operator, kind)


def solve_all(
    parts: Mapping[str, Sequence[str]],
    operators: Sequence[Operator],
    wanted: Callable[[Operator], Wanted],
    choices: Sequence[str],
    seed: int,
    tasks: Tasks,
) -> Iterator[tuple[str, Solution]]:
    """The patterns of every operator in turn, from the parts that count for it."""
    groups = grouped(operators, [planned_bytes(op, wanted(op)) for op in operators], TASK_BYTES)
    # Operators of one group may have been gathered in different passes, hence have different parts.
    alike = [part for group in groups for part in runs_of(group, lambda op: parts[op.name])]
    solved = tasks.each(solve_group, ((parts[group[0].name], group, choices, seed) for group in alike))
    for group, solutions in zip(alike, solved):
        yield from zip((operator.name for operator in group), solutions)


def grouped(operators: Sequence[T], sizes: Sequence[int], most: int) -> list[list[T]]:
    """Consecutive operators, as many together as stay below `most` in size, and at least one."""
    groups: list[list[T]] = []
    held = 0
    for operator, size in zip(operators, sizes):
        if not groups or held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(operator)
        held += size
    return groups


def runs_of(items: Sequence[T], key: Callable[[T], object]) -> Iterator[list[T]]:
    """Consecutive items of equal key."""
    run: list[T] = []
    for item in items:
        if run and key(item) != key(run[0]):
            yield run
            run = []
        run.append(item)
    yield run
