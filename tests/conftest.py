"""Fixtures: shards of JPEGs, a model in a file, a Ray on this machine."""

import gc
import io
import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pytest
import ray
from hypothesis import settings
from PIL import Image
from webdataset import TarWriter
from xdist.scheduler import LoadScopeScheduling

from ray_jobs.engine.signals import SIGNALS
from ray_jobs.models.loading import LoadedModel, TracedModel

# Otherwise Ray enables token authentication if an earlier run left a token in the home directory.
os.environ["RAY_AUTH_MODE"] = "disabled"
# By default Ray runs workers at niceness 15, so that they would wait for the other test processes of a busy machine.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - the name that Ray reads
# By default Serve kills a proxy that has not started within 5 s, which two cores with four test processes may exceed.
os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "60"

# Other work on the machine must not fail a test.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Fixtures that start a Ray cluster: tests that use them belong to the tier `ray` without a mark of their own.
RAY_FIXTURES = {"local_ray", "cluster"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests whose fixtures start Ray, and put the files that take longest first.

    Of the cases of a test marked `cases`, `make check` runs every tenth.
    """
    seen = Counter[object]()
    for item in items:
        if RAY_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("ray")
        if item.get_closest_marker("cases"):
            law = getattr(item, "function", item)
            if seen[law] % 10:
                item.add_marker("full")
            seen[law] += 1
    items.sort(key=lambda item: (not find_ray(item.path), item.path.parent.name != "patterns"))


def pytest_collection_finish() -> None:
    """Let the garbage collector pass by the objects of imported modules, which stay until the process ends."""
    gc.collect()
    gc.freeze()


@cache
def find_ray(file: Path) -> str | None:
    """Return which Ray the tests of a file share: "local_ray", "LocalCluster", or None."""
    found = re.search(r"local_ray|LocalCluster\b", file.read_text())
    return found[0] if found else None


class ByFile(LoadScopeScheduling):
    """The tests of a file run in one process, because they share fixtures, and so do all that share a Ray."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, _ = nodeid.partition("::")
        return find_ray(self.config.rootpath / file) or file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling | None:
    """Divide the tests among processes, for `--dist loadfile`."""
    return ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(autouse=True)
def no_unmarked_ray(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a test without the mark `ray` starts Ray in this process: `make check` runs these tests only."""
    if request.node.get_closest_marker("ray") is None:
        monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("mark this test by pytest.mark.ray"))


@pytest.fixture(autouse=True)
def same_signal_handlers() -> Iterator[None]:
    """Restore this process's signal handlers after each test: the next test's processes inherit what is ignored."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        if handler is not None:  # otherwise another library has installed it
            signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    """Trace the small model once per process for the same weights and options.

    Tracing takes most of the time of a job on a tiny model. `trace` itself is tested without this cache.
    """
    models: dict[object, TracedModel] = {}
    original = LoadedModel.traced.func  # type: ignore[attr-defined]

    def traced(self: LoadedModel) -> TracedModel:
        if not self.config.spec.endswith(f"/{MODEL_FILE}:small"):
            return original(self)
        options = self.config.spec, self.config.pass_through, self.config.strip_softmax
        key = self.digest, *options, self.preprocessing.input_shape, self.dtype, self.device
        if key not in models:
            models[key] = original(self)
        return replace(models[key], config=self.config, origin=self.origin)

    cached = cached_property(traced)
    cached.__set_name__(LoadedModel, "traced")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadedModel, "traced", cached)
        yield


MODEL_FILE = "small_model.py"
MODEL = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, groups=2)

    def forward(self, x):
        return torch.relu(x + self.conv2(torch.relu(self.bn1(self.conv1(x)))))


def small():
    torch.manual_seed(7)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.ReLU6(), Block(), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )
    model[2].bn1.running_mean.uniform_(-0.2, 0.2)
    return model


def broken():
    raise RuntimeError("this factory always fails")
"""


@pytest.fixture(scope="session")
def model_spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small residual network for 16×16 images with 5 classes, as `--model` takes it."""
    path = tmp_path_factory.mktemp("model") / MODEL_FILE
    path.write_text(MODEL)
    return f"{path}:small"


def jpeg(rng: np.random.Generator, size: int = 16) -> bytes:
    """Return a random smooth image."""
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    buffer = io.BytesIO()
    coarse.resize((size, size), Image.Resampling.BICUBIC).save(buffer, "jpeg", quality=95)
    return buffer.getvalue()


def write_tar(path: Path, samples: list[dict[str, object]]) -> Path:
    """Write samples to a shard without encoding them, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tar = TarWriter(str(path), encoder=False)
    for sample in samples:
        tar.write(sample)
    tar.close()
    return path


def make_shards(folder: Path, shards: int, samples: int, seed: int = 0) -> list[str]:
    """Write shards of random JPEGs with labels from 0 to 4, and return their paths."""
    rng = np.random.default_rng(seed)
    return [
        str(
            write_tar(
                folder / f"train-{number:03d}.tar",
                [
                    {"__key__": f"s{number:03d}-{i}", "jpg": jpeg(rng), "cls": str(rng.integers(5)).encode()}
                    for i in range(samples)
                ],
            )
        )
        for number in range(shards)
    ]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Twelve shards of six samples."""
    return make_shards(tmp_path_factory.mktemp("shards"), 12, 6)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray on this machine with two CPUs and two GPUs that need not exist."""
    ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def ray_of_workers(request: pytest.FixtureRequest) -> None:
    """`local_ray`, if the test's parameter `workers` is not 0."""
    if request.node.callspec.params["workers"]:
        request.getfixturevalue("local_ray")


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs the program on bad input, asserts status 2, and returns the one line of the error."""
    from ray_jobs.cli.app import exit_status

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert exit_status([str(a) for a in arguments]) == 2
        err = capsys.readouterr().err
        lines = [line for line in err.splitlines() if line.startswith("patternnet: ")]
        assert len(lines) == 1, err
        assert "Traceback" not in err
        return lines[0]

    return run
