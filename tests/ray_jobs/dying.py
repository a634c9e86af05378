"""Runs a fit repeatedly; each time it dies at another of its file operations, and then it is resumed to its end.

A program of its own, because it forks: `python -m tests.ray_jobs.dying CONFIG` with a JSON object that has `model`,
`shards` and `folder`. It prints one JSON object for each death. Of the jobs, only two things are replaced, to make the
trials fast and independent of the clock: the model is traced once, and even a few partial moments are merged.
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
from ray_jobs.config.timing import Timing
from ray_jobs.jobs import moments_job
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.models import loading
from tests.ray_jobs.runs import PREPROCESSING

DEAD = 77
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.copyfile"}


class Dying:
    """An audit hook that ends the process, as a lost machine would, at an operation that changes a folder.

    Args:
        folder: The folder.
        at: Number of the operation; None: the process lives.
        torn: Only operations that give a file its name are counted, and half of the file has not reached the disk.
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
                self.at = None  # truncating the file is no operation of the fit
                os.truncate(path, os.path.getsize(path) // 2)  # noqa: PTH202
                self.at = at
            os._exit(DEAD)


def run_in_child(function: Callable[[], Any]) -> tuple[int, Any]:
    """Call a function in a process of its own, and return the exit status and the result."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        torch.set_num_threads(1)  # makes torch's thread pool again; two threads at once would end in an abort
        status = 1
        with contextlib.suppress(BaseException), open(write, "w") as out:
            json.dump(function(), out)
            status = 0
        os._exit(status)
    os.close(write)
    with open(read) as pipe:
        output = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), json.loads(output) if output else None


def fit_and_die(config: FitConfig, at: int | None, torn: bool) -> list[str]:
    """Run the fit, and die at an operation; return all its operations if `at` is None."""
    dying = Dying(Path(config.out), at, torn)
    sys.addaudithook(dying)
    fit(config, Resources(workers=0, max_loss=0.0, timing=Timing(heartbeat_interval=3600.0)))
    return dying.seen


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the largest relative difference between two runs' tensors; infinite if their names differ."""
    if one.keys() != other.keys():
        return float("inf")
    return max(float((one[name] - other[name]).norm() / one[name].norm()) for name in one)


def describe_run(folder: Path, reference: dict[str, Tensor]) -> dict[str, Any]:
    """Return what a finished run holds."""
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
    arguments = json.loads(sys.argv[1])
    folder = Path(arguments["folder"])
    # In float64, because rounding to float32 could hide a difference.
    config = FitConfig(
        model=ModelConfig(spec=arguments["model"], precision="float64", **PREPROCESSING),
        shards=tuple(arguments["shards"]),
        out=str(folder),
    )
    torch.set_num_threads(1)  # a forked process has no other threads
    loaded = loading.load(config.model)
    loading.load = lambda *_: loaded  # type: ignore[assignment]
    moments_job.MAX_FILES = moments_job.MERGED_AT_ONCE = 2  # type: ignore[misc]
    # Every trial does the same operations, whatever the clock says.
    moments_job.FLUSH_SHARE = 0  # type: ignore[misc]
    for torn in (False, True):
        status, operations = run_in_child(lambda torn=torn: fit_and_die(config, None, torn))
        assert status == 0
        reference = load_file(folder / "patterns.safetensors")
        for at, operation in enumerate(operations):
            shutil.rmtree(folder)
            died, _ = run_in_child(lambda at=at, torn=torn: fit_and_die(config, at, torn))
            resumed, _ = run_in_child(lambda torn=torn: fit_and_die(config, None, torn))
            after = describe_run(folder, reference) if resumed == 0 else {}
            print(json.dumps({"torn": torn, "at": operation, "died": died, "resumed": resumed, "after": after}))
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
