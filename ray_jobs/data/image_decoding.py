"""Image decoding: from the files of a sample to the model's input, its label and its boxes.

The files are untrusted. Whatever bytes they hold, no error but SampleError is raised, and memory stays bounded.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from ray_jobs.config import Preprocessing
from ray_jobs.data.samples import (
    IMAGES,
    NAMED_FORMATS,
    TENSOR,
    UNREAD_IMAGES,
    SampleError,
    explain_unread_format,
    extension_of,
    find_image,
    find_tensor,
)

# Formats that Pillow recognizes by their content, whatever the file name.
FORMATS = ("JPEG", "PNG", "WEBP")
SIGNATURES = {
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\xff\x0a": "JPEG XL",
    b"<": "HTML, XML or SVG text",
    b"version https://git-lfs": "a Git LFS pointer",
}
MAX_PIXELS = 89_478_485  # before and after resizing; Pillow's own limit for a warning, 256 MiB of RGB

# EXIF orientations: whether to transpose, and the axes to flip afterwards.
ORIENTATIONS = {
    2: (False, (2,)),
    3: (False, (1, 2)),
    4: (False, (1,)),
    5: (True, ()),
    6: (True, (2,)),
    7: (True, (1, 2)),
    8: (True, (1,)),
}
# A JPEG is decoded at reduced size if its shorter side keeps this many pixels for each pixel of the resized image.
MIN_OVERSAMPLING = 2
# Pillow's filters by torchvision's names of the interpolations that torch does not compute in the same way.
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "nearest-exact": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}
JPEG_DIVISORS = (8, 4, 2)  # of its sides, which libjpeg-turbo computes fast


@dataclass(frozen=True)
class Picture:
    """An upright image.

    Attributes:
        pixels: uint8, shape (1 or 3, H, W), possibly at reduced size.
        size: Its full height and width.
    """

    pixels: Tensor
    size: tuple[int, int]

    def image(self) -> Image.Image:
        """Return the pixels as an image of Pillow."""
        return to_pillow(self.pixels)


def decode(files: Mapping[str, bytes], preprocessing: Preprocessing) -> Tensor:
    """Return the model's input for a sample.

    Args:
        files: The bytes of the sample's files by extension.
        preprocessing: How to resize, crop and normalize images.

    Returns:
        float32, shape (C, H, W). A ready tensor is returned as it is.

    Raises:
        SampleError: If the sample cannot be used.
    """
    return normalize_batch([decode_input(files, preprocessing)], preprocessing)[0]


def normalize_batch(images: Sequence[Tensor], preprocessing: Preprocessing) -> Tensor:
    """Normalize results of `decode_input` as one batch.

    A whole batch is normalized at once, because threads that each run many small operations wait for each other.

    Args:
        images: Images (uint8) and ready tensors (float32), shape (C, H, W); ready tensors do not change.
        preprocessing: The means and standard deviations.

    Returns:
        float32, shape (N, C, H, W).
    """
    batch = torch.empty(len(images), *preprocessing.input_shape)
    for target, image in zip(batch, images):
        target.copy_(image)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    pixels = torch.tensor([image.dtype == torch.uint8 for image in images]).view(-1, 1, 1, 1)
    # (x / 255 - mean) / std in two passes over the batch; ready tensors do not change.
    batch.mul_(torch.where(pixels, 1 / (255 * std), 1.0).float())
    return batch.sub_(torch.where(pixels, mean / std, 0.0).float())


def decode_input(files: Mapping[str, bytes], preprocessing: Preprocessing) -> Tensor:
    """Return the resized and cropped image of a sample, or its ready tensor.

    Args:
        files: The bytes of the sample's files by extension.
        preprocessing: How to resize and crop images.

    Returns:
        uint8 for an image, float32 for a ready tensor, shape (C, H, W).

    Raises:
        SampleError: If the sample cannot be used.
    """
    try:
        if image := find_image(files):
            channels = len(preprocessing.mean)
            if channels not in (1, 3):
                raise SampleError(f"an image has 1 or 3 channels, but the model takes {channels}")
            mode = "RGB" if channels == 3 else "L"
            picture = decode_upright(files[image], mode, MIN_OVERSAMPLING * preprocessing.resize, list_formats(image))
            return resize_and_crop(picture, preprocessing)
        if tensor := find_tensor(files):
            return parse_tensor(files[tensor], preprocessing)
    except SampleError:
        raise
    except Exception as error:  # untrusted bytes make Pillow and numpy raise anything, MemoryError too
        raise SampleError(f"{type(error).__name__}: {error}") from error
    raise SampleError(explain_missing_input(sorted(files)))


def explain_missing_input(files: Sequence[str]) -> str:
    """Return why a sample with these files has no input."""
    if unread := [file for file in files if extension_of(file) in UNREAD_IMAGES]:
        return explain_unread_format(extension_of(unread[0]))
    reason = (
        f"neither an image ({', '.join(IMAGES)}) nor a tensor ({TENSOR}); its files are {', '.join(files) or 'none'}"
    )
    if any(extension_of(file) in IMAGES for file in files):
        reason += "; WebDataset ends a key at the first dot of a file name: rename the files"
    return reason


def list_formats(name: str) -> tuple[str, ...]:
    """Return the formats that Pillow may decode in a file of this name."""
    named = NAMED_FORMATS.get(extension_of(name))
    return FORMATS if named is None else (*FORMATS, named)


def parse_tensor(data: bytes, preprocessing: Preprocessing) -> Tensor:
    """Return the tensor of an npy file. Its header is validated before memory of the claimed size is allocated."""
    file = io.BytesIO(data)
    shape, columns_first, dtype = parse_npy_header(file)
    if dtype.kind not in "biuf":
        raise SampleError(f"a tensor of type {dtype}, not of real numbers; pickled objects are not loaded")
    if shape != preprocessing.input_shape:
        raise SampleError(f"a tensor of shape {shape}, but the model takes {preprocessing.input_shape}")
    if (found := len(data) - file.tell()) < math.prod(shape) * dtype.itemsize:
        raise SampleError(f"a truncated tensor: {found} of {math.prod(shape) * dtype.itemsize} bytes")
    array = np.frombuffer(data, dtype, math.prod(shape), file.tell())
    array = array.reshape(shape, order="F" if columns_first else "C")
    with np.errstate(over="ignore"):  # reported below as not finite
        tensor = torch.from_numpy(array.astype(np.float32, order="C"))
    if not tensor.isfinite().all():
        raise SampleError("the tensor is not finite")
    return tensor


def parse_npy_header(file: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return the shape of an npy file's array, whether it is stored in Fortran order, and its type.

    Raises:
        SampleError: If the version of the format is not 1.0 or 2.0.
    """
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in header:
        raise SampleError(f"a tensor in npy format {version[0]}.{version[1]}; only 1.0 and 2.0 are read")
    return header[version](file)


