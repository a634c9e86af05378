"""Background threads: results in order, bounded memory, and no lost exceptions or threads."""

import random
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from ray_jobs.engine.shard_worker import BatchStream
from ray_jobs.io.prefetch import DEFAULT_COUNT, Prefetcher, WriteBehind, map_in_order

MakeStream = Callable[[Iterable[int]], Iterator[int]]
MAKERS: dict[str, tuple[MakeStream, int]] = {
    "prefetched": (lambda items: iter(Prefetcher(items)), DEFAULT_COUNT + 1),
    "in order, one thread": (lambda items: map_in_order(lambda i: i, items, 1), 1),
    "in order, three threads": (lambda items: map_in_order(lambda i: i, items, 3), 6),
}


def test_end_of_prefetched_items_is_found_again() -> None:
    stream = Prefetcher(range(2))
    assert list(stream) == [0, 1]
    assert stream.ready
    assert stream.peek() is None
    assert list(stream) == []


class Source:
    """Numbers from 0 that count how many were taken and note whether their generator was closed."""

    def __init__(self, count: int, broken: bool = False) -> None:
        self.count, self.broken, self.taken, self.closed = count, broken, 0, False

    def __iter__(self) -> Iterator[int]:
        return self.items()

    def items(self) -> Generator[int, None, None]:
        try:
            for number in range(self.count):
                self.taken += 1
                yield number
            if self.broken:
                raise OSError("the source broke")
        finally:
            self.closed = True


@pytest.mark.parametrize(("stream", "held"), MAKERS.values(), ids=MAKERS)
def test_items_keep_their_order_and_few_are_held(stream: MakeStream, held: int) -> None:
    source = Source(50)
    for number, item in enumerate(stream(source.items())):
        assert item == number
        time.sleep(0.002)
        assert source.taken <= number + 1 + held
    assert number == 49


@pytest.mark.parametrize(("stream", "held"), MAKERS.values(), ids=MAKERS)
def test_error_of_the_source_is_raised_after_its_items(stream: MakeStream, held: int) -> None:
    found: list[int] = []
    with pytest.raises(OSError, match="the source broke"):
        found.extend(stream(Source(5, broken=True).items()))
    assert found == list(range(len(found)))
    assert len(found) >= 5 - held


def test_closing_early_closes_the_source_and_ends_the_thread() -> None:
    before, source = threading.active_count(), Source(10**6)
    stream = Prefetcher(source.items())
    assert next(iter(stream)) == 0
    stream.close()
    assert source.closed
    assert threading.active_count() == before


def test_failure_within_a_shard_ends_the_reading_thread() -> None:
    before, source = threading.active_count(), Source(10**6)
    batches = BatchStream(source, torch.device("cpu"))  # type: ignore[arg-type]

    def work() -> None:
        with closing(batches):
            for number in batches:
                if number == 3:
                    raise ValueError("a batch that cannot be used")

    with pytest.raises(ValueError, match="cannot be used"):
        work()
    assert source.closed
    assert threading.active_count() == before
    assert batches.batches == 4


def test_next_prefetcher_starts_when_the_previous_is_exhausted_but_not_yet_used() -> None:
    first, second = Source(6), Source(10**6)
    before = Prefetcher(first)
    after = Prefetcher(second, before.exhausted)
    numbers = iter(before)
    for number in range(3):
        assert next(numbers) == number
    time.sleep(0.3)
    assert (first.taken, second.taken) == (6, 0)  # the sixth item waits for room in the queue
    assert next(numbers) == 3
    while second.taken < DEFAULT_COUNT + 1:
        time.sleep(0.01)
    assert [next(numbers) for _ in range(2)] == [4, 5]
    assert next(iter(after)) == 0
    after.close()


def test_next_prefetcher_can_be_closed_although_the_previous_never_ends() -> None:
    before, first = set(threading.enumerate()), Prefetcher(Source(10**6))
    second = Source(1)
    Prefetcher(second, first.exhausted).close()
    assert second.taken == 0
    first.close()
    assert set(threading.enumerate()) <= before


def native_threads() -> int:
    """Return the number of threads of this process that are not Python's."""
    return len(list(Path("/proc/self/task").iterdir())) - threading.active_count()


def run_behind(work: Callable[[], int]) -> list[int]:
    found: list[int] = []
    with WriteBehind() as worker:
        worker.submit(lambda: found.append(work()))
        worker.flush()
    return found


RUNNERS: dict[str, Callable[[Callable[[], int]], Iterable[int]]] = {
    "prefetched": lambda work: Prefetcher(work() for _ in range(1)),
    "in order": lambda work: map_in_order(lambda _: work(), range(1), 3),
    "write behind": run_behind,
}


@pytest.mark.parametrize("run", RUNNERS.values(), ids=RUNNERS)
def test_background_threads_create_no_openmp_threads(
    run: Callable[[Callable[[], int]], Iterable[int]],
) -> None:
    numbers, threads = torch.zeros(2**20), torch.get_num_threads()
    torch.set_num_threads(2)
    try:

        def work() -> int:
            numbers.add_(1)
            return native_threads()

        before = work()  # with the main thread's team
        (during,) = run(work)
        assert during <= before
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_results_keep_the_order_of_their_items_whatever_their_time() -> None:
    rng = random.Random(0)
    seconds = [rng.random() / 100 for _ in range(60)]
    together = threading.Barrier(6, timeout=60)

    def work(number: int) -> int:
        together.wait()  # passes only if six items are computed at the same time
        time.sleep(seconds[number])
        return -number

    assert list(map_in_order(work, range(60), 6)) == [-n for n in range(60)]


def test_error_is_raised_in_the_position_of_its_result() -> None:
    def work(number: int) -> int:
        if number == 7:
            raise ValueError("the eighth")
        return number

    found: list[int] = []
    with pytest.raises(ValueError, match="the eighth"):
        found.extend(map_in_order(work, range(100), 3))
    assert found == list(range(7))


def test_deferred_calls_run_in_order_and_their_error_is_raised() -> None:
    done: list[int] = []

    def work(number: int) -> None:
        time.sleep(0.001)
        if number == 5:
            raise OSError("the disk is full")
        done.append(number)

    def do_all(behind: WriteBehind) -> None:
        for number in range(100):
            behind.submit(work, number)
        behind.flush()

    with WriteBehind() as behind, pytest.raises(OSError, match="the disk is full"):
        do_all(behind)
    assert done[:5] == [0, 1, 2, 3, 4]
    assert len(done) < 5 + 2 + DEFAULT_COUNT
