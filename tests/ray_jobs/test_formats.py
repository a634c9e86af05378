"""Which file of a sample is its input, and which image formats are read."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor

from ray_jobs.data.image_decoding import decode, decode_upright, list_formats
from ray_jobs.data.samples import SampleError
from tests.ray_jobs.test_decode import PLAIN, TENSOR, npy, saved, smooth


def test_image_is_used_whatever_other_files_the_sample_has() -> None:
    photograph = saved(smooth("RGB"), "jpeg")
    mask = saved(Image.new("L", (24, 20)), "png")
    expected = decode({"jpg": photograph}, PLAIN)
    for other in (npy(np.zeros(768, np.float32)), npy(np.zeros((40, 40), np.uint16)), npy(TENSOR)):
        assert torch.equal(decode({"npy": other, "jpg": photograph}, PLAIN), expected)
    assert torch.equal(decode({"png": mask, "webp": photograph, "pth": b"\x80"}, PLAIN), expected)
    for name in ("image.jpg", "input.png", "rgb.jpeg"):
        assert torch.equal(decode({name: photograph, "mask.png": mask, "cls": b"1"}, PLAIN), expected)
    assert torch.equal(decode({"image.npy": npy(TENSOR + 1), "mask.png": mask}, PLAIN), torch.ones(3, 16, 16))
    with pytest.raises(SampleError, match="rename"):
        decode({"v1.0.jpg": photograph, "v1.1.jpg": photograph}, PLAIN)
    with pytest.raises(SampleError, match="GIF"):
        decode({"gif": b"GIF89a"}, PLAIN)


PILLOWS = {"bmp": "BMP", "ppm": "PPM", "pgm": "PPM", "tif": "TIFF", "tiff": "TIFF"}


@pytest.mark.parametrize("extension", PILLOWS)
@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "RGBA", "CMYK", "I;16"])
def test_formats_that_file_names_allow_are_read_as_pillow_reads_them(extension: str, mode: str) -> None:
    if mode in {"BMP": ("RGBA", "CMYK", "I;16"), "PPM": ("P", "RGBA", "CMYK")}.get(PILLOWS[extension], ()):
        return
    values = np.random.default_rng(0).integers(0, 65536, (20, 24), np.uint16)
    image = Image.fromarray(values) if mode == "I;16" else smooth("RGB").convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, PILLOWS[extension])
    found = decode_upright(buffer.getvalue(), "RGB", formats=list_formats(f"image.{extension}")).pixels
    expected = Image.fromarray((values >> 8).astype(np.uint8)) if mode == "I;16" else image
    if mode == "RGBA":
        expected = Image.merge("RGB", image.split()[:3])
    assert torch.equal(found, pil_to_tensor(expected.convert("RGB")))
    with pytest.raises(SampleError, match="not an image"):
        decode_upright(buffer.getvalue(), "RGB", formats=list_formats("image.jpg"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiffs_are_turned_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    smooth("RGB").save(buffer, "TIFF", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(buffer))
    found = decode_upright(buffer.getvalue(), "RGB", formats=list_formats("tif"))
    assert torch.equal(found.pixels, pil_to_tensor(expected))
    assert found.size == tuple(found.pixels.shape[1:])


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_tiff_of_32_bits_is_rejected(dtype: type) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.ones((20, 24), dtype)).save(buffer, "TIFF")
    with pytest.raises(SampleError, match="32 bits"):
        decode({"tif": buffer.getvalue()}, PLAIN)
