"""Pure functions as Ray tasks, or called in this process if a job works without Ray."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle, starmap
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError

from ray_jobs.engine.worker_hosts import end_kept_hosts, kept_actors

MAX_PENDING = 4  # calls that are submitted before the first result is taken


class PendingCall(Protocol):
    """A call of a function that was submitted."""

    def done(self) -> bool:
        """Return whether the call has ended, with a result or an error."""

    def result(self) -> Any:
        """Wait for the call and return its result, or raise its error."""


class Tasks(Protocol):
    """Place where pure functions are called: Ray tasks, or this process."""

    def map(self, function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Yield `function(*call)` for each call, in order."""

    def submit(self, function: Callable[..., Any], *arguments: object) -> PendingCall:
        """Call a function while other work continues."""


class RayTasks:
    """Functions as Ray tasks. If a process or node is lost, Ray repeats its call, because pure functions have no state.

    While hosts of workers are kept (see `worker_hosts`), they run the calls, because tasks would wait for their CPUs.
    """

    def map(self, function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Yield results in order; see `Tasks`."""
        task = ray.remote(function)
        pending: deque[tuple[Any, tuple[Any, ...]]] = deque()
        hosts = cycle(kept_actors())

        def result(reference: Any, call: tuple[Any, ...]) -> Any:
            try:
                return ray.get(reference)
            except RayActorError:
                end_kept_hosts()  # now there is room for a task
                return ray.get(task.remote(*call))

        for call in calls:
            host = next(hosts, None) if kept_actors() else None
            pending.append((task.remote(*call) if host is None else host.call.remote(function, *call), call))
            if len(pending) > MAX_PENDING:
                yield result(*pending.popleft())
        while pending:
            yield result(*pending.popleft())

    def submit(self, function: Callable[..., Any], *arguments: object) -> "RayCall":
        """Submit a task that reserves no CPU, because it would wait for one until the workers end; see `Tasks`."""
        return RayCall(ray.remote(function).options(num_cpus=0).remote(*arguments))


@dataclass(frozen=True)
class RayCall:
    """A Ray task that was submitted.

    Attributes:
        reference: Ray's reference of its result.
    """

    reference: Any

    def done(self) -> bool:
        """Return whether the task has ended."""
        return bool(ray.wait([self.reference], timeout=0)[0])

    def result(self) -> Any:
        """Wait for the result and return it, or raise the task's error."""
        return ray.get(self.reference)


class LocalTasks:
    """Functions that are called in this process, at once.

    Example:
        >>> list(LocalTasks().map(pow, [(2, 3), (3, 2)]))
        [8, 9]
    """

    def map(self, function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Yield results in order; see `Tasks`."""
        return starmap(function, calls)

    def submit(self, function: Callable[..., Any], *arguments: object) -> "LocalCall":
        """Call a function; see `Tasks`."""
        return LocalCall(function(*arguments))


@dataclass(frozen=True)
class LocalCall:
    """A call that has ended.

    Attributes:
        value: Its result.
    """

    value: Any

    def done(self) -> bool:
        """Return True."""
        return True

    def result(self) -> Any:
        """Return the result."""
        return self.value
