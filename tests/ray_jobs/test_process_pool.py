"""Processes that compute: one that is killed or hangs costs at most the item that ends it, and none is left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_jobs.config import Preprocessing
from ray_jobs.data.samples import RejectedSample
from ray_jobs.data.shard_reader import Batch, ReaderConfig, ShardReader
from ray_jobs.io.process_pool import DEPTH, ProcessPool
from tests.conftest import jpeg, write_tar
from tests.ray_jobs.runs import wait_until

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
PLAIN = Preprocessing(image_size=16, resize=16, interpolation="bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
TROUBLE = """
import os, signal, sys, time
import numpy as np

def square(number):
    time.sleep(0.002)
    return number * number

def own_process(_):
    return os.getpid()

def is_imported(module):
    return module in sys.modules

def die_at_three(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number

def hang_at_three(number):
    if number == 3:
        time.sleep(1000)
    return number

def hang_at_three_with_the_lock(number):
    if number == 3:
        int("9" * 4000) ** 400000  # one operation, in which no other thread of Python runs
    return number

def large_at_three(data):
    if data[0] == 3:
        int("9" * 4000) ** 400000
    return data[0]

def raise_at_three(number):
    if number == 3:
        raise ValueError("three")
    return number

def decode(sample):
    if sample["__key__"] == "7":
        os.kill(os.getpid(), signal.SIGSEGV)
    if sample["__key__"] == "8":
        time.sleep(1000)
    if sample["__key__"] == "9":
        raise ValueError("nine")
    return np.full((3, 16, 16), int(sample["cls"]))
"""


@pytest.fixture(scope="module")
def trouble(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A module of functions that disturb their process, which processes can import."""
    folder = tmp_path_factory.mktemp("trouble")
    (folder / "trouble.py").write_text(TROUBLE)
    sys.path.insert(0, str(folder))
    yield folder / "trouble.py"
    sys.path.remove(str(folder))


def keep_reason(item: object, reason: str) -> str:
    return f"{item}: {reason}"


def kill(process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def test_results_are_those_of_the_function_in_order(trouble: Path) -> None:
    import trouble as functions  # type: ignore[import-not-found]

    parts = [range(n) for n in range(20)]
    with ProcessPool(2, "trouble") as pool:
        assert list(pool.map(functions.square, keep_reason, parts)) == [[i * i for i in part] for part in parts]
        processes = set(chain(*pool.map(functions.own_process, keep_reason, [[0]] * 10)))
        assert processes == set(pool.running)
        assert os.getpid() not in processes


def test_few_parts_are_held_for_each_process(trouble: Path) -> None:
    import trouble as functions

    taken: list[int] = []
    with ProcessPool(2, "trouble") as pool:
        parts = ([taken.append(n) or n] for n in range(30))  # type: ignore[func-returns-value]
        for number, [result] in enumerate(pool.map(functions.square, keep_reason, parts)):
            assert result == number**2
            assert len(taken) <= number + 2 * DEPTH


def test_map_that_is_closed_early_leaves_no_results_to_the_next(trouble: Path) -> None:
    import trouble as functions

    with ProcessPool(2, "trouble") as pool:
        first = pool.map(functions.square, keep_reason, ([n] for n in range(10)))
        assert next(first) == [0]
        assert list(pool.map(functions.square, keep_reason, [[5]])) == [[25]]  # at the same time
        first.close()
        assert list(pool.map(functions.square, keep_reason, [[6], [7], [8]])) == [[36], [49], [64]]


def test_requests_and_results_may_be_larger_than_all_buffers(trouble: Path) -> None:
    parts = [[bytes([n]) * (1 << 22)] * 3 for n in range(12)]
    with ProcessPool(2, "trouble") as pool:
        assert list(pool.map(bytes, keep_reason, parts)) == parts


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("die_at_three", "killed or crashed"),
        ("hang_at_three", "no result after 1 s"),
        ("hang_at_three_with_the_lock", "no result after 1 s"),
        ("raise_at_three", "killed or crashed"),
    ],
)
def test_only_the_item_that_ends_or_blocks_its_process_is_given_up(trouble: Path, name: str, reason: str) -> None:
    import trouble as functions

    with ProcessPool(1, "trouble", timeout=4.0) as pool:
        parts = [[0, 1], [2, 3, 4], [5], [6]]
        found = list(pool.map(getattr(functions, name), keep_reason, parts))
    assert [found[0], found[1][0], found[1][2], *found[2:]] == [[0, 1], 2, 4, [5], [6]]
    assert found[1][1].startswith("3: ")
    assert reason in found[1][1]


def test_requests_that_nobody_reads_are_given_up(trouble: Path) -> None:
    import trouble as functions

    parts = [[bytes([n]) * (1 << 22)] for n in range(3, 9)]  # larger than the pipe
    with ProcessPool(1, "trouble", timeout=4.0) as pool:
        found = list(pool.map(functions.large_at_three, lambda _, reason: reason, parts))
    assert found == [["no result after 1 s"], [4], [5], [6], [7], [8]]


