"""Pure functions as Ray tasks, or called in this process where a job works without Ray."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import starmap
from typing import Any, Protocol

import ray

AHEAD = 4  # calls whose results may lie ready before the first is taken


class PendingCall(Protocol):
    """A call under way."""

    def done(self) -> bool:
        """Whether it has ended, well or not."""

    def result(self) -> Any:
        """What it gave, once it has ended; raises what it raised."""


class Tasks(Protocol):
    """Where pure functions are called."""

    def map(self, function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """`function(*call)` for each call, in order."""

    def submit(self, function: Callable[..., Any], *arguments: object) -> PendingCall:
        """Call a function while other work goes on."""


class RayTasks:
    """As Ray tasks. One that is lost with its process or node is called again by Ray: it has no state to lose."""

    def map(self, function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        task = ray.remote(function)
        pending: deque[Any] = deque()
        for call in calls:
            pending.append(task.remote(*call))
            if len(pending) > AHEAD:
                yield ray.get(pending.popleft())
        while pending:
            yield ray.get(pending.popleft())

    def submit(self, function: Callable[..., Any], *arguments: object) -> PendingCall:
        # Without a CPU of its own, for which it would wait until the workers are gone.
        return RayTasks.Call(ray.remote(function).options(num_cpus=0).remote(*arguments))

    class Call:
        def __init__(self, reference: Any) -> None:
            self.reference = reference

        def done(self) -> bool:
            return bool(ray.wait([self.reference], timeout=0)[0])

        def result(self) -> Any:
            return ray.get(self.reference)


class InProcessTasks:
    """In this process, at once."""

    def map(self, function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        return starmap(function, calls)

    def submit(self, function: Callable[..., Any], *arguments: object) -> PendingCall:
        return InProcessTasks.Call(function(*arguments))

    class Call:
        def __init__(self, value: Any) -> None:
            self.value = value

        def done(self) -> bool:
            return True

        def result(self) -> Any:
            return self.value
