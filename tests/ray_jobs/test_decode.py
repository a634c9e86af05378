"""Images and tensors: decoded as other libraries decode them, or rejected with a reason, whatever the bytes."""

import io
import json
import random
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

from ray_jobs.config import Preprocessing
from ray_jobs.data.annotations import parse_label
from ray_jobs.data.image_decoding import decode, decode_upright
from ray_jobs.data.samples import NAMED_FORMATS, SampleError
from tests.conftest import jpeg

PLAIN = Preprocessing(image_size=16, resize=16, interpolation="bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def smooth(mode: str, width: int = 24, height: int = 20, seed: int = 0) -> Image.Image:
    """Return a random smooth image with 8-bit channels."""
    rng = np.random.default_rng(seed)
    bands = [Image.fromarray(rng.integers(0, 256, (4, 4), np.uint8)) for _ in Image.new(mode, (1, 1)).getbands()]
    return Image.merge(mode, [band.resize((width, height), Image.Resampling.BICUBIC) for band in bands])


def saved(
    image: Image.Image,
    form: str,
    *,
    frames: list[Image.Image] | None = None,
    exif: Image.Exif | None = None,
    transparency: bytes | int | None = None,
) -> bytes:
    options: dict[str, object] = {"exif": exif or Image.Exif()}
    if frames:
        options |= {"save_all": True, "append_images": frames}
    if transparency is not None:
        options["transparency"] = transparency
    buffer = io.BytesIO()
    image.save(buffer, form, lossless=True, quality=95, **options)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def decode_by_torchvision(data: bytes) -> torch.Tensor:
    """Return the pixels (3, H, W) by another decoder than Pillow's."""
    return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


def decode_pixels(data: bytes) -> torch.Tensor:
    return decode_upright(data, "RGB").pixels


CMYK = saved(smooth("CMYK"), "jpeg")
ADOBE = b"Adobe\0\x64\0\0\0\0"


@pytest.mark.parametrize(
    "data",
    [
        saved(smooth("RGB"), "jpeg"),
        saved(smooth("L"), "jpeg"),
        CMYK,
        CMYK.replace(ADOBE + b"\0", ADOBE + b"\2"),  # the same bytes as YCCK, also inverted
        saved(smooth("RGB"), "png"),
        saved(smooth("L"), "png"),
        saved(smooth("RGB").quantize(16), "png"),
        saved(smooth("RGB"), "webp"),
    ],
    ids=["RGB", "gray", "CMYK", "YCCK", "PNG", "gray PNG", "palette", "WebP"],
)
def test_every_type_of_image_has_the_colors_of_another_decoder(data: bytes) -> None:
    assert torch.equal(decode_pixels(data), decode_by_torchvision(data))


def test_cmyk_is_not_inverted() -> None:
    paper = Image.new("CMYK", (16, 16), (0, 0, 0, 0))
    assert decode_pixels(saved(paper, "jpeg")).min() > 250


@pytest.mark.parametrize("alpha_channel", ["random", "transparent"])
def test_transparency_is_dropped_and_colors_are_kept(alpha_channel: str) -> None:
    alpha = smooth("L", seed=1) if alpha_channel == "random" else Image.new("L", (24, 20), 0)
    colored = smooth("RGB")
    assert torch.equal(
        decode_pixels(saved(Image.merge("RGBA", [*colored.split(), alpha]), "png")), pil_to_tensor(colored)
    )
    gray = smooth("L")
    assert torch.equal(decode_pixels(saved(Image.merge("LA", [gray, alpha]), "png"))[0], pil_to_tensor(gray)[0])
    palette = colored.quantize(16)
    for transparency in (0, bytes(range(0, 160, 10))):
        data = saved(palette, "png", transparency=transparency)
        assert torch.equal(decode_pixels(data), pil_to_tensor(palette.convert("RGB")))


@pytest.mark.filterwarnings("error")
def test_transparent_palettes_are_read_without_a_warning() -> None:
    decode_upright(saved(smooth("RGB").quantize(16), "png", transparency=bytes(range(16))), "RGB")


def png_of(array: np.ndarray) -> bytes:
    """Return a 16-bit PNG of numbers (H, W) or (H, W, 3), because Pillow writes no color images of 16 bits."""
    height, width = array.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    color_type = 0 if array.ndim == 2 else 2

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("shape", [(20, 24), (20, 24, 3)], ids=["gray", "color"])
def test_upper_eight_of_16_bits_are_used(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 1 << 16, shape, np.uint16)
    found = decode_pixels(png_of(array)).permute(1, 2, 0).numpy()
    assert np.array_equal(found, np.broadcast_to((array >> 8).reshape(20, 24, -1), (20, 24, 3)))


@pytest.mark.parametrize("form", ["png", "webp"])
def test_first_frame_of_an_animation_is_used(form: str) -> None:
    frames = [smooth("RGB", seed=i) for i in range(3)]
    assert torch.equal(decode_pixels(saved(frames[0], form, frames=frames[1:])), pil_to_tensor(frames[0]))


LARGE = [(2051, 1547), (1030, 1999), (1024, 1024), (700, 513)]


@pytest.mark.full
@pytest.mark.cases
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", LARGE)
def test_jpeg_decoded_at_reduced_size_gives_nearly_the_same_input(
    size: tuple[int, int], interpolation: str, orientation: int
) -> None:
    image = smooth("RGB", *size)
    noise = np.random.default_rng(1).normal(0, 20, (size[1], size[0], 3))
    image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(image, "jpeg", exif=exif)
    preprocessing = Preprocessing(
        image_size=112, resize=128, interpolation=interpolation, mean=(0.0,) * 3, std=(1.0,) * 3
    )
    whole = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    mode = InterpolationMode(interpolation)
    expected = pil_to_tensor(center_crop(resize(whole, [128], mode), [112])).float()
    differences = (decode({"jpg": data}, preprocessing) * 255 - expected).abs()
    assert differences.mean() < 1.25
    assert differences.max() <= 8
    picture = decode_upright(data, "RGB", 256)
    assert min(picture.pixels.shape[1:]) < 512
    assert picture.size == whole.size[::-1]


def test_small_jpeg_has_exactly_pillows_pixels() -> None:
    data = saved(smooth("RGB", 500, 375), "jpeg")
    expected = pil_to_tensor(Image.open(io.BytesIO(data)))
    assert torch.equal(decode_upright(data, "RGB", 2 * 256).pixels, expected)


def test_damaged_jpeg_that_pillow_reads_is_read() -> None:
    """Some encoders leave bytes between a JPEG's segments, of which libjpeg-turbo only warns."""
    data = saved(smooth("RGB", 500, 375), "jpeg")
    at = data.index(b"\xff\xda")
    damaged = data[:at] + b"\0\0\0" + data[at:]
    with pytest.raises(ValueError, match="extraneous bytes"):
        simplejpeg.decode_jpeg(damaged)
    assert torch.equal(decode_pixels(damaged), decode_pixels(data))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["jpeg", "png", "webp"])
