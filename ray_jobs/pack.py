"""A folder of images → WebDataset shards."""

import io
import random
from pathlib import Path
from zlib import crc32

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as T
from webdataset import TarWriter

from patterns import UserError
from patterns.storage import write_aside, write_json
from ray_jobs.decode import upright
from ray_jobs.folders import key_of, numbered
from ray_jobs.samples import IMAGES, SampleError

JPEG_QUALITY = 95


def pack(images: Path, out: Path, per_shard: int = 1000, crops: int = 0, size: int = 256, seed: int = 0) -> list[Path]:
    """Write a folder of class folders (torchvision's ImageFolder layout) as shards; gives their paths.

    A class folder whose name is a number is that class, as the model numbers it; other folders are
    numbered in the order of their names, written to `classes.json`. Images lie in a seeded random order.
    `crops`: in place of each image as it is, so many random crops and flips of it, `size` pixels wide.
    """
    classes = class_numbers(images)
    files = [
        (folder, file)
        for folder in classes
        for file in sorted((images / folder).rglob("*"))
        if file.suffix[1:].lower() in IMAGES
    ]
    if not files:
        remedy = f"Put images ({', '.join(IMAGES)}) into one folder for each class."
        raise UserError(str(images), "no images in class folders", remedy)
    rng = random.Random(seed)
    rng.shuffle(files)
    samples = [(folder, file, crop) for folder, file in files for crop in range(crops or 1)]
    rng.shuffle(samples)
    shards = []
    for number, first in enumerate(range(0, len(samples), per_shard)):
        path = out / f"{number:06d}.tar"

        def write(aside: Path, chosen: list[tuple[str, Path, int]] = samples[first : first + per_shard]) -> None:
            with open(aside, "wb") as file:
                tar = TarWriter(file, encoder=False, mtime=0)
                for folder, image, crop in chosen:
                    key = key_of(image.relative_to(images).as_posix())
                    cls = str(classes[folder]).encode()
                    if crops:
                        tar.write(
                            {"__key__": f"{key}-{crop}", "jpg": random_crop(image, size, seed + crop), "cls": cls}
                        )
                    else:
                        tar.write({"__key__": key, image.suffix[1:].lower(): image.read_bytes(), "cls": cls})
                tar.close()

        write_aside(path, write)
        shards.append(path)
    write_json(out / "classes.json", {str(number): folder for folder, number in classes.items()})
    return shards


def class_numbers(images: Path) -> dict[str, int]:
    """The class folders of a folder, and their numbers."""
    if not images.is_dir():
        raise UserError(str(images), "no such folder", "Name a folder that holds one folder for each class.")
    return numbered(f.name for f in images.iterdir() if f.is_dir() and not f.name.startswith("."))


def random_crop(file: Path, size: int, seed: int) -> bytes:
    """A random crop of an image, flipped or not, as JPEG; the same for the same file name and seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(crc32(f"{file.name}/{seed}".encode()))
        image = opened(file)
        crop = RandomResizedCrop.get_params(image, [0.25, 1.0], [3 / 4, 4 / 3])
        image = T.resized_crop(image, *crop, [size, size], InterpolationMode.BICUBIC)
        if torch.rand(()) < 0.5:
            image = T.hflip(image)
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=JPEG_QUALITY)
    return buffer.getvalue()


def opened(file: Path) -> Image.Image:
    try:
        return upright(file.read_bytes(), "RGB").image()
    except (OSError, SampleError) as error:
        raise UserError(str(file), f"cannot be read as an image ({error})", "Delete or replace it.") from error