def decode_upright(data: bytes, mode: str, min_side: int | None = None, formats: tuple[str, ...] = FORMATS) -> Picture:
    """Decode the first frame of an image file and apply its EXIF orientation.

    Transparency is dropped, as by torchvision and timm. The upper eight of 16 bits are used.

    Args:
        data: The bytes of the file.
        mode: Pillow's mode of the result, RGB or L.
        min_side: Pixels that suffice for the shorter side; None for all.
        formats: Pillow's names of the formats that may be decoded; the content decides between them.

    Returns:
        The picture, at full size or reduced to not less than `min_side`.

    Raises:
        SampleError: If the format is not one of `formats`, or the image has more than MAX_PIXELS pixels.
    """
    if not data:
        raise SampleError("an empty file")
    try:
        opened = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError as error:
        what = f"not an image in one of the formats {', '.join(formats)}, or truncated"
        guess = next((name for start, name in SIGNATURES.items() if data.startswith(start)), None)
        raise SampleError(f"{what}; the bytes look like {guess}" if guess else what) from error
    with opened:
        validate_size(opened)
        pixels = None
        if opened.format == "JPEG" and opened.mode in ("RGB", "L") and mode == "RGB":
            divisor = next((n for n in JPEG_DIVISORS if min_side and min(opened.size) >= n * min_side), 1)
            pixels = decode_jpeg(data, opened.height, opened.width, divisor)
        return apply_orientation(opened, decode_with_pillow(opened, mode) if pixels is None else pixels)


def validate_size(image: Image.Image) -> None:
    """Raise SampleError if an image has more than MAX_PIXELS pixels."""
    if image.width * image.height > MAX_PIXELS:
        raise SampleError(f"{image.width}×{image.height} pixels; at most {MAX_PIXELS} are decoded")


def apply_orientation(image: Image.Image, pixels: Tensor) -> Picture:
    """Return the pixels of an image turned upright by its EXIF orientation.

    Args:
        image: The opened image; its size and EXIF data are read.
        pixels: Its pixels, uint8, shape (C, H, W), possibly at reduced size.
    """
    height, width = image.height, image.width
    transposed, flipped = ORIENTATIONS.get(read_orientation(image), (False, ()))
    if transposed:
        pixels, height, width = pixels.mT, width, height
    return Picture(pixels.flip(flipped) if flipped else pixels, (height, width))


