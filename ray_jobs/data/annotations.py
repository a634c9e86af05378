"""Annotations of samples: the class in `cls` or `json`, the boxes in `json`, the mask in `mask.png` or `seg.png`."""

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ray_jobs.config import Preprocessing
from ray_jobs.data.image_decoding import (
    compute_crop_offset,
    compute_resized_shape,
    crop_onto,
    list_formats,
    read_orientation,
    require_resizable,
    validate_size,
)
from ray_jobs.data.labels import MAX_CLASS, UNLABELED
from ray_jobs.data.samples import Box, SampleError, find_image

MASKS = ("mask.png", "seg.png")
MASK_MODES = ("1", "L", "P", "I", "I;16")  # Pillow's names of one channel of integers


def parse_label(files: Mapping[str, bytes]) -> int | None:
    """Return the class of a sample: its `cls`, else the `label` of its `json`.

    Returns:
        The class number; None if the sample has neither file, or if the label is -1.

    Raises:
        SampleError: If the label is not a class number.
    """
    name, value = ("cls", files["cls"]) if "cls" in files else ("json's label", parse_json_label(files.get("json")))
    if value is None:
        return None
    try:
        label = value if isinstance(value, int) else int(value.replace(b"_", b"?"))  # Python takes 1_0 for 10
    except ValueError:
        label = MAX_CLASS
    if not UNLABELED <= label < MAX_CLASS:
        raise SampleError(f"{name} is not a class number: {value[:20] if isinstance(value, bytes) else value!r}")
    return None if label == UNLABELED else label


def parse_boxes(files: Mapping[str, bytes], preprocessing: Preprocessing) -> list[Box] | None:
    """Return the boxes of a sample's objects in pixels of the model's input.

    Args:
        files: The sample's files. The `boxes` of its `json` are lists [x0, y0, x1, y1], in pixels of the upright image
            or of the ready tensor.
        preprocessing: How the image is resized and cropped.

    Returns:
        The boxes; None if the sample has no `boxes`.

    Raises:
        SampleError: If the `boxes` are not boxes, or the image cannot be opened.
    """
    found = parse_json_value(files["json"], "boxes") if "json" in files else None
    if found is None:
        return None
    try:
        boxes = np.asarray(found, np.float64).reshape(-1, 4)
    except (ValueError, TypeError) as error:
        raise SampleError("json's boxes are not lists of four numbers") from error
    if not np.isfinite(boxes).all():
        raise SampleError("json's boxes are not finite")
    size = read_upright_size(files)
    if size is None:
        return [(x0, y0, x1, y1) for x0, y0, x1, y1 in boxes.tolist()]
    height, width = size
    sides = compute_resized_shape(height, width, preprocessing)[::-1]
    offsets = [compute_crop_offset(side, preprocessing.image_size) for side in sides]
    boxes = boxes * np.tile(np.array(sides) / (width, height), 2) - np.tile(offsets, 2)
    return [(x0, y0, x1, y1) for x0, y0, x1, y1 in boxes.tolist()]


def read_upright_size(files: Mapping[str, bytes]) -> tuple[int, int] | None:
    """Return the height and width of a sample's upright image; None if a ready tensor is the input.

    Raises:
        SampleError: If the image cannot be opened.
    """
    file = find_image(files)
    if file is None:
        return None
    try:
        with Image.open(io.BytesIO(files[file]), formats=list_formats(file)) as image:
            turned = read_orientation(image) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception as error:  # untrusted bytes make Pillow raise anything
        raise SampleError(f"{type(error).__name__}: {error}") from error


def parse_mask(files: Mapping[str, bytes], preprocessing: Preprocessing) -> Tensor | None:
    """Return the mask of a sample in pixels of the model's input.

    Args:
        files: The sample's files. `mask.png` marks an object by pixels that are not 0; `seg.png` has the class of each
            pixel. Both have one channel, or a palette whose indices count, and the size of the upright image or of the
            ready tensor.
        preprocessing: How the image is resized and cropped. The mask takes the value of the nearest pixel.

    Returns:
        bool (H, W) for `mask.png`; int32 (H, W) for `seg.png`, -1 outside the image; None if the sample has neither.

    Raises:
        SampleError: If the file is not such a mask.
    """
    name = next((name for name in MASKS if name in files), None)
    if name is None:
        return None
    try:
        with Image.open(io.BytesIO(files[name]), formats=["PNG"]) as image:
            validate_size(image)
            if image.mode not in MASK_MODES:
                raise SampleError(f"{name} has several channels (Pillow's mode {image.mode}); a mask has one")
            values = Image.fromarray(np.asarray(image).astype(np.int32))
    except SampleError:
        raise
    except Exception as error:  # untrusted bytes make Pillow raise anything
        raise SampleError(f"{name}: {type(error).__name__}: {error}") from error
    size = preprocessing.image_size
    expected = read_upright_size(files) or (size, size)
    if (values.height, values.width) != expected:
        what = f"{name} has {values.width}×{values.height} pixels, but the image has {expected[1]}×{expected[0]}"
        raise SampleError(what)
    if find_image(files):
        height, width = require_resizable(*expected, preprocessing)
        values = values.resize((width, height), Image.Resampling.NEAREST)
    outside = torch.full((1, size, size), -1, dtype=torch.int32)
    mask = crop_onto(outside, torch.from_numpy(np.array(values))[None])[0]
    return mask > 0 if name == "mask.png" else mask


def parse_json_value(data: bytes, name: str) -> Any:
    """Return a value of a sample's json; None if it is absent. Raise SampleError if the json cannot be parsed."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleError(f"json cannot be parsed ({type(error).__name__})") from error
    return value.get(name) if isinstance(value, dict) else None


def parse_json_label(data: bytes | None) -> int | None:
    """Return the `label` of a sample's json; None without a json or a label."""
    label = None if data is None else parse_json_value(data, "label")
    if label is not None and type(label) is not int:  # True is an int
        raise SampleError(f"json's label is not a class number: {str(label)[:20]!r}")
    return label