def test_images_are_turned_upright(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(smooth("RGB"), form, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert torch.equal(decode_pixels(data), pil_to_tensor(expected))
    assert (expected.size == (24, 20)) == (orientation < 5)


def test_damaged_exif_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(smooth("RGB"), "jpeg", exif=exif)
    for start in range(data.index(b"Exif") + 6, data.index(b"Exif") + 30):
        changed = bytearray(data)
        changed[start] ^= 0xFF
        assert sorted(decode_upright(bytes(changed), "RGB").size) == [20, 24]


@pytest.mark.parametrize("form", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp"])
def test_format_is_detected_by_content_instead_of_name(form: str, extension: str) -> None:
    data = saved(smooth("RGB"), form)
    assert torch.equal(decode({extension: data}, PLAIN), decode({"webp": data}, PLAIN))


def bomb(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and has no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    ihdr = b"\0\0\0\x0dIHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + ihdr + b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def huge_tensor() -> bytes:
    data = npy(np.zeros((3, 16, 16), np.float32))
    return data.replace(b"(3, 16, 16), }" + b" " * 20, b"(3, 1600000000, 16), }" + b" " * 12)


TENSOR = np.zeros((3, 16, 16), np.float32)
BAD: dict[str, tuple[dict[str, bytes], str]] = {
    "empty": ({"jpg": b""}, "an empty file"),
    "empty tensor": ({"npy": b""}, "EOF"),
    "cut JPEG": ({"jpg": saved(smooth("RGB"), "jpeg")[:-60]}, "truncated"),
    "cut PNG": ({"png": saved(smooth("RGB"), "png")[:-60]}, "truncated"),
    "cut WebP": ({"webp": saved(smooth("RGB"), "webp")[:-60]}, "OSError: "),
    "bomb": ({"png": bomb(60_000, 60_000)}, "DecompressionBombError"),
    "bomb below Pillow's own limit": ({"png": bomb(9_460, 9_460)}, "9460×9460 pixels; at most 89478485"),
    "another format": ({"jpg": saved(smooth("RGB"), "gif")}, "JPEG, PNG, WEBP"),
    "text": ({"jpg": b"<html>404</html>"}, "JPEG, PNG, WEBP"),
    "no image": ({"txt": b"hello"}, "neither an image"),
    "wrong shape": ({"npy": npy(TENSOR[:1])}, r"\(1, 16, 16\)"),
    "huge shape": ({"npy": huge_tensor()}, "1600000000"),
    "cut tensor": ({"npy": npy(TENSOR)[:-1]}, "truncated"),
    "infinite": ({"npy": npy(TENSOR + np.inf)}, "not finite"),
    "not a number": ({"npy": npy(TENSOR + np.nan)}, "not finite"),
    "beyond float32": ({"npy": npy(TENSOR.astype(np.float64) + 1e300)}, "not finite"),
    "objects": ({"npy": npy(np.array([{"a": 1}], dtype=object))}, "pickled objects are not loaded"),
    "complex": ({"npy": npy(TENSOR.astype(np.complex64))}, "complex64"),
    "words": ({"npy": npy(np.full((3, 16, 16), "a"))}, "not of real numbers"),
    "pickle": ({"npy": b"\x80\x04]\x94."}, "ValueError: "),
    "nested header": ({"npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000}, "Error: "),
}


@pytest.mark.full
@pytest.mark.parametrize(("sample", "reason"), BAD.values(), ids=BAD)
def test_unusable_sample_is_rejected_with_a_reason_and_without_memory(sample: dict[str, bytes], reason: str) -> None:
    tracemalloc.start()
    with pytest.raises(SampleError, match=reason) as caught:
        decode(sample, PLAIN)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    assert str(caught.value).strip()


@pytest.mark.full
def test_thin_line_is_not_enlarged_to_billions_of_pixels() -> None:
    line = saved(Image.new("L", (60_000, 1)), "png")
    with pytest.raises(SampleError, match="too long and thin"):
        decode({"png": line}, replace(PLAIN, resize=256))
    assert decode({"png": saved(Image.new("L", (1000, 1)), "png")}, replace(PLAIN, resize=256)).shape == (3, 16, 16)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", ">f4", "uint8"])
def test_tensors_of_real_numbers_do_not_change(dtype: str) -> None:
    array = np.random.default_rng(0).integers(0, 200, (3, 16, 16)).astype(dtype)
    for each in (array, np.asfortranarray(array)):
        assert np.array_equal(decode({"npy": npy(each)}, PLAIN).numpy(), array.astype(np.float32))


LABELS: dict[str, tuple[dict[str, bytes], int | None]] = {
    "number": ({"cls": b"7"}, 7),
    "line": ({"cls": b" 7\n"}, 7),
    "none": ({}, None),
    "unlabelled": ({"cls": b"-1"}, None),
    "json": ({"json": b'{"label": 7, "filename": "x"}'}, 7),
    "cls first": ({"cls": b"3", "json": b'{"label": 7}'}, 3),
    "json without": ({"json": b'{"caption": "a dog"}'}, None),
    "json list": ({"json": b"[1, 2]"}, None),
}


@pytest.mark.parametrize(("sample", "label"), LABELS.values(), ids=LABELS)
def test_label_is_the_cls_or_the_label_of_the_json(sample: dict[str, bytes], label: int | None) -> None:
    assert parse_label(sample) == label


@pytest.mark.parametrize(
    "sample",
    [
        *({"cls": cls} for cls in (b"", b"cat", b"-2", b"1.5", b"1_0", b"9" * 30, b"9" * 5000, b"\xff", b"0x7")),
        *({"json": json.dumps({"label": label}).encode()} for label in ("cat", 1.5, True, [1], -2, 10**30)),
    ],
)
def test_labels_that_are_not_class_numbers_are_rejected(sample: dict[str, bytes]) -> None:
    with pytest.raises(SampleError, match="not a class number"):
        parse_label(sample)


@pytest.mark.parametrize("data", [b"{", b"\xff\xff", b"[" * 100_000])
def test_json_that_cannot_be_parsed_is_rejected(data: bytes) -> None:
    with pytest.raises(SampleError, match="cannot be parsed"):
        parse_label({"json": data})


def mutations(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Return the data with random damage: flipped, cut, removed, repeated or foreign bytes."""
    for _ in range(rng.randint(1, 3)):
        at, until = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        kind = rng.randrange(6)
        if kind <= 1:
            changed = bytearray(data)
            for _ in range(rng.randint(1, 10) if data else 0):
                changed[rng.randrange(min(len(data), 100) if kind else len(data))] = rng.randrange(256)
            data = bytes(changed)
        else:
            data = (data[:at], data[:at] + data[until:], data[:until] + data[at:], data[:at] + other[at:])[kind - 2]
    return data


def fuzzed() -> dict[str, Callable[[], bytes]]:
    exif = Image.Exif()
    exif[0x0112] = 6
    gray16 = np.arange(16 * 16, dtype=np.uint16).reshape(16, 16)
    frames = [smooth("RGB", 8, 8, seed=i) for i in range(3)]
    return {
        "JPEG": lambda: jpeg(np.random.default_rng(0)),
        "JPEG with EXIF": lambda: saved(smooth("RGB", 16, 12), "jpeg", exif=exif),
        "CMYK": lambda: saved(smooth("CMYK", 8, 8), "jpeg"),
        "PNG": lambda: saved(smooth("RGBA", 8, 8), "png", exif=exif),
        "palette": lambda: saved(smooth("RGB", 8, 8).quantize(8), "png", transparency=bytes(range(8))),
        "16 bits": lambda: png_of(gray16),
        "animated PNG": lambda: saved(frames[0], "png", frames=frames[1:]),
        "WebP": lambda: saved(smooth("RGB", 16, 16), "webp", exif=exif),
        "animated WebP": lambda: saved(frames[0], "webp", frames=frames[1:]),
        "tensor": lambda: npy(TENSOR),
        "bmp": lambda: saved(smooth("RGB", 8, 8), "bmp"),
        "ppm": lambda: saved(smooth("RGB", 8, 8), "ppm"),
        "tif": lambda: saved(smooth("RGB", 8, 8), "tiff"),
    }


@pytest.mark.full
@pytest.mark.cases
@pytest.mark.parametrize("kind", fuzzed())
@pytest.mark.filterwarnings("ignore")  # Pillow warns about damaged files
def test_arbitrary_bytes_are_decoded_or_rejected(kind: str) -> None:
    data = fuzzed()[kind]()
    others = [make() for make in fuzzed().values()]
    rng = random.Random(kind)
    used = 0
    for _ in range(1200):
        changed = mutations(rng, data, rng.choice(others))
        try:
            name = "npy" if kind == "tensor" else kind if kind in NAMED_FORMATS else "jpg"
            found = decode({name: changed}, PLAIN)
        except SampleError:
            continue
        used += 1
        assert found.shape == PLAIN.input_shape
        assert found.isfinite().all()
    assert 0 < used < 1200