def decode_jpeg(data: bytes, height: int, width: int, divisor: int) -> Tensor | None:
    """Decode a JPEG by libjpeg-turbo, its sides divided by 1, 2, 4 or 8.

    Returns:
        uint8, shape (3, H, W); None if the file is damaged or libjpeg-turbo finds another size.
    """
    size = (-(-height // divisor), -(-width // divisor))
    try:
        array = simplejpeg.decode_jpeg(data, "RGB", min_height=size[0], min_width=size[1], min_factor=divisor)
    except ValueError:
        return None
    return torch.from_numpy(array).permute(2, 0, 1) if array.shape[:2] == size else None


def decode_with_pillow(opened: Image.Image, mode: str) -> Tensor:
    """Decode an opened image by Pillow.

    Args:
        opened: The opened image.
        mode: Pillow's mode of the result, RGB or L.

    Returns:
        uint8, shape (C, H, W).

    Raises:
        SampleError: If the image has 32 bits per pixel.
    """
    opened.load()
    opened.info.pop("transparency", None)  # otherwise Pillow converts some modes by way of an alpha channel
    if opened.mode == "F" or (opened.mode == "I" and opened.format == "TIFF"):
        raise SampleError(f"32 bits per pixel (Pillow's mode {opened.mode}), so that the value of white is unknown")
    if opened.mode.startswith("I"):  # Pillow would clip all values above 255 to white
        opened = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8))
    return to_tensor(opened.convert(mode))


def to_pillow(pixels: Tensor) -> Image.Image:
    """Return pixels, uint8 of shape (1 or 3, H, W), as an image of Pillow."""
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if len(pixels) == 1 else array))


def to_tensor(image: Image.Image) -> Tensor:
    """Return the pixels of an image in mode RGB or L, uint8 of shape (3 or 1, H, W)."""
    return torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1)


def read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1, which means upright, if there is none."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF raises many types, and the pixels are still usable
        return 1


def resize_and_crop(picture: Picture, preprocessing: Preprocessing) -> Tensor:
    """Resize and crop an image to the part that the model sees.

    Args:
        picture: The image.
        preprocessing: How to resize and crop.

    Returns:
        uint8, shape (C, image_size, image_size).

    Raises:
        SampleError: If the image is too long and thin to be resized.
    """
    size = require_resizable(*picture.size, preprocessing)
    pixels, interpolation = picture.pixels, preprocessing.interpolation
    if interpolation in ("bilinear", "bicubic"):
        pixels = F.interpolate(pixels[None], size, mode=interpolation, antialias=True)[0]
    else:  # torch has no Lanczos or box filter, and its `nearest` differs from Pillow's
        pixels = to_tensor(to_pillow(pixels).resize(size[::-1], FILTERS[interpolation]))
    return crop_center(pixels, preprocessing)


def require_resizable(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Return `compute_resized_shape`. Raise SampleError if an image of this shape is too long and thin."""
    size = compute_resized_shape(height, width, preprocessing)
    if min(size) == 0 or math.prod(size) > MAX_PIXELS:
        raise SampleError(f"{width}×{height} pixels: too long and thin to be resized")
    return size


def compute_resized_shape(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Return the height and width of an image after resizing and before the crop, rounded as in timm and torchvision.

    Args:
        height: The height of the image in pixels.
        width: The width of the image in pixels.
        preprocessing: The side to resize to, and the crop mode.
    """
    resize, shorter, longer = preprocessing.resize, min(height, width), max(height, width)
    if preprocessing.crop_mode == "squash":
        return resize, resize
    if preprocessing.crop_mode == "border":
        return round(height / (longer / resize)), round(width / (longer / resize))
    return (resize, int(resize * width / shorter)) if height <= width else (int(resize * height / shorter), resize)


def compute_crop_offset(side: int, size: int) -> int:
    """Return the first pixel of a center crop; negative if the image is padded.

    Args:
        side: The height or width of the resized image.
        size: The height or width of the crop.
    """
    return round((side - size) / 2) if side >= size else -((size - side) // 2)


def crop_center(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return the center crop of an image. A smaller image is padded: by the mean color in the mode `border`, else by 0.

    Args:
        pixels: uint8, shape (C, H, W).
        preprocessing: The size of the crop, and its mode.

    Returns:
        uint8, shape (C, image_size, image_size).
    """
    size = preprocessing.image_size
    padding = preprocessing.mean if preprocessing.crop_mode == "border" else (0.0,)
    color = torch.tensor([round(255 * value) for value in padding], dtype=torch.uint8)
    return crop_onto(color.view(-1, 1, 1).expand(len(pixels), size, size).clone(), pixels)


def crop_onto(canvas: Tensor, pixels: Tensor) -> Tensor:
    """Return a canvas (C, size, size) with the center crop of an image (C, H, W) on it; changed in place."""
    size = canvas.shape[-1]
    top, left = (compute_crop_offset(side, size) for side in pixels.shape[1:])
    inner = pixels[:, max(top, 0) :, max(left, 0) :][:, :size, :size]
    y, x = max(-top, 0), max(-left, 0)
    canvas[:, y : y + inner.shape[1], x : x + inner.shape[2]] = inner
    return canvas
