"""Packing: write a folder of images as WebDataset shards."""

import io
import os
import random
from pathlib import Path
from zlib import crc32

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as T
from webdataset import TarWriter

from patterns import UserError
from patterns.io import write_atomically, write_json
from ray_jobs.data.image_decoding import decode_upright, list_formats
from ray_jobs.data.image_folders import find_file_problem, list_local_images, make_keys
from ray_jobs.data.labels import number_classes
from ray_jobs.data.samples import IMAGES, TENSOR, UNREAD_IMAGES, explain_unread_format, extension_of
from ray_jobs.data.selection import read_keys
from ray_jobs.io.object_store import locate, publish

JPEG_QUALITY = 95


def pack(
    images: Path,
    out: Path,
    per_shard: int = 1000,
    crops: int = 0,
    size: int = 256,
    seed: int = 0,
    keys: str | None = None,
    without_keys: str | None = None,
) -> list[Path]:
    """Write a folder of class folders (torchvision's ImageFolder layout) as shards, in a seeded random order.

    A class folder whose name is a number is that class of the model. Other folders are numbered in the order of their
    names. The names are written to `classes.json`.

    Args:
        images: The folder of class folders. Hidden files and folders are left out.
        out: The folder for the shards.
        per_shard: Number of samples of a shard.
        crops: Number of random crops and flips to write of each image; 0 writes the images themselves.
        size: Height and width of a crop in pixels.
        seed: Seed of the order and the crops.
        keys: A list of the images to pack, as `select` writes it; its shards are ignored. None: all.
        without_keys: A list of images to leave out, in the same format. None: no image is left out.

    Returns:
        The paths of the shards.

    Raises:
        UserError: If there are no images, an image cannot be read, or the shards cannot be written.
    """
    names = choose_images(list_images(images), keys, without_keys)
    found = list(names)
    if (target := out.resolve()).is_relative_to(source := images.resolve()):
        what = f"is inside the folder of images {source}, so that a later run would take it for a class"
        raise UserError(str(target), what, "Choose another folder.", "out")
    classes = number_classes(list_class_folders(images))
    validate_images(images, found, bool(crops))
    order = {name: number for number, name in enumerate(classes)}
    found.sort(key=lambda image: (order[image.partition("/")[0]], image.split("/")))
    rng = random.Random(seed)
    rng.shuffle(found)
    samples = [(image, crop) for image in found for crop in range(crops or 1)]
    rng.shuffle(samples)
    shards = []
    with publish(locate(out)) as folder:
        for number, first in enumerate(range(0, len(samples), per_shard)):

            def write(temporary: Path, chosen: list[tuple[str, int]] = samples[first : first + per_shard]) -> None:
                with open(temporary, "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
                    for image, crop in chosen:
                        key, cls = names[image], str(classes[image.partition("/")[0]]).encode()
                        if crops:
                            data = crop_randomly(images / image, size, seed + crop)
                            tar.write({"__key__": f"{key}-{crop}", "jpg": data, "cls": cls})
                        else:
                            tar.write({"__key__": key, extension_of(image): read_file(images / image), "cls": cls})

            write_atomically(folder / f"{number:06d}.tar", write)
            shards.append(out / f"{number:06d}.tar")
        write_json(folder / "classes.json", {str(number): name for name, number in classes.items()})
    return shards


def list_images(folder: Path) -> list[str]:
    """Return the paths of the images in class folders, sorted. Raise UserError if there are no images."""
    if not folder.is_dir():
        raise UserError(str(folder), "no such folder", "Pass a folder with one folder per class.")
    try:
        found, _ = list_local_images(str(folder))
    except OSError as error:
        raise UserError(str(error.filename), f"cannot be read ({error.strerror})", "Fix its permissions.") from error
    found = sorted(image for image in found if "/" in image and extension_of(image) != TENSOR)
    if not found:
        remedy = f"Put images ({', '.join(IMAGES)}) into one folder per class."
        raise UserError(str(folder), "no images in class folders", remedy)
    return found


def choose_images(images: list[str], keys: str | None, without_keys: str | None) -> dict[str, str]:
    """Return the images whose keys are in one list and not in another, with their keys among all images.

    Raises:
        UserError: If a list cannot be read, it names no image, or no image is left.
    """
    names = dict(zip(images, make_keys(images)))
    known = frozenset(names.values())
    for option, file in (("keys", keys), ("without_keys", without_keys)):
        if file is not None:
            listed = frozenset().union(*read_keys(file, option).values())
            if not listed & known:
                what = f"names none of the images, but {min(listed, default='no key')}"
                remedy = f"List keys like {min(known)}. Shards that were packed with `crops` have other keys."
                raise UserError(file, what, remedy, option)
            names = {image: key for image, key in names.items() if (key in listed) == (option == "keys")}
            if not names:
                raise UserError(file, "leaves no image to pack", "Choose another list.", option)
    return names


def list_class_folders(folder: Path) -> list[str]:
    """Return the names of the visible folders in a folder."""
    return [f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith(".")]


def validate_images(images: Path, found: list[str], crops: bool) -> None:
    """Raise UserError for the first image that cannot be packed, before anything is written."""
    for path, image in ((images / image, image) for image in found):
        problem = find_file_problem(str(path))
        if problem is None and not os.access(path, os.R_OK):
            problem = "its permissions do not allow to read it"
        if problem is None and crops and extension_of(image) in UNREAD_IMAGES:
            problem = explain_unread_format(extension_of(image))
        if problem is not None:
            raise UserError(str(path), f"cannot be packed ({problem})", "Delete or replace it.")


def read_file(file: Path) -> bytes:
    """Return the bytes of a file. Raise UserError if it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(str(file), f"cannot be read ({error.strerror or error})", "Delete or replace it.") from error


def crop_randomly(file: Path, size: int, seed: int) -> bytes:
    """Return a random crop of an image, randomly flipped, as JPEG. File name and seed determine it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(crc32(f"{file.name}/{seed}".encode("utf-8", "surrogateescape")))
        image = open_image(file)
        crop = RandomResizedCrop.get_params(image, [0.25, 1.0], [3 / 4, 4 / 3])
        image = T.resized_crop(image, *crop, [size, size], InterpolationMode.BICUBIC)
        if torch.rand(()) < 0.5:
            image = T.hflip(image)
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=JPEG_QUALITY)
    return buffer.getvalue()


def open_image(file: Path) -> Image.Image:
    """Return an image file as an upright RGB image. Raise UserError if it cannot be decoded."""
    try:
        return decode_upright(read_file(file), "RGB", formats=list_formats(file.name)).image()
    except UserError:
        raise
    except Exception as error:  # untrusted bytes make Pillow raise anything
        raise UserError(str(file), f"cannot be read as an image ({error})", "Delete or replace it.") from error
