"""Photographs of packages, in three disjoint sets, and random crops of them."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms import CenterCrop, RandomResizedCrop, Resize
from torchvision.transforms.functional import pil_to_tensor

from patterns import UserError
from ray_jobs.config import Preprocessing
from ray_jobs.data.packing import open_image

OPENCV, MATE = Path("/usr/share/doc/opencv-doc"), Path("/usr/share/backgrounds/mate/nature")
SMALLER_EDGE = 512  # pixels; larger photographs are reduced first
# Photographs in color without drawings, one of each scene.
NAMES = {
    OPENCV / "examples/data": (
        "aero1 aloeL apple baboon board building butterfly fruits home left leuvenA messi5 orange squirrel_cls stuff"
    ),
    OPENCV / "examples/text": "scenetext01 scenetext02 scenetext03 scenetext04 scenetext05 scenetext06",
    OPENCV / "examples/alphamat/input_images": "plant",
    OPENCV / "examples/hfs/data": "000 001 002",
    OPENCV / "opencv4/html": (
        "227943776_1 Background_Subtraction_Tutorial_frame Histogram_Calculation_Original_Image "
        "Morphology_1_Tutorial_Original_Image astra_color bicubicOutput detect_test1 detect_test2 feature_building "
        "fusion_mertens handSrc pexels_double_decker_bus retina_TreeHdr_small space_shuttle studentsSample_input"
    ),
    MATE: (
        "Aqua Blinds Dune FreshFlower Garden GreenMeadow LadyBird RainDrops Storm TwoWings Wood YellowFlower"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Photographs:
    """Three disjoint sets of photographs: the files of each.

    Attributes:
        fitted: For the patterns.
        regressed: For v.
        evaluated: For ρ, and for the maps.
    """

    fitted: Sequence[Path]
    regressed: Sequence[Path]
    evaluated: Sequence[Path]


def find_photographs() -> list[Path]:
    """Return the files of all photographs, in a fixed order.

    Raises:
        UserError: If a package is missing.
    """
    found = sorted(Path(str(files("foolbox"))).glob("data/imagenet_*.jpg"))
    for folder, names in NAMES.items():
        for name in names.split():
            path = folder / f"{name}.jpg"
            if not path.exists():
                raise UserError(str(path), "no such photograph", "Run apt-get install opencv-doc mate-backgrounds.")
            found.append(path)
    return found


def split_photographs(paths: Sequence[Path], seed: int = 0) -> Photographs:
    """Split photographs at random: 2/7 for the patterns, 3/7 for v, and the rest for ρ.

    v has the largest set, because its regression has as many unknowns as a neuron has inputs.
    """
    shuffled = random.Random(seed).sample(list(paths), len(paths))
    first, second = 2 * len(paths) // 7, 5 * len(paths) // 7
    return Photographs(shuffled[:first], shuffled[first:second], shuffled[second:])


def draw_crops(paths: Sequence[Path], count: int, preprocessing: Preprocessing, seed: int = 0) -> Iterator[Tensor]:
    """Yield for each photograph a batch of `count` normalized random crops of it, shape (count, 3, size, size)."""
    crop = RandomResizedCrop(preprocessing.image_size, (0.3, 1.0), antialias=True)
    for path in paths:
        image = load_image(path)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random.Random(f"{seed}/{path.name}").getrandbits(62))
            crops = torch.stack([crop(image) for _ in range(count)])
        yield normalize(crops, preprocessing)


def load_whole(path: Path, preprocessing: Preprocessing) -> Tensor:
    """Return the normalized central square of a photograph, shape (3, size, size)."""
    size = preprocessing.image_size
    return normalize(CenterCrop(size)(Resize(size, antialias=True)(load_image(path))), preprocessing)


def load_image(path: Path) -> Tensor:
    """Return a photograph, float32 (3, H, W) in [0, 1], reduced to a smaller edge of at most SMALLER_EDGE pixels."""
    image = open_image(path)
    image.thumbnail((10**6, 10**6) if min(image.size) <= SMALLER_EDGE else reduced_size(image.size))
    return pil_to_tensor(image).float() / 255


def reduced_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return the size in which the smaller edge has SMALLER_EDGE pixels."""
    factor = SMALLER_EDGE / min(size)
    return round(size[0] * factor), round(size[1] * factor)


def normalize(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return images (…, 3, H, W) in [0, 1] as the model takes them."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return (images - mean) / std


def denormalize(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return the inputs of a model as images in [0, 1]; the inverse of `normalize`."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return (images * std + mean).clamp(0, 1)
