"""Threads beside the main path: everything in order, nothing held without bound, no error and no thread lost."""

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

Made = Callable[[Iterable[int]], Iterator[int]]
MAKERS: dict[str, tuple[Made, int]] = {
    "ahead": (lambda items: iter(Prefetcher(items)), DEFAULT_COUNT + 1),
    "in order, one thread": (lambda items: map_in_order(lambda i: i, items, 1), 1),
    "in order, three threads": (lambda items: map_in_order(lambda i: i, items, 3), 6),
}


class Source:
    """Numbers from 0 on, which knows how many were taken and whether it was closed."""

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
def test_items_come_in_order_and_few_are_held(stream: Made, held: int) -> None:
    source = Source(50)
    for number, item in enumerate(stream(source.items())):
        assert item == number
        time.sleep(0.002)
        assert source.taken <= number + 1 + held
    assert number == 49


@pytest.mark.parametrize(("stream", "held"), MAKERS.values(), ids=MAKERS)
def test_an_error_of_the_source_comes_after_its_items(stream: Made, held: int) -> None:
    found: list[int] = []
    with pytest.raises(OSError, match="the source broke"):
        found.extend(stream(Source(5, broken=True).items()))
    assert found == list(range(len(found)))
    assert len(found) >= 5 - held


def test_a_reader_that_stops_early_closes_the_source_and_ends_its_thread() -> None:
    before, source = threading.active_count(), Source(10**6)
    stream = Prefetcher(source.items())
    assert next(iter(stream)) == 0
    stream.close()
    assert source.closed
    assert threading.active_count() == before


def test_a_worker_that_fails_amid_a_shard_ends_its_reading_thread() -> None:
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


def test_what_follows_begins_once_all_before_is_made_though_not_yet_worked_on() -> None:
    first, second = Source(6), Source(10**6)
    before = Prefetcher(first)
    after = Prefetcher(second, before.exhausted)
    numbers = iter(before)
    for number in range(3):
        assert next(numbers) == number
    time.sleep(0.3)
    assert (first.taken, second.taken) == (6, 0)  # the sixth waits for room
    assert next(numbers) == 3
    while second.taken < DEFAULT_COUNT + 1:
        time.sleep(0.01)
    assert [next(numbers) for _ in range(2)] == [4, 5]
    assert next(iter(after)) == 0
    after.close()


def test_what_follows_ends_though_what_is_before_never_does() -> None:
    before, first = set(threading.enumerate()), Prefetcher(Source(10**6))
    second = Source(1)
    Prefetcher(second, first.exhausted).close()
    assert second.taken == 0
    first.close()
    assert set(threading.enumerate()) <= before


def native_threads() -> int:
    """Threads of this process that are not Python's."""
    return len(list(Path("/proc/self/task").iterdir())) - threading.active_count()


def behind(work: Callable[[], int]) -> list[int]:
    found: list[int] = []
    with WriteBehind() as worker:
        worker.submit(lambda: found.append(work()))
        worker.flush()
    return found


BESIDE: dict[str, Callable[[Callable[[], int]], Iterable[int]]] = {
    "ahead": lambda work: Prefetcher(work() for _ in range(1)),
    "in order": lambda work: map_in_order(lambda _: work(), range(1), 3),
    "behind": behind,
}


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
def test_threads_beside_the_main_path_make_no_team_that_would_slow_its_own(
    beside: Callable[[Callable[[], int]], Iterable[int]],
) -> None:
    numbers, threads = torch.zeros(2**20), torch.get_num_threads()
    torch.set_num_threads(2)
    try:

        def work() -> int:
            numbers.add_(1)
            return native_threads()

        before = work()  # with the main path's own team
        (during,) = beside(work)
        assert during <= before
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_results_keep_the_order_of_their_items_however_long_each_takes() -> None:
    rng = random.Random(0)
    seconds = [rng.random() / 100 for _ in range(60)]

    def work(number: int) -> int:
        time.sleep(seconds[number])
        return -number

    begun = time.monotonic()
    assert list(map_in_order(work, range(60), 6)) == [-n for n in range(60)]
    assert time.monotonic() - begun < sum(seconds), "they were done one after the other"


def test_an_error_comes_where_its_result_would_have() -> None:
    def work(number: int) -> int:
        if number == 7:
            raise ValueError("the eighth")
        return number

    found: list[int] = []
    with pytest.raises(ValueError, match="the eighth"):
        found.extend(map_in_order(work, range(100), 3))
    assert found == list(range(7))


def test_what_is_done_behind_is_done_in_order_and_its_error_is_told() -> None:
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
