"""Runs a fit again and again, each time dying at another of its file operations, and then to its end.

A program of its own, since it forks: `python -m tests.ray_jobs.dying CONFIG`, CONFIG being JSON with `model`, `shards`
and `folder`. Prints one JSON object for each way to die. Nothing of the jobs is replaced but what would make the trials
slow, or depend on a clock: the model is traced once, and parts are merged although they are few.
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ray_jobs.config import FitConfig, ModelConfig, Resources
from ray_jobs.jobs import moments_job
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.models import loading
from ray_jobs.runs import lease
from tests.ray_jobs.runs import PREPARED

DEAD = 77
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.copyfile"}


class Dying:
    """An audit hook that ends the process, as a lost machine would, at the n-th operation that changes a folder.

    torn: only where a file gets its name, and half of what was written had not reached the disk.
    """

    def __init__(self, folder: Path, at: int | None, torn: bool) -> None:
        self.folder, self.at, self.torn, self.seen = str(folder), at, torn, list[str]()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not arguments or not str(arguments[0]).startswith(self.folder):
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (not writes and event not in CHANGES) or (self.torn and event != "os.rename"):
            return
        self.seen.append(f"{event} {Path(arguments[0]).name}")
        if len(self.seen) - 1 == self.at:
            if self.torn:
                at, path = self.at, arguments[0]
                self.at = None  # cutting the file is no operation of the fit
                os.truncate(path, os.path.getsize(path) // 2)  # noqa: PTH202
                self.at = at
            os._exit(DEAD)


def in_child(run: Callable[[], Any]) -> tuple[int, Any]:
    """Call a function in a process of its own: its exit status, and what it gave."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        status = 1
        with contextlib.suppress(BaseException), open(write, "w") as out:
            json.dump(run(), out)
            status = 0
        os._exit(status)
    os.close(write)
    with open(read) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), json.loads(said) if said else None


def trial(config: FitConfig, at: int | None, torn: bool) -> list[str]:
    """Run the fit, dying on the way where that is wanted; gives its operations if it lives."""
    dying = Dying(Path(config.out), at, torn)
    sys.addaudithook(dying)
    fit(config, Resources(workers=0, max_loss=0.0))
    return dying.seen


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest relative difference between two runs' tensors; infinite where they have not the same."""
    if one.keys() != other.keys():
        return float("inf")
    return max(float((one[name] - other[name]).norm() / one[name].norm()) for name in one)


def state(folder: Path, reference: dict[str, Tensor]) -> dict[str, Any]:
    """What a finished run holds."""
    manifest = json.loads((folder / "manifest.json").read_text())["fit"]
    return {
        "differs": difference(reference, load_file(folder / "patterns.safetensors")),
        "samples": manifest["samples"],
        "refused": manifest["refused"],
        "parts": len(list((folder / "moments").glob("part-*.safetensors"))),
        "ledger": json.loads((folder / "moments" / "ledger.json").read_text())["parts"],
        "files": sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.name.startswith("part-")),
        "tables": len(list((folder / "moments").glob("part-*.refused.parquet"))),
    }


def main() -> None:
    told = json.loads(sys.argv[1])
    folder = Path(told["folder"])
    # In float64, so that patterns that were rounded to float32 hide nothing.
    config = FitConfig(
        model=ModelConfig(spec=told["model"], precision="float64", **PREPARED),
        shards=tuple(told["shards"]),
        out=str(folder),
    )
    torch.set_num_threads(1)  # a fork has no other threads
    loaded = loading.load(config.model)
    loading.load = lambda *_: loaded  # type: ignore[assignment]
    moments_job.MAX_FILES = moments_job.MERGED_AT_ONCE = 2  # type: ignore[misc]
    # Nothing by the clock: every trial does the same operations.
    lease.BEAT_EVERY = 3600.0  # type: ignore[misc]
    moments_job.FLUSH_SHARE = 0  # type: ignore[misc]
    for torn in (False, True):
        status, operations = in_child(lambda torn=torn: trial(config, None, torn))
        assert status == 0
        reference = load_file(folder / "patterns.safetensors")
        for at, operation in enumerate(operations):
            shutil.rmtree(folder)
            died, _ = in_child(lambda at=at, torn=torn: trial(config, at, torn))
            resumed, _ = in_child(lambda torn=torn: trial(config, None, torn))
            after = state(folder, reference) if resumed == 0 else {}
            print(json.dumps({"torn": torn, "at": operation, "died": died, "resumed": resumed, "after": after}))
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
