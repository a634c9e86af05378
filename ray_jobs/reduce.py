"""Parts → moments → patterns, a few operators at a time, as Ray tasks."""

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from operator import add
from pathlib import Path

import ray

from patterns import Moments, Operator, Solution, solve
from patterns.moments import Wanted, planned_bytes
from patterns.storage import M, load_moments

TASK_BYTES = 256 << 20  # of moments that one task holds at a time, unless one operator's are more


def solve_group(
    parts: Sequence[str], operators: Sequence[Operator], choices: Sequence[str], seed: int
) -> list[Solution]:
    """Merge the parts of some operators and solve for their patterns."""
    return [solve(operator, merged(parts, operator.name, Moments), choices, seed) for operator in operators]


def merged(parts: Iterable[str], operator: str, kind: type[M]) -> M:
    """The moments of one operator over all parts."""
    return reduce(add, (load_moments(Path(part), operator, kind) for part in parts))


def solve_all(
    parts: Sequence[str],
    operators: Sequence[Operator],
    wanted: Callable[[Operator], Wanted],
    choices: Sequence[str],
    seed: int,
) -> dict[str, Solution]:
    """The patterns of every operator, from the parts that count."""
    task = ray.remote(solve_group)
    groups = grouped(operators, [planned_bytes(op, wanted(op)) for op in operators])
    solved = ray.get([task.remote(parts, group, choices, seed) for group in groups])
    return {op.name: solution for group, solutions in zip(groups, solved) for op, solution in zip(group, solutions)}


def grouped(operators: Sequence[Operator], sizes: Sequence[int]) -> list[list[Operator]]:
    """Consecutive operators, as many together as stay below TASK_BYTES."""
    groups: list[list[Operator]] = []
    held = TASK_BYTES
    for operator, size in zip(operators, sizes):
        if held + size > TASK_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(operator)
        held += size
    return groups
