"""Targets of dense outputs and of embeddings, and the masks of samples."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from patterns import UserError
from ray_jobs.config import ExplainConfig, FitConfig, ModelConfig, Preprocessing, Resources
from ray_jobs.data.annotations import parse_mask
from ray_jobs.data.image_decoding import decode_input
from ray_jobs.data.samples import SampleError
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.jobs.explain.target_files import load_target_vector
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.models import loading
from tests.conftest import write_tar

HERE = Resources(workers=0)
CODE = """
import torch
from torch import nn


def dense():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1)).double()


def embedding():
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 49, 5, bias=False))
"""
SIZE, COUNT = 16, 5
LEFT = np.arange(SIZE)[None] < 5


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples with masks, maps of classes and boxes, and one sample without; models of dense outputs and embeddings."""
    folder = tmp_path_factory.mktemp("regions")
    (folder / "m.py").write_text(CODE)
    rng = np.random.default_rng(0)
    samples: list[dict[str, object]] = []
    for number in range(COUNT):
        image = rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        classes = np.where(LEFT, 3, number % 2).astype(np.uint8) * np.ones((SIZE, 1), np.uint8)
        boxes = json.dumps({"boxes": [[0, 0, 5, SIZE]]}).encode()
        own = {"mask.png": png(255 * (classes == 3).astype(np.uint8))} if number < 2 else {"seg.png": png(classes)}
        samples.append({"__key__": f"s{number}", "png": png(image), "json": boxes, **own})
    samples.append({"__key__": "bare", "png": png(image)})
    write_tar(folder / "data-0.tar", samples)
    return folder


def make_config(folder: Path, model: str) -> ModelConfig:
    half = (0.5,) * 3
    spec = f"{folder / 'm.py'}:{model}"
    return ModelConfig(spec=spec, image_size=SIZE, resize=SIZE, precision="float64", mean=half, std=half)


