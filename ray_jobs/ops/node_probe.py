"""What a node of the cluster finds out about itself. Sent there by value: it must run where this program is missing.

So nothing of this program is imported but inside functions, and what is found are values of Python alone.
"""

import os
import platform
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from hashlib import sha256
from importlib import metadata, util
from pathlib import Path
from typing import Any

PACKAGES = "patternnet-ray", "torch", "torchvision", "ray", "webdataset", "pyarrow", "numpy"
PROGRAM = "patterns", "ray_jobs"
RAYS_LIMIT = 0.95  # unless it was started with another
READERS = 8  # shards that are opened at once
READ_FOR, CHUNK = 5.0, 1 << 20  # seconds for which a shard is read to see how fast; bytes at a time
WRITTEN = 1 << 20  # bytes written where the job will write

Facts = dict[str, Any]


def look(shards: Sequence[str], out: str | None, mark: str) -> Facts:
    """Everything about this node and what it can reach; `errors` is what went wrong, by what was looked at.

    mark: the name of a file that the driver has put into `out`.
    """
    facts: Facts = {"errors": {}}
    looks: dict[str, Callable[[], Any]] = {
        "host": platform.node,
        "python": platform.python_version,
        "packages": versions,
        "code": code,
        "memory": memory,
        "disks": lambda: {place: disk(place) for place in (session_folder(), *local(out))},
        "limits": limits,
        "gpus": gpus,
        "unreadable": lambda: unreadable(shards),
        "speed": lambda: speed(shards[0]) if shards else None,
        "written": lambda: write(out, mark) if out else None,
        "time": time.time,  # last, for the caller knows when it has the answer
    }
    for name, find in looks.items():
        try:
            facts[name] = find()
        except Exception as error:  # each of them may fail in ways of its own, and the others are still of use
            facts[name] = None
            facts["errors"][name] = reason(error)
    return facts


def versions() -> dict[str, str]:
    """The version of each of PACKAGES that is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def code() -> str | None:
    """A digest of this program's code, which may differ under the same version; None where there is none."""
    digest = sha256()
    for name in PROGRAM:
        spec = util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            return None
        folder = Path(spec.submodule_search_locations[0])
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def memory() -> tuple[int, int]:
    """Bytes of memory in all and in use, of the container where there is one, as Ray sees them."""
    from ray._common.utils import get_system_memory
    from ray._private.utils import get_used_memory

    return int(get_system_memory()), int(get_used_memory())


def session_folder() -> str:
    """Where Ray writes on this node."""
    import ray

    node = ray._private.worker._global_node
    return str(node.get_session_dir_path()) if node else tempfile.gettempdir()


def local(out: str | None) -> list[str]:
    return [out] if out and "://" not in out else []


def disk(place: str) -> tuple[int, int]:
    """Bytes of the disk that holds a folder in all, and free of them for us."""
    path = Path(place)
    while not path.exists():
        path = path.parent
    usage = shutil.disk_usage(path)
    return usage.total, usage.free


def limits() -> tuple[float, float]:
    """The share of a disk beyond which Ray starts nothing here, and of memory beyond which it kills workers."""
    names = "RAY_local_fs_capacity_threshold", "RAY_memory_usage_threshold"
    disk, memory = (float(os.environ.get(name, RAYS_LIMIT)) for name in names)
    return disk, memory


def gpus() -> list[tuple[str, int, int]]:
    """Each GPU that torch reaches: its name, and bytes of its memory in all and free."""
    import torch

    found = []
    for number in range(torch.cuda.device_count()):
        torch.ones(8, 8, device=f"cuda:{number}").mm(torch.ones(8, 8, device=f"cuda:{number}")).sum().item()
        free, total = torch.cuda.mem_get_info(number)
        found.append((torch.cuda.get_device_name(number), total, free))
    return found


def unreadable(shards: Sequence[str]) -> dict[str, str]:
    """Why, for each shard whose first sample cannot be read."""
    with ThreadPoolExecutor(READERS) as pool:
        return {shard: why for shard, why in zip(shards, pool.map(why_unreadable, shards)) if why}


def why_unreadable(shard: str) -> str:
    from ray_jobs.data.byte_streams import opened
    from ray_jobs.data.parquet_reader import is_table
    from ray_jobs.data.shard_reader import read_shard
    from ray_jobs.io.file_systems import is_url

    try:
        if is_table(shard) and is_url(shard):  # it would be copied whole for its first sample
            with closing(opened(shard).__enter__()) as stream:
                stream.read(CHUNK)
        else:
            with closing(read_shard(shard)) as samples:
                next(samples)
    except Exception as error:
        return reason(error)
    return ""


def reason(error: Exception) -> str:
    """What is wrong, of this program's errors without where and what to do, for that is said otherwise here."""
    return str(getattr(error, "what", None) or traceback.format_exception_only(error)[-1].strip())


def speed(shard: str) -> float:
    """Bytes a second of a shard read from its source, for some seconds at most."""
    from ray_jobs.data.byte_streams import source
    from ray_jobs.data.image_folders import SHARD

    if SHARD.fullmatch(shard):
        raise ValueError("a folder of images is no single file")
    begun, size = time.monotonic(), 0
    with source(shard) as (stream, _):
        while time.monotonic() - begun < READ_FOR and (data := stream.read(CHUNK)):
            size += len(data)
    return size / (time.monotonic() - begun)


def write(out: str, mark: str) -> int:
    """Write a file where the job will, as the job does, and read it back; gives its size."""
    from ray_jobs.io.object_store import located, published, remove

    folder, name, data = located(out), f"doctor-{platform.node()}-{os.getpid()}", os.urandom(WRITTEN)
    if not (folder / mark).exists():
        raise OSError("it is not the folder that the driver sees under this name")
    try:
        with published(folder) as here:
            (here / name).write_bytes(data)
        if (folder / name).read_bytes() != data:
            raise OSError("what is read back is not what was written")
    finally:
        remove(folder / name)
    return len(data)
