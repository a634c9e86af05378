"""Background threads that keep the order of their items: prefetching, deferred writes, and a parallel map."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from queue import Full, Queue
from typing import Any, Generic, TypeVar

import torch

# OpenMP creates a team for each thread that computes in parallel. If all teams together have more threads than there
# are cores, OpenMP no longer waits actively, and the main thread's sums take a quarter longer. So background threads
# compute with one thread each.
use_one_thread = partial(torch.set_num_threads, 1)

T = TypeVar("T")
U = TypeVar("U")

DEFAULT_COUNT = 2  # items that are prefetched, and writes that wait
POLL = 0.1  # seconds between checks of a waiting thread whether it should stop


class Prefetcher(Generic[T]):
    """Iterator over items that a background thread produces ahead of their use.

    An exception of the items is raised after the items before it.

    Attributes:
        exhausted: Set when the thread produces no more items.
        failed: Whether the items raised an exception.

    Example:
        >>> list(Prefetcher(range(3)))
        [0, 1, 2]
    """

    def __init__(self, items: Iterable[T], after: threading.Event | None = None, count: int = DEFAULT_COUNT) -> None:
        """Start the thread.

        Args:
            items: The items.
            after: The thread waits for this event before the first item.
            count: Maximum number of items to hold.
        """
        self.exhausted, self.failed = threading.Event(), False
        self._ready: Queue[tuple[bool, Any]] = Queue(count)
        self._first: tuple[bool, Any] | None = None  # taken from the queue by `peek`, or the end
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._produce, args=(items, after), daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        """Yield the items; raise the exception that ended them, if any."""
        while True:
            entry, self._first = self._first or self._ready.get(), None
            if entry[0]:
                yield entry[1]
                continue
            self._first = entry  # for the next iteration and for `peek`
            if entry[1] is not None:
                raise entry[1]
            return

    def peek(self) -> BaseException | None:
        """Wait for the next item, which stays to be yielded, and return the exception that came instead of it."""
        if self._first is None:
            self._first = self._ready.get()
        return None if self._first[0] else self._first[1]

    @property
    def ready(self) -> bool:
        """Whether the next item, or the end of the items, is available without waiting."""
        return self._first is not None or not self._ready.empty()

    def close(self, wait: float | None = None) -> None:
        """Produce no more items, and wait until the thread has closed their generator.

        Args:
            wait: Maximum number of seconds to wait; None for no limit.
        """
        self._stopped.set()
        self._thread.join(wait)

    def _produce(self, items: Iterable[T], after: threading.Event | None) -> None:
        """Put items into the queue as (True, item), then their end as (False, exception or None)."""
        try:
            use_one_thread()
            with ExitStack() as stack:
                stack.callback(self.exhausted.set)
                while after is not None and not after.wait(POLL) and not self._stopped.is_set():
                    pass
                iterator = iter(items)
                if isinstance(iterator, Generator):
                    stack.callback(iterator.close)
                while not self._stopped.is_set():
                    self._put((True, next(iterator)))
        except StopIteration:
            self._put((False, None))
        except BaseException as error:
            self.failed = True
            self._put((False, error))

    def _put(self, entry: tuple[bool, Any]) -> None:
        """Wait for room in the queue, unless the thread should stop."""
        while not self._stopped.is_set():
            with suppress(Full):
                self._ready.put(entry, timeout=POLL)
                return


class WriteBehind:
    """Background thread that runs functions in order; at most DEFAULT_COUNT calls wait.

    Example:
        >>> found = []
        >>> with WriteBehind() as behind:
        ...     behind.submit(found.append, 1)
        ...     behind.flush()
        >>> found
        [1]
    """

    def __enter__(self) -> "WriteBehind":
        """Start the thread."""
        self.pool = ThreadPoolExecutor(1, initializer=use_one_thread)
        self.waiting: deque[Future[None]] = deque()
        return self

    def submit(self, work: Callable[..., None], *arguments: object) -> None:
        """Run a function after all earlier calls; raise the exception of an earlier call."""
        while len(self.waiting) >= DEFAULT_COUNT:
            self.waiting.popleft().result()
        self.waiting.append(self.pool.submit(work, *arguments))

    def flush(self) -> None:
        """Wait for all calls; raise the first exception."""
        while self.waiting:
            self.waiting.popleft().result()

    def __exit__(self, *_: object) -> None:
        """Cancel waiting calls and end the thread."""
        self.pool.shutdown(cancel_futures=True)


def map_in_order(work: Callable[[T], U], items: Iterable[T], threads: int) -> Generator[U, None, None]:
    """Yield the results of a function for each item, in order.

    Args:
        work: The function.
        items: The items; at most twice as many as threads are held.
        threads: Number of threads; 1 calls the function in this thread.

    Example:
        >>> list(map_in_order(abs, [-1, -2], threads=2))
        [1, 2]
    """
    if threads == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads, initializer=use_one_thread) as pool:
        waiting: deque[Future[U]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) == 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