def run(folder: Path, model: str, target: str, out: Path, **given: object) -> list[dict[str, object]]:
    """Fit a model, explain the samples, and return the rows of the table."""
    spec = ModelConfig(
        spec=f"{folder / 'm.py'}:{model}",
        image_size=SIZE,
        resize=SIZE,
        precision="float64",
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    shards = (str(folder / "data-0.tar"),)
    fit(FitConfig(model=spec, shards=shards, out=str(out / "fit"), batch_size=4), HERE)
    explain(
        ExplainConfig(
            model=spec, patterns=str(out / "fit"), shards=shards, out=str(out), target=target, methods=("gradient",),
            outputs=("npy",), batch_size=4, **given,  # type: ignore[arg-type]
        ),
        HERE,
    )  # fmt: skip
    return pq.read_table(out / "explanations.parquet").to_pylist()


def read_inputs(folder: Path) -> torch.Tensor:
    """Return the samples with regions as the models take them."""
    import webdataset

    samples = list(webdataset.WebDataset(str(folder / "data-0.tar"), shardshuffle=False))[:COUNT]
    plain = Preprocessing(image_size=SIZE, resize=SIZE, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
    images = [decode_input({"png": sample["png"]}, plain).double() for sample in samples]
    return (torch.stack(images) / 255 - 0.5) / 0.5


def read_maps(out: Path) -> torch.Tensor:
    import webdataset

    maps, exponents = [], []
    for sample in webdataset.WebDataset(str(out / "explanations" / "data-0.tar"), shardshuffle=False):
        maps.append(torch.from_numpy(np.load(io.BytesIO(sample["gradient.npy"]))).double())
        exponents.append(json.loads(sample["json"])["exponents"]["gradient"])
    return torch.stack([torch.ldexp(each, torch.tensor(e)) for each, e in zip(maps, exponents)])


def load_model(folder: Path, name: str) -> torch.nn.Module:
    return loading.load(make_config(folder, name)).model


def assert_explained(rows: list[dict[str, object]], out: Path, expected: torch.Tensor, gradient: torch.Tensor) -> None:
    """Assert that the first samples have these scores, and float16 maps of these gradients."""
    scores = torch.tensor([row["score"] for row in rows[:COUNT]], dtype=torch.float64)
    torch.testing.assert_close(scores, expected.detach(), rtol=1e-5, atol=1e-6)
    maps = read_maps(out)[:COUNT]
    torch.testing.assert_close(maps, gradient, rtol=2e-3, atol=2e-3 * float(gradient.abs().max()))


@pytest.mark.parametrize("target", ["3@mask", "3@box", "0@predicted", "2@mask"])
def test_class_in_a_region_is_the_sum_over_its_positions(folder: Path, tmp_path: Path, target: str) -> None:
    rows = run(folder, "dense", target, tmp_path)
    x = read_inputs(folder).requires_grad_()
    scores = load_model(folder, "dense")(x)
    number = int(target[0])
    if target.endswith("predicted"):
        weights = (scores.argmax(1) == number).double()
    else:  # columns 0 to 4 of the input: two columns of the output, and half of the third
        weights = torch.zeros(COUNT, 8, 8, dtype=torch.float64)
        inside = COUNT if number == 3 else 2  # mask.png has no classes, and no pixel of seg.png is of class 2
        weights[:inside, :, :2], weights[:inside, :, 2] = 1, 0.5
    expected = (scores[:, number] * weights).sum((1, 2))
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    assert len(rows) == COUNT + (target == "0@predicted")  # the sample without a region is rejected if it needs one
    assert_explained(rows, tmp_path, expected, gradient)


@pytest.mark.parametrize("target", ["unit:3", "similarity:v.npy"])
def test_targets_of_embeddings_have_the_gradient_of_autograd(folder: Path, tmp_path: Path, target: str) -> None:
    vector = np.array([1.0, -2.0, 0.5, 3.0, 0.0])
    np.save(tmp_path / "v.npy", vector)
    target = target.replace("v.npy", str(tmp_path / "v.npy"))
    rows = run(folder, "embedding", target, tmp_path, vector=load_target_vector(target))
    x = read_inputs(folder).requires_grad_()
    embedding = load_model(folder, "embedding")(x)
    if target.startswith("unit"):
        expected = embedding[:, 3]
    else:
        given = torch.from_numpy(vector)
        cosine = torch.nn.functional.cosine_similarity(embedding, given[None])
        expected = embedding @ given / given.norm() / embedding.norm(dim=1).detach()  # a norm's factor is a constant
        torch.testing.assert_close(expected, cosine)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    assert_explained(rows, tmp_path, expected, gradient)
    assert {row["prediction"] for row in rows} == {None}


def test_summaries_use_the_mask_before_the_boxes(folder: Path, tmp_path: Path) -> None:
    rows = run(folder, "embedding", "3", tmp_path)
    mass = read_maps(tmp_path).abs().sum(1)
    inside = mass[:, :, :5].sum((1, 2)) / mass.sum((1, 2))
    for row, share in zip(rows[:COUNT], inside.tolist()):
        assert row["gradient_inside"] == pytest.approx(share, abs=2e-3)
    assert rows[-1]["gradient_inside"] is None


@pytest.mark.parametrize(
    ("target", "what"),
    [("17@mask", "no class 17"), ("predicted@mask", "'predicted' is no class of a whole image"),
     ("dog@box", "'dog' is no class")],
)  # fmt: skip
def test_wrong_targets_of_dense_outputs_are_rejected(folder: Path, tmp_path: Path, target: str, what: str) -> None:
    with pytest.raises(UserError) as caught:
        run(folder, "dense", target, tmp_path)
    assert (caught.value.parameter, caught.value.what) == ("target", what)


@pytest.mark.parametrize(
    ("target", "vector", "what"),
    [("3@mask", (), "(5,), not (classes, H, W)"), ("unit:5", (), "no unit '5'"), ("unit:x", (), "no unit 'x'"),
     ("similarity:v.npy", (1.0, 2.0), "the vector has 2 numbers")],
)  # fmt: skip
def test_wrong_targets_of_embeddings_are_rejected(
    folder: Path, tmp_path: Path, target: str, vector: tuple[float, ...], what: str
) -> None:
    with pytest.raises(UserError) as caught:
        run(folder, "embedding", target, tmp_path, vector=vector)
    assert caught.value.parameter == "target"
    assert what in caught.value.what


@pytest.mark.parametrize(
    "array",
    [np.zeros(3), np.array([1.0, np.nan]), np.ones((2, 2)), np.array(["a"]), np.array([{}], dtype=object), np.zeros(0)],
    ids=["zero", "nan", "matrix", "text", "pickled", "empty"],
)
def test_files_without_a_direction_are_rejected(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "v.npy", array)
    with pytest.raises(UserError) as caught:
        load_target_vector(f"similarity:{tmp_path / 'v.npy'}")
    assert caught.value.parameter == "target"


PLAIN = Preprocessing(image_size=8, resize=8, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)


def files_of(mask: bytes, name: str = "mask.png", height: int = 16, width: int = 32) -> dict[str, bytes]:
    return {"png": png(np.zeros((height, width, 3), np.uint8)), name: mask}


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16"])
def test_masks_follow_the_crop_of_their_image(mode: str) -> None:
    values = np.zeros((16, 32), np.uint8)
    values[4:8, 12:16] = 7
    image = Image.fromarray(values)
    if mode == "P":
        image = Image.fromarray(values, "P")
        image.putpalette([k % 256 for k in range(768)])
    elif mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16))
    elif mode == "1":
        image = Image.fromarray(values > 0)
    buffer = io.BytesIO()
    image.save(buffer, "png")
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:4, 2:4] = True  # half the size; the crop begins at column 4 of 16
    found = parse_mask(files_of(buffer.getvalue()), PLAIN)
    assert found is not None
    assert found.dtype == torch.bool
    assert torch.equal(found, expected)
    classes = parse_mask(files_of(buffer.getvalue(), "seg.png"), PLAIN)
    assert classes is not None
    assert torch.equal(classes == (1 if mode == "1" else 7), expected)


def test_pixels_beside_an_image_belong_to_no_class() -> None:
    border = Preprocessing(**{**vars(PLAIN), "crop_mode": "border"})
    found = parse_mask(files_of(png(np.zeros((16, 32), np.uint8)), "seg.png"), border)
    assert found is not None
    assert [sorted(set(row.tolist())) for row in found] == [[-1]] * 2 + [[0]] * 4 + [[-1]] * 2


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (png(np.zeros((16, 32, 3), np.uint8)), "several channels"),
        (png(np.zeros((8, 16), np.uint8)), "16×8 pixels, but the image has 32×16"),
        (png(np.zeros((16, 32), np.uint8))[:40], "mask.png"),
        (b"", "mask.png"),
        (b"GIF89a", "mask.png"),
    ],
)
def test_files_that_are_no_masks_are_named(mask: bytes, reason: str) -> None:
    with pytest.raises(SampleError, match=reason):
        parse_mask(files_of(mask), PLAIN)


@pytest.mark.parametrize(("height", "width"), [(1, 60_000), (60_000, 1)])
def test_mask_that_is_too_long_and_thin_is_rejected_before_it_is_resized(height: int, width: int) -> None:
    large = Preprocessing(**{**vars(PLAIN), "image_size": 224, "resize": 256})
    mask = png(np.zeros((height, width), np.uint8))
    with pytest.raises(SampleError, match="too long and thin"):
        parse_mask(files_of(mask, height=height, width=width), large)
