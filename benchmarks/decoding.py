"""The input pipeline on one core, compared with a common pipeline of other libraries, and JPEG decoders.

If NVIDIA's DALI is installed (`pip install nvidia-dali-cuda120`, 400 MB), it is measured too, on the CPU.
"""

import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
import torch
import webdataset
from PIL import Image
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode

from benchmarks.timing import SIZE, Bench, Row, photographs, write_photographs
from ray_jobs.config import Preprocessing
from ray_jobs.data.shard_reader import ReaderConfig, ShardReader
from ray_jobs.models.loading import IMAGENET

BATCH, DALI_BATCH = 32, 30
RGB = ImageReadMode.RGB
SIZES = {"500×375": (500, 375), "2000×1500": (2000, 1500)}


def measure_pipelines(bench: Bench) -> Iterator[Row]:
    """From shards to batches: this project, and WebDataset with Pillow and torchvision's transforms."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        for size, pixels in SIZES.items():
            shard = write_photographs(Path(folder) / f"{size}.tar", *pixels)
            for interpolation in ("bilinear", "bicubic"):
                ways: dict[str, Callable[[], object]] = {
                    "ours": partial(read_with_ours, shard, interpolation),
                    "plain": partial(read_with_webdataset, shard, interpolation),
                }
                if find_spec("nvidia") and find_spec("nvidia.dali"):
                    ways["DALI"] = make_dali_reader(shard, interpolation)
                t = bench.timed(ways, measured=False)
                what = f"JPEGs of {size} → {SIZE}×{SIZE}, {interpolation}, one core: images/s"
                target = "≥ 2" if interpolation == "bilinear" else ""
                yield bench.row(what, t["plain"], "WebDataset, Pillow, torchvision's transforms", t["ours"], target)
                if "DALI" in t:
                    yield bench.row(what, t["DALI"], "DALI", t["ours"])
        yield from measure_decoders(bench)
    torch.set_num_threads(threads)


def read_with_ours(shard: str, interpolation: str) -> int:
    """Read a shard with this project; return the number of images."""
    preprocessing = Preprocessing(
        image_size=SIZE, resize=256, interpolation=interpolation, mean=IMAGENET.mean, std=IMAGENET.std
    )
    return sum(len(batch.keys) for batch in ShardReader(shard, ReaderConfig(preprocessing, BATCH)))


def read_with_webdataset(shard: str, interpolation: str) -> int:
    """Read a shard with WebDataset, Pillow and torchvision; return the number of images."""
    transform = transforms.Compose(
        [
            transforms.Resize(256, InterpolationMode(interpolation)),
            transforms.CenterCrop(SIZE),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET.mean, IMAGENET.std),
        ]
    )
    samples = webdataset.WebDataset(shard, shardshuffle=False).decode("pilrgb").to_tuple("jpg", "cls")
    return sum(len(images) for images, _ in samples.map_tuple(transform, int).batched(BATCH))


def make_dali_reader(shard: str, interpolation: str) -> Callable[[], int]:
    """Return a function that reads the shard with DALI; the shard is a whole number of batches."""
    from nvidia.dali import fn, pipeline_def, types

    def scaled(values: Sequence[float]) -> list[float]:
        return [255 * value for value in values]

    @pipeline_def(batch_size=DALI_BATCH, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def pipeline() -> object:
        jpegs, _ = fn.readers.webdataset(paths=[shard], ext=["jpg", "cls"], name="shard")
        images = fn.decoders.image(jpegs, output_type=types.RGB)
        filter_type = types.INTERP_TRIANGULAR if interpolation == "bilinear" else types.INTERP_CUBIC
        resized = fn.resize(images, resize_shorter=256, interp_type=filter_type, antialias=True)
        numbers = {"mean": scaled(IMAGENET.mean), "std": scaled(IMAGENET.std)}
        return fn.crop_mirror_normalize(resized, crop=(SIZE, SIZE), dtype=types.FLOAT, **numbers)

    made = pipeline()
    made.build()
    batches, rest = divmod(made.epoch_size("shard"), DALI_BATCH)
    assert rest == 0
    return lambda: sum(len(made.run()[0]) for _ in range(batches))


def decode_all(decode: Callable[[bytes], object], images: list[bytes]) -> None:
    """Decode all images."""
    for data in images:
        decode(data)


def measure_decoders(bench: Bench) -> Iterator[Row]:
    """Decode one JPEG after the other at full size."""
    images = []
    for photograph in photographs():
        buffer = io.BytesIO()
        photograph.resize((500, 375)).save(buffer, "jpeg", quality=92)
        images.append(buffer.getvalue())
    ways: dict[str, Callable[[bytes], object]] = {
        "simplejpeg": lambda data: simplejpeg.decode_jpeg(data, "RGB"),
        "torchvision": lambda data: decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), RGB),
        "OpenCV": lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB),
        "Pillow": lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")),
    }
    t = bench.timed({name: partial(decode_all, decode, images) for name, decode in ways.items()}, measured=False)
    for name in list(ways)[1:]:
        yield bench.row(f"decoding a JPEG of 500×375 by {name}", t[name], "simplejpeg (what we use)", t["simplejpeg"])
