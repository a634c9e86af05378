"""Small fits to run, and when two of them are the same."""

import time
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

from ray_jobs.config import FitConfig, ModelConfig

PREPARED = {"image_size": 16, "resize": 16, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}

# A shard that comes so late that much can happen to its job, and the file at which it does not wait any longer.
LATE = "pipe:for i in $(seq 3000); do [ -e {gate} ] && break; sleep 0.1; done; cat {shard}"
OPTIONS = ["--image-size", "16", "--resize", "16", "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"]


def configured(spec: str, shards: list[str], out: Path | str, **options: object) -> FitConfig:
    """A fit of a model for 16×16 images."""
    return FitConfig(
        model=ModelConfig(spec=spec, **PREPARED), shards=tuple(shards), out=str(out), batch_size=4, **options
    )  # type: ignore[arg-type]


def same_patterns(one: Path, other: Path) -> None:
    """Equal to 1e-9 relative, tensor by tensor; the tensors are float32, so that is to the bit or nearly so."""
    a, b = load_file(one / "patterns.safetensors"), load_file(other / "patterns.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].double() - b[name].double()).norm() <= 1e-9 * a[name].double().norm(), name


def until(holds: Callable[[], object]) -> None:
    """Wait for something to come to hold."""
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)
