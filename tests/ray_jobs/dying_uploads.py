"""Explains shards into an object store repeatedly; each time the job dies at another upload, and then it is resumed.

A program of its own, because it forks: `python -m tests.ray_jobs.dying_uploads CONFIG` with a JSON object that has
`model`, `shards`, `patterns`, `folder` and `step`: only every step-th death is tried. It prints a JSON object for each.
"""

import json
import os
import shutil
import sys
import time
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem

from ray_jobs.config import ExplainConfig, Resources
from ray_jobs.config.timing import Timing
from ray_jobs.io.object_store import locate
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.models import loading
from tests.ray_jobs.dying import DEAD, run_in_child
from tests.ray_jobs.test_uploads import make_config, read_files


class DyingStore(LocalFileSystem):
    """Objects at dying://…, files of a folder; an upload is slow, and ends this process before or after the object."""

    protocol = "dying"
    folder: ClassVar[str] = ""
    at: ClassVar[tuple[int, bool] | None] = None  # number of the upload, and whether the object exists
    count: ClassVar[int] = 0

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return str(path).replace("dying://", f"{cls.folder}/").rstrip("/")

    def put_file(self, local: str, path: str, *_: Any, **__: Any) -> None:
        """Upload a file; an object is complete or absent."""
        cls = type(self)
        of_shard = Path(path).name.startswith("train-")
        dies = of_shard and cls.at is not None and cls.at[0] == cls.count
        cls.count += of_shard
        time.sleep(0.05 * of_shard)  # in which the next shard is explained
        if dies and cls.at is not None and not cls.at[1]:
            os._exit(DEAD)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(local, f"{path}.upload")
        Path(f"{path}.upload").replace(path)
        if dies:
            os._exit(DEAD)


def explain_and_die(config: ExplainConfig, at: tuple[int, bool] | None) -> int:
    """Run the job, and die at an upload; return the number of uploads of shards."""
    DyingStore.at = at
    explain(config, Resources(workers=0, timing=Timing(heartbeat_interval=3600.0)))
    return DyingStore.count


def list_finished(files: dict[str, bytes]) -> dict[str, str]:
    """Return the files of the shards that have a table of rows, in hexadecimal digits."""
    rows = {name.partition(".")[0] for name in files if name.count(".") == 1 and name.endswith(".parquet")}
    return {name: data.hex() for name, data in files.items() if name.partition(".")[0] in rows}


def main() -> None:
    arguments = json.loads(sys.argv[1])
    fsspec.register_implementation("dying", DyingStore, clobber=True)
    DyingStore.folder = arguments["folder"]
    out = "dying://bucket/run"
    config = make_config(arguments["model"], arguments["shards"], arguments["patterns"], out)
    torch.set_num_threads(1)  # a forked process has no other threads
    loaded = loading.load(config.model)
    loading.load = lambda *_: loaded  # type: ignore[assignment]
    uploads = product(range(3 * len(config.shards)), (False, True))
    for at in islice(uploads, 0, None, arguments["step"]):
        died, _ = run_in_child(partial(explain_and_die, config, at))
        finished = list_finished(read_files(locate(out)))
        resumed, _ = run_in_child(partial(explain_and_die, config, None))
        after = {name: data.hex() for name, data in read_files(locate(out)).items()}
        shutil.rmtree(Path(DyingStore.folder) / "bucket")
        print(json.dumps({"at": at, "died": died, "finished": finished, "resumed": resumed, "after": after}))


if __name__ == "__main__":
    main()
