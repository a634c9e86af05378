"""Annotations of samples: the class in `cls` or `json`, and the boxes in `json`."""

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from ray_jobs.config import Preprocessing
from ray_jobs.data.image_decoding import compute_crop_offset, compute_resized_shape, list_formats, read_orientation
from ray_jobs.data.labels import MAX_CLASS, UNLABELED
from ray_jobs.data.samples import Box, SampleError, find_image


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
    file = find_image(files)
    if file is None:
        return [(x0, y0, x1, y1) for x0, y0, x1, y1 in boxes.tolist()]
    try:
        with Image.open(io.BytesIO(files[file]), formats=list_formats(file)) as image:
            turned = read_orientation(image) >= 5
            width, height = image.size[::-1] if turned else image.size
    except Exception as error:  # untrusted bytes make Pillow raise anything
        raise SampleError(f"{type(error).__name__}: {error}") from error
    sides = compute_resized_shape(height, width, preprocessing)[::-1]
    offsets = [compute_crop_offset(side, preprocessing.image_size) for side in sides]
    boxes = boxes * np.tile(np.array(sides) / (width, height), 2) - np.tile(offsets, 2)
    return [(x0, y0, x1, y1) for x0, y0, x1, y1 in boxes.tolist()]


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
