"""The probe that runs on every node of a cluster and reports facts about the node.

It is sent by value, because a node may lack this program. So it imports this program inside functions only, and its
results are plain Python values.
"""

import io
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
RAYS_LIMIT = 0.95  # Ray's default limit of disk and memory usage
READERS = 8  # number of shards that are opened at once
READ_FOR, CHUNK = 5.0, 1 << 20  # seconds of the measurement of the read rate; bytes per read
DECODE_FOR = 0.5  # seconds of CPU time for the measurement of the decoding rate
WRITTEN = 1 << 20  # bytes of the file that tests writing

Facts = dict[str, Any]


def probe(shards: Sequence[str], out: str | None, mark: str) -> Facts:
    """Return facts about this node and what it can reach.

    Args:
        shards: Shards to read.
        out: Folder to write to; None to skip it.
        mark: Name of a file that the driver has written into `out`.

    Returns:
        Each fact by name; None if it could not be determined. `errors` holds the reasons by name.
    """
    facts: Facts = {"errors": {}}
    questions: dict[str, Callable[[], Any]] = {
        "host": platform.node,
        "python": platform.python_version,
        "packages": versions,
        "code": code,
        "memory": memory,
        "disks": lambda: {folder: disk(folder) for folder in (session_folder(), *local_folders(out))},
        "limits": limits,
        "gpus": gpus,
        "unreadable": lambda: unreadable(shards),
        "speed": lambda: speed(shards[0]) if shards else None,
        "decoding": decoding,
        "written": lambda: write(out, mark) if out else None,
        "time": time.time,  # last, because the caller compares it with the time of the answer
    }
    for name, find in questions.items():
        try:
            facts[name] = find()
        except Exception as error:  # each fact may fail in its own way, and the others are still useful
            facts[name] = None
            facts["errors"][name] = reason(error)
    return facts


def versions() -> dict[str, str]:
    """Return the versions of the installed packages of `PACKAGES`."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def code() -> str | None:
    """Return a digest of this program's code, which can differ under one version; None if it is not installed."""
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
    """Return total and used bytes of memory as Ray counts them, of the container if there is one."""
    from ray._common.utils import get_system_memory
    from ray._private.utils import get_used_memory

    return int(get_system_memory()), int(get_used_memory())


def session_folder() -> str:
    """Return the folder that Ray writes to on this node."""
    import ray

    node = ray._private.worker._global_node
    return str(node.get_session_dir_path()) if node else tempfile.gettempdir()


def local_folders(out: str | None) -> list[str]:
    """Return the folder as a list if it is on a file system of this node."""
    return [out] if out and "://" not in out else []


def disk(folder: str) -> tuple[int, int]:
    """Return total and free bytes of the disk that holds a folder."""
    path = Path(folder)
    while not path.exists():
        path = path.parent
    usage = shutil.disk_usage(path)
    return usage.total, usage.free


def limits() -> tuple[float, float]:
    """Return the usage of a disk at which Ray starts nothing, and of memory at which it kills workers, in [0, 1]."""
    names = "RAY_local_fs_capacity_threshold", "RAY_memory_usage_threshold"
    disk, memory = (float(os.environ.get(name, RAYS_LIMIT)) for name in names)
    return disk, memory


def gpus() -> list[tuple[str, int, int]]:
    """Return name, total bytes and free bytes of each GPU, after a small computation on it."""
    import torch

    found = []
    for number in range(torch.cuda.device_count()):
        torch.ones(8, 8, device=f"cuda:{number}").mm(torch.ones(8, 8, device=f"cuda:{number}")).sum().item()
        free, total = torch.cuda.mem_get_info(number)
        found.append((torch.cuda.get_device_name(number), total, free))
    return found


def unreadable(shards: Sequence[str]) -> dict[str, str]:
    """Return for each shard whose first sample cannot be read the reason."""
    with ThreadPoolExecutor(READERS) as pool:
        return {shard: why for shard, why in zip(shards, pool.map(why_unreadable, shards)) if why}


def why_unreadable(shard: str) -> str:
    """Return the reason why the first sample of a shard cannot be read; empty if it can."""
    from ray_jobs.data.byte_streams import open_stream
    from ray_jobs.data.parquet_reader import is_parquet
    from ray_jobs.data.references import split_shard
    from ray_jobs.data.shard_reader import read_shard
    from ray_jobs.io.file_systems import is_url

    try:
        if is_parquet(shard) and is_url(shard):  # its first sample would need a copy of the whole file
            with closing(open_stream(split_shard(shard)[0]).__enter__()) as stream:
                stream.read(CHUNK)
        else:
            with closing(read_shard(shard)) as samples:
                next(samples)
    except Exception as error:
        return reason(error)
    return ""


def reason(error: Exception) -> str:
    """Return the message of an error; of a UserError, only what is wrong."""
    return str(getattr(error, "what", None) or traceback.format_exception_only(error)[-1].strip())


def speed(shard: str) -> float:
    """Return the rate in bytes per second at which a shard is read from its source, measured for a few seconds."""
    from ray_jobs.data.byte_streams import open_source
    from ray_jobs.data.image_folders import SHARD

    if SHARD.fullmatch(shard):
        raise ValueError("a folder of images is not a single file")
    begun, size = time.monotonic(), 0
    with open_source(shard) as (stream, _):
        while time.monotonic() - begun < READ_FOR and (data := stream.read(CHUNK)):
            size += len(data)
    return size / (time.monotonic() - begun)


def decoding() -> float:
    """Return how many JPEGs of 500×375 one core decodes per second, from the CPU time that it takes."""
    import numpy as np
    import torch
    from PIL import Image

    from ray_jobs.config import Preprocessing
    from ray_jobs.data.image_decoding import decode_input

    buffer, half = io.BytesIO(), (0.5,) * 3
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (75, 100, 3), np.uint8))
    noise.resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "jpeg", quality=92)  # takes as long as photographs
    preprocessing = Preprocessing(image_size=224, resize=256, interpolation="bilinear", mean=half, std=half)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    decode_input({"jpg": buffer.getvalue()}, preprocessing)  # without the imports of the first time
    images, begun = 0, time.process_time()
    while time.process_time() - begun < DECODE_FOR:
        decode_input({"jpg": buffer.getvalue()}, preprocessing)
        images += 1
    torch.set_num_threads(threads)
    return images / (time.process_time() - begun)


def write(out: str, mark: str) -> int:
    """Write a file in the way of a job, read it back, and return its size in bytes."""
    from ray_jobs.io.object_store import locate, publish, remove

    folder, name, data = locate(out), f"doctor-{platform.node()}-{os.getpid()}", os.urandom(WRITTEN)
    if not (folder / mark).exists():
        raise OSError("the driver sees another folder under this name")
    try:
        with publish(folder) as here:
            (here / name).write_bytes(data)
        if (folder / name).read_bytes() != data:
            raise OSError("the file that was read back differs from the one that was written")
    finally:
        remove(folder / name)
    return len(data)
