"""Work beside the main path, in order: what is made ahead of it, done behind it, or by several threads at once."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from queue import Full, Queue
from typing import Any, TypeVar

T = TypeVar("T")
U = TypeVar("U")

AHEAD = 2  # batches that lie ready while one is worked on, and results that wait to be written


def ahead(items: Iterable[T], count: int = AHEAD) -> Generator[T, None, None]:
    """The same items, made in a thread of their own while those before are worked on.

    At most `count` lie ready; an error comes where the item would have come.
    """
    ready: Queue[tuple[bool, Any]] = Queue(count)
    stopped = threading.Event()

    def put(told: tuple[bool, Any]) -> bool:
        while not stopped.is_set():
            with suppress(Full):
                ready.put(told, timeout=0.1)
                return True
        return False

    def make() -> None:
        try:
            with ExitStack() as stack:
                made = iter(items)
                if isinstance(made, Generator):
                    stack.callback(made.close)
                for item in made:
                    if not put((True, item)):
                        return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while (told := ready.get())[0]:
            yield told[1]
        if told[1] is not None:
            raise told[1]
    finally:
        stopped.set()
        thread.join()


class Behind:
    """Does things in order in a thread of its own, while the next are prepared; at most a few wait."""

    def __enter__(self) -> "Behind":
        self.pool = ThreadPoolExecutor(1)
        self.waiting: deque[Future[None]] = deque()
        return self

    def do(self, work: Callable[..., None], *arguments: object) -> None:
        """Do this after all before. Raises what an earlier one raised."""
        while len(self.waiting) >= AHEAD:
            self.waiting.popleft().result()
        self.waiting.append(self.pool.submit(work, *arguments))

    def done(self) -> None:
        """Wait for all. Raises what one of them raised."""
        while self.waiting:
            self.waiting.popleft().result()

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)


def in_order(work: Callable[[T], U], items: Iterable[T], threads: int) -> Generator[U, None, None]:
    """The results of some work on each item, in order, by so many threads; at most twice as many items are held."""
    if threads == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads) as pool:
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