def test_killed_processes_and_servers_lose_no_item(trouble: Path) -> None:
    import trouble as functions

    killed = set()
    with ProcessPool(2, "trouble") as pool:

        def make_parts() -> Iterator[list[int]]:
            for number in range(30):
                if number % 4 == 3 and (running := pool.running):  # a killed process may not have a successor yet
                    killed.add(running[number % len(running)])
                    kill(running[number % len(running)])
                if number in (10, 20):
                    assert pool._server.process is not None
                    kill(pool._server.process.pid)
                yield list(range(20 * number, 20 * number + 20))

        found = list(pool.map(functions.square, keep_reason, make_parts()))
    assert [each for part in found for each in part] == [n * n for n in range(600)]
    assert len(killed) > 1


def test_module_that_cannot_be_imported_is_an_error() -> None:
    with (
        ProcessPool(1, "no_such_module") as pool,
        pytest.raises(RuntimeError, match="no process can import no_such_module"),
    ):
        list(pool.map(abs, keep_reason, [[1]]))


def test_processes_end_with_a_pool_that_nobody_uses_any_more(trouble: Path) -> None:
    import trouble as functions

    pool = ProcessPool(2, "trouble")
    assert list(pool.map(functions.square, keep_reason, [[1], [2]])) == [[1], [4]]
    processes = pool.running
    assert len(processes) == 2
    del pool  # a process of Ray that is kept for the next job drops its worker
    wait_until(lambda: not any(is_running(process) for process in processes))


OWNER = """
import sys, time, trouble
from ray_jobs.io.process_pool import DEPTH, ProcessPool

pool = ProcessPool(1, "trouble")
((process,),) = pool.map(trouble.own_process, None, [[0]])
print(process, pool._server.process.pid, flush=True)
list(pool.map(trouble.hang_at_three, None, [[3]]))
"""


def test_processes_end_with_their_owner_even_if_both_are_busy(trouble: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{trouble.parent}"}
    with subprocess.Popen([sys.executable, "-c", OWNER], env=environment, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        processes = [int(word) for word in owner.stdout.readline().split()]
        assert len(processes) == 2
        time.sleep(0.2)
        owner.kill()
    wait_until(lambda: not any(is_running(process) for process in processes))


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A shard of 40 samples with masks and boxes, of which every fifth is no image."""
    rng = np.random.default_rng(0)
    samples: list[dict[str, object]] = [
        {"__key__": f"{i}", "jpg": jpeg(rng) if i % 5 else b"no image", "cls": str(i).encode()} for i in range(40)
    ]
    samples[2]["json"] = b'{"boxes": [[0, 0, 8, 8]]}'
    return str(write_tar(tmp_path_factory.mktemp("shard") / "x.tar", samples))


def read(reader: ShardReader) -> tuple[list[Batch], list[RejectedSample]]:
    return list(reader), reader.rejected


def require_equal(found: list[Batch], expected: list[Batch]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a.keys, a.labels, a.boxes) == (b.keys, b.labels, b.boxes)
        assert torch.equal(a.images, b.images)


@pytest.mark.full
def test_several_processes_give_the_batches_of_one_thread(
    shard: str, trouble: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trouble as functions

    monkeypatch.setattr("ray_jobs.data.shard_reader.PART_SAMPLES", 3)
    config = ReaderConfig(PLAIN, batch_size=7, with_regions=True, classes=35)
    batches, rejected = read(ShardReader(shard, config, max_samples=38))
    with ProcessPool(2, "ray_jobs.data.shard_reader", timeout=20.0) as pool:
        found = read(ShardReader(shard, replace(config, pool=pool), max_samples=38))
        require_equal(found[0], batches)
        assert found[1] == rejected
        heavy = ["torch._dynamo", "patterns.tracing", "ray_jobs.models", "ray", "timm", "torchvision"]
        assert list(pool.map(functions.is_imported, keep_reason, [heavy])) == [[False] * len(heavy)]
        assert [r.key for r in rejected] == [*(str(i) for i in range(0, 35, 5)), "35", "36", "37"]
        killed = ShardReader(shard, replace(config, pool=pool), max_samples=38)
        seen = []
        for batch in killed:  # while later samples are decoded
            seen.append(batch)
            kill(pool.running[0])
        require_equal(seen, batches)
        assert killed.rejected == rejected


@pytest.mark.full
def test_decoder_of_the_user_that_ends_hangs_or_raises_rejects_its_sample(shard: str, trouble: Path) -> None:
    with ProcessPool(2, "ray_jobs.data.shard_reader", timeout=4.0) as pool:
        reader = ShardReader(shard, ReaderConfig(PLAIN, 7, decoder=f"{trouble}:decode", pool=pool))
        batches, rejected = read(reader)
    assert [key for batch in batches for key in batch.keys] == [f"{i}" for i in range(40) if i not in (7, 8, 9)]
    assert [image[0, 0, 0] for batch in batches for image in batch.images] == [
        label for batch in batches for label in batch.labels
    ]
    reasons = {r.key: (r.shard, r.stage, r.reason) for r in rejected}
    assert reasons["7"] == (shard, "decode", "it cannot be decoded: its process was killed or crashed")
    assert reasons["8"] == (shard, "decode", "it cannot be decoded: no result after 1 s")
    assert reasons["9"][2].startswith("the decoder failed (ValueError: nine, at ")
    assert len(reasons) == 3
