"""Where workers run: as Ray actors on a cluster, or in this process."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import ray
from ray import ObjectRefGenerator
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayTaskError

LOST = (RayActorError, OutOfMemoryError, GetTimeoutError)  # errors of a worker, not of the method that it ran


class PoolWorker(Protocol):
    """The methods of a worker that the pool calls through its backend."""

    def describe(self) -> Any:
        """Return who the worker is. On a cluster, the answer comes once there is room for the worker."""

    def prepare(self) -> None:
        """Load whatever the work needs."""

    def work(self, task: Any, following: Any) -> Iterator[Any]:
        """Work on a task.

        Args:
            task: The task.
            following: The task that the worker is likely to get next, so that it can begin to read it; or None.

        Yields:
            Reports of progress. The last one is the result.
        """

    def commit(self) -> Any:
        """Make all work since the last commit permanent, and return what `Job.on_committed` needs to know of it."""

    def close(self) -> None:
        """Stop all that the worker has begun. Ray actors are killed instead."""


class Backend(Protocol):
    """How the pool starts workers and calls their methods. A call is an opaque, hashable handle."""

    def spawn(self) -> Any:
        """Start a worker and return its handle, without waiting for it."""

    def call(self, worker: Any, method: str, *arguments: Any) -> Any:
        """Begin a call of a method. `work` is a generator, whose items are answers; other methods have one answer."""

    def wait(self, calls: Sequence[Any], timeout: float) -> Sequence[Any]:
        """Wait until a call has an answer, and return the calls that have one; empty after the timeout.

        Args:
            calls: One call or more.
            timeout: Seconds.
        """

    def get(self, call: Any, timeout: float) -> Any:
        """Return the next answer of a call.

        Raises:
            StopIteration: If a generator has no further answer.
            RayTaskError: If the method failed on another process; see `unwrap`.
            Exception: The method's own error if it ran in this process, or one of `LOST`.
        """

    def kill(self, worker: Any) -> None:
        """End a worker at once. Its calls have no answer any more."""

    def release(self, worker: Any) -> None:
        """End a worker that has no pending call, at the end of a job."""


class RayBackend:
    """Workers as Ray actors.

    Args:
        spawn: Starts an actor and returns its handle.
        release: Ends an idle actor, or keeps it for the next job.
    """

    def __init__(self, spawn: Callable[[], Any], release: Callable[[Any], None] = ray.kill) -> None:
        self.spawn, self.release = spawn, release

    def call(self, worker: Any, method: str, *arguments: Any) -> Any:
        """Submit a call; see `Backend`."""
        options = {"num_returns": "streaming"} if method == "work" else {}
        return getattr(worker, method).options(**options).remote(*arguments)

    def wait(self, calls: Sequence[Any], timeout: float) -> Sequence[Any]:
        """Wait for an answer; see `Backend`."""
        return ray.wait(list(calls), num_returns=1, timeout=timeout)[0]

    def get(self, call: Any, timeout: float) -> Any:
        """Fetch an answer; see `Backend`."""
        return ray.get(next(call) if isinstance(call, ObjectRefGenerator) else call, timeout=timeout)

    def kill(self, worker: Any) -> None:
        """Kill the actor's process."""
        ray.kill(worker)


class LocalBackend:
    """Workers as objects of this process, without Ray. A call runs when its answer is fetched.

    A generator runs until its next item, so that the pool checks signals between two items.

    Args:
        spawn: Makes a worker, whose `close` ends it.
    """

    def __init__(self, spawn: Callable[[], Any]) -> None:
        self.spawn = spawn

    def call(self, worker: Any, method: str, *arguments: Any) -> Any:
        """Prepare a call; see `Backend`."""
        function = partial(getattr(worker, method), *arguments)
        return iterate(function) if method == "work" else function

    def wait(self, calls: Sequence[Any], timeout: float) -> Sequence[Any]:
        """Return the call that was begun first; see `Backend`."""
        return calls[:1]

    def get(self, call: Any, timeout: float) -> Any:
        """Run a call up to its next answer; see `Backend`."""
        return next(call) if isinstance(call, Generator) else call()

    def kill(self, worker: Any) -> None:
        """Close the worker."""
        worker.close()

    release = kill


def iterate(function: Callable[[], Iterable[Any]]) -> Generator[Any, None, None]:
    """Yield a function's items; the function is called when the first is asked for."""
    yield from function()


def unwrap(error: Exception) -> Exception:
    """Return a worker's own error without Ray's wrapping."""
    return error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, Exception) else error
