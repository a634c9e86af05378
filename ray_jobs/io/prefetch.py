"""Work beside the main path, in order: what is made ahead of it, done behind it, or by several threads at once."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from queue import Full, Queue
from typing import Any, Generic, TypeVar

import torch

# Each thread that computes with several makes OpenMP a team for it. Once all of these have more threads than there are
# cores, none waits awake any more, and the main path's sums take a quarter longer: threads beside it compute alone.
use_one_thread = partial(torch.set_num_threads, 1)

T = TypeVar("T")
U = TypeVar("U")

DEFAULT_COUNT = 2  # batches that lie ready while one is worked on, and results that wait to be written
POLL = 0.1  # seconds between two looks whether a thread that waits is to end


class Prefetcher(Generic[T]):
    """The same items, made in a thread of their own while those before are worked on.

    after: when to begin.  count: how many lie ready at most. An error comes where the item would have come.
    made: when no more will be made.  failed: whether that is for an error.
    """

    def __init__(self, items: Iterable[T], after: threading.Event | None = None, count: int = DEFAULT_COUNT) -> None:
        self.made, self.failed = threading.Event(), False
        self._ready: Queue[tuple[bool, Any]] = Queue(count)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._make, args=(items, after), daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        while (told := self._ready.get())[0]:
            yield told[1]
        if told[1] is not None:
            raise told[1]

    def close(self, wait: float | None = None) -> None:
        """Make no more, and wait so many seconds, None: for ever, until the items are closed, where they can be."""
        self._stopped.set()
        self._thread.join(wait)

    def _make(self, items: Iterable[T], after: threading.Event | None) -> None:
        try:
            use_one_thread()
            with ExitStack() as stack:
                stack.callback(self.made.set)
                while after is not None and not after.wait(POLL) and not self._stopped.is_set():
                    pass
                made = iter(items)
                if isinstance(made, Generator):
                    stack.callback(made.close)
                while not self._stopped.is_set():
                    self._put((True, next(made)))
        except StopIteration:
            self._put((False, None))
        except BaseException as error:
            self.failed = True
            self._put((False, error))

    def _put(self, told: tuple[bool, Any]) -> None:
        while not self._stopped.is_set():
            with suppress(Full):
                self._ready.put(told, timeout=POLL)
                return


class WriteBehind:
    """Does things in order in a thread of its own, while the next are prepared; at most a few wait."""

    def __enter__(self) -> "WriteBehind":
        self.pool = ThreadPoolExecutor(1, initializer=use_one_thread)
        self.waiting: deque[Future[None]] = deque()
        return self

    def do(self, work: Callable[..., None], *arguments: object) -> None:
        """Do this after all before. Raises what an earlier one raised."""
        while len(self.waiting) >= DEFAULT_COUNT:
            self.waiting.popleft().result()
        self.waiting.append(self.pool.submit(work, *arguments))

    def done(self) -> None:
        """Wait for all. Raises what one of them raised."""
        while self.waiting:
            self.waiting.popleft().result()

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)


def map_in_order(work: Callable[[T], U], items: Iterable[T], threads: int) -> Generator[U, None, None]:
    """The results of some work on each item, in order, by so many threads; at most twice as many items are held."""
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
