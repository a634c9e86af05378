"""Statistics of maps, and maps of other sizes."""

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from ray_jobs.config import REDUCTIONS as CHOICES
from ray_jobs.config import Preprocessing
from ray_jobs.data.annotations import parse_boxes
from ray_jobs.data.image_decoding import decode
from ray_jobs.data.samples import SampleError
from ray_jobs.jobs.explain.map_statistics import REDUCTIONS, find_region, reduce_maps, summarize_maps


def point(y: int, x: int, value: float = 1.0, size: int = 20) -> torch.Tensor:
    maps = torch.zeros(1, 3, size, size)
    maps[0, 1, y, x] = value
    return maps


def only(method: str, maps: torch.Tensor, boxes: list[tuple[float, float, float, float]] | None = None) -> dict:
    (row,) = summarize_maps(method, maps, [find_region(None, boxes, None, *maps.shape[2:])])
    return {name.removeprefix(f"{method}_"): value for name, value in row.items()}


def test_entropy_is_0_for_a_single_pixel_and_1_for_a_uniform_map() -> None:
    assert only("gradient", point(10, 10))["entropy"] == pytest.approx(0, abs=1e-6)
    flat = only("gradient", torch.ones(1, 3, 20, 20))
    assert flat["entropy"] == pytest.approx(1, rel=1e-5)
    assert flat["centre"] == pytest.approx(0.25)
    two = point(2, 3) + point(15, 9)
    assert only("gradient", two)["entropy"] == pytest.approx(math.log(2) / math.log(400), rel=1e-5)


@pytest.mark.parametrize(("y", "x", "share"), [(5, 5, 1), (14, 14, 1), (4, 10, 0), (10, 15, 0)])
def test_the_center_is_the_middle_half_of_height_and_width(y: int, x: int, share: float) -> None:
    assert only("gradient", point(y, x))["centre"] == share


def test_the_top_patch_and_the_pointing_game_use_the_relevance() -> None:
    maps = point(3, 4, value=-5) + point(15, 16, value=2)
    box = [(14.0, 13.0, 18.0, 17.0)]
    attribution, signal = only("patternattribution", maps, box), only("patternnet", maps, box)
    assert attribution["top_y"] in range(7, 12)
    assert attribution["top_x"] in range(8, 12)
    assert (attribution["hit"], signal["hit"]) == (True, False)
    assert signal["top_y"] in range(4)
    assert attribution["inside"] == signal["inside"] == pytest.approx(2 / 7)


def test_without_boxes_there_is_no_pointing_game() -> None:
    row = only("gradient", point(3, 3))
    assert row["hit"] is None
    assert row["inside"] is None


def test_a_map_of_zeros_has_statistics() -> None:
    row = only("patternattribution", torch.zeros(1, 3, 8, 8), [(0, 0, 4, 4)])
    assert (row["centre"], row["entropy"], row["inside"]) == (0, 0, 0)


def test_channels_are_reduced_and_sizes_keep_the_mean() -> None:
    maps = torch.randn(2, 3, 16, 16)
    assert torch.equal(reduce_maps(maps, "none", None), maps)
    for name, expected in {
        "sum": maps.sum(1), "abs-sum": maps.abs().sum(1), "abs-max": maps.abs().max(1).values
    }.items():  # fmt: skip
        assert torch.equal(reduce_maps(maps, name, None)[:, 0], expected)
    assert tuple(REDUCTIONS) == CHOICES
    small = reduce_maps(torch.ones(1, 3, 16, 16), "sum", 5)
    torch.testing.assert_close(small, torch.full((1, 1, 5, 5), 3.0))


GRAY = Preprocessing(image_size=8, resize=8, interpolation="bilinear", mean=(0.0,), std=(1.0,))


def white(box: tuple[int, int, int, int], size: tuple[int, int], turn: int = 1) -> bytes:
    """Return a black PNG with a white box in the upright image's pixels, stored with an EXIF orientation."""
    image = Image.new("L", size)
    image.paste(255, box)
    stored = {1: None, 6: Image.Transpose.ROTATE_90, 3: Image.Transpose.ROTATE_180, 5: Image.Transpose.TRANSPOSE}[turn]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    buffer = io.BytesIO()
    (image if stored is None else image.transpose(stored)).save(buffer, "png", exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("turn", [1, 3, 5, 6])
@pytest.mark.parametrize("size", [(64, 64), (128, 64), (64, 96)])
def test_a_box_lies_at_its_object_in_the_models_input(size: tuple[int, int], turn: int) -> None:
    middle = size[0] // 2, size[1] // 2
    box = middle[0] - 16, middle[1] - 24, middle[0] + 8, middle[1] + 16
    sample = {"png": white(box, size, turn), "json": json.dumps({"boxes": [box]}).encode()}
    ((x0, y0, x1, y1),) = parse_boxes(sample, GRAY) or ()
    inside = decode(sample, GRAY)[0] > 0.5
    rows, columns = inside.nonzero(as_tuple=True)
    assert (x0, y0, x1, y1) == pytest.approx(
        (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    )


def test_boxes_of_a_tensor_are_in_its_own_pixels_and_missing_boxes_are_none() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((1, 8, 8), np.float32))
    sample = {"npy": buffer.getvalue(), "json": b'{"boxes": [[1, 2, 3, 4], [0, 0, 1.5, 1]]}'}
    assert parse_boxes(sample, GRAY) == [(1, 2, 3, 4), (0, 0, 1.5, 1)]
    assert parse_boxes({**sample, "json": b'{"label": 3}'}, GRAY) is None
    assert parse_boxes({"npy": b""}, GRAY) is None


@pytest.mark.parametrize("boxes", ["[[1, 2, 3]]", '"all"', "[[1, 2, 3, Infinity]]", "[[1, 2, 3, null]]", "7"])
def test_wrong_boxes_are_rejected(boxes: str) -> None:
    with pytest.raises(SampleError, match="json's boxes are"):
        parse_boxes({"npy": b"", "json": f'{{"boxes": {boxes}}}'.encode()}, GRAY)
