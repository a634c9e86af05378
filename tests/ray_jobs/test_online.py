"""Explanations without shards: Ray Data and Ray Serve return what the job writes."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import ray
from PIL import Image
from ray import serve

from cluster.serve import app
from patterns import UserError
from ray_jobs.config import ExplainConfig, FitConfig, ModelConfig, Resources
from ray_jobs.data.samples import Sample
from ray_jobs.data.shard_reader import read_shard
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.jobs.explain.online import ExplainBatch, OnlineExplainer
from ray_jobs.jobs.fit.fit import fit
from tests.ray_jobs.runs import PREPROCESSING

METHODS = ("gradient", "patternattribution")


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def fitted(model_spec: str, shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("fitted") / "run")
    model = ModelConfig(spec=model_spec, **PREPROCESSING)  # type: ignore[arg-type]
    run = fit(FitConfig(model=model, shards=tuple(shards), out=out), Resources(workers=0))
    explain(
        ExplainConfig(model=model, patterns=out, shards=(shards[0],), out=out, methods=METHODS), Resources(workers=0)
    )
    return str(run.folder)


@pytest.fixture(scope="module")
def written(fitted: str, shards: list[str]) -> list[tuple[Sample, Sample]]:
    """The samples of a shard, each with the job's explanation."""
    maps = read_shard(str(Path(fitted) / "explanations" / Path(shards[0]).name))
    return list(zip(read_shard(shards[0]), maps))


def same(array: np.ndarray, exponent: int, sample: Sample, method: str) -> None:
    expected = np.load(io.BytesIO(sample.files[f"{method}.npy"])).astype(np.float64)
    expected = np.ldexp(expected, json.loads(sample.files["json"])["exponents"][method])
    found = np.ldexp(array.astype(np.float64), exponent)
    assert np.abs(found - expected).max() <= 2e-3 * np.abs(expected).max()


@pytest.mark.slow
def test_ray_data_gets_the_maps_of_the_job(local_ray: None, fitted: str, written: list[tuple[Sample, Sample]]) -> None:
    rows = [{"bytes": sample.files["jpg"], "number": i} for i, (sample, _) in enumerate(written)]
    rows.insert(2, {"bytes": b"no image", "number": -1})
    found = ray.data.from_items(rows).map_batches(
        ExplainBatch, fn_constructor_kwargs={"run": fitted, "methods": METHODS}, batch_size=4, concurrency=1, num_cpus=1
    )
    met = sorted(found.take_all(), key=lambda row: row["number"])
    assert [row["number"] for row in met] == [-1, *range(len(written))]
    for row, (_, sample) in zip(met[1:], written):
        expected = json.loads(sample.files["json"])
        assert (row["prediction"], row["target"], row["refused"]) == (expected["prediction"], expected["target"], "")
        assert row["probability"] == pytest.approx(expected["probability"], rel=1e-4)
        for method in METHODS:
            same(row[method], row[f"{method}_exponent"], sample, method)
    assert met[0]["refused"].startswith("not an image")
    assert met[0]["prediction"] == met[0]["target"] == -1
    assert not met[0]["gradient"].any()


PIXELS = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
FILE = png(Image.fromarray(PIXELS))
PALETTE = Image.fromarray(PIXELS).quantize(64)
ALPHA = np.full((20, 24, 1), 128, np.uint8)
# An image, and the pixels that it must be explained as.
USABLE: dict[str, tuple[object, object]] = {
    "Hugging Face": ({"bytes": FILE, "path": "x.png"}, PIXELS),
    "bytearray": (bytearray(FILE), PIXELS),
    "memoryview": (memoryview(FILE), PIXELS),
    "numpy's bytes": (np.frombuffer(FILE, np.uint8), PIXELS),
    "Pillow": (Image.fromarray(PIXELS), PIXELS),
    "Pillow's palette": (PALETTE, np.asarray(PALETTE.convert("RGB"))),
    "Pillow's alpha": (Image.fromarray(np.concatenate([PIXELS, ALPHA], 2)), PIXELS),
    "Pillow's gray": (Image.fromarray(PIXELS[..., 0]), PIXELS[..., :1]),
    "RGBA": (np.concatenate([PIXELS, ALPHA], 2), PIXELS),
    "LA": (np.concatenate([PIXELS[..., :1], ALPHA], 2), PIXELS[..., 0]),
    "columns first": (np.asfortranarray(PIXELS), PIXELS),
}
REJECTED: dict[str, object] = {
    "null": None,
    "nan": float("nan"),
    "a struct of nulls": {"bytes": None, "path": None},
    "a path": "/data/x.jpg",
    "a struct with a path": {"bytes": None, "path": "/data/x.jpg"},
    "a ragged list": [[[1, 2], [3]]],
    "no pixels": np.zeros((0, 0, 3), np.uint8),
    "no bytes": b"",
    "five channels": np.zeros((8, 8, 5), np.uint8),
    "four dimensions": np.zeros((1, 8, 8, 3), np.uint8),
    "uint16": np.zeros((8, 8, 3), np.uint16),
    "integers of the model's shape": np.zeros((3, 16, 16), np.int64),
    "booleans": np.zeros((3, 16, 16), bool),
    "floats of another shape": np.zeros((16, 16, 3), np.float32),
    "objects": np.full((3, 16, 16), None),
    "an object": object(),
}


def column(images: list[object]) -> np.ndarray:
    array = np.empty(len(images), dtype=object)
    for number, image in enumerate(images):
        array[number] = image
    return array


@pytest.fixture(scope="module")
def batch(fitted: str) -> ExplainBatch:
    return ExplainBatch(run=fitted, methods=METHODS)


@pytest.mark.parametrize(("image", "pixels"), USABLE.values(), ids=USABLE)
def test_an_image_of_every_type_is_explained_as_its_pixels(batch: ExplainBatch, image: object, pixels: object) -> None:
    found = batch({"image": column([image, pixels])})
    assert found["refused"].tolist() == ["", ""]
    assert np.array_equal(found["gradient"][0], found["gradient"][1])
    assert found["gradient"][0].any()


@pytest.mark.parametrize("image", REJECTED.values(), ids=REJECTED)
def test_a_value_that_is_no_image_is_rejected_without_the_others(batch: ExplainBatch, image: object) -> None:
    found = batch({"image": column([PIXELS, image, PIXELS])})
    assert [bool(reason) for reason in found["refused"]] == [False, True, False]
    assert found["prediction"][1] == -1
    assert np.array_equal(found["gradient"][0], found["gradient"][2])


def test_an_empty_batch_has_every_column(batch: ExplainBatch) -> None:
    empty, full = (batch({"image": column(images)}) for images in ([], [PIXELS]))
    assert {name: values.shape for name, values in empty.items()} == {
        name: (0, *values.shape[1:]) for name, values in full.items()
    }


def test_images_are_files_pixels_or_tensors(fitted: str, written: list[tuple[Sample, Sample]]) -> None:
    explainer = OnlineExplainer(fitted, METHODS)
    file = written[0][0].files["jpg"]
    pixels = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
    inputs, reasons = explainer.decode_images([file, pixels])
    assert reasons == ["", ""]
    assert np.array_equal(inputs[0], inputs[1])
    again, _ = explainer.decode_images([inputs[0].numpy()])
    assert np.array_equal(again[0], inputs[0])
    gray, reasons = explainer.decode_images(
        [pixels[..., 0], pixels[..., :1], np.repeat(pixels, 2, 2), np.zeros((2, 2))]
    )
    assert reasons[:2] == ["", ""]
    assert reasons[2].startswith("pixels of shape (16, 16, 6)")
    assert "a tensor of shape (2, 2)" in reasons[3]
    assert np.array_equal(gray[0], gray[1])


def test_a_batch_without_usable_images_has_a_reason_in_every_row(fitted: str) -> None:
    found = ExplainBatch(fitted, METHODS)({"bytes": np.array([b"x", b""], dtype=object)})
    assert [bool(reason) for reason in found["refused"]] == [True, True]
    assert found["gradient"].shape == (2, 3, 16, 16)
    with pytest.raises(UserError, match="no column `image` or `bytes` among picture"):
        ExplainBatch(fitted, METHODS)({"picture": np.zeros(1)})


def test_a_target_that_needs_labels_is_rejected(fitted: str) -> None:
    with pytest.raises(UserError, match="have no label") as error:
        OnlineExplainer(fitted, METHODS, target="label")
    assert error.value.parameter == "target"


# --- over HTTP ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def endpoint(local_ray: None, fitted: str) -> Iterator[str]:
    serve.start(http_options={"host": "127.0.0.1", "port": 8765})
    serve.run(app({"run": fitted, "methods": ",".join(METHODS), "max_bytes": "100K"}), name="patterns")
    yield "http://127.0.0.1:8765"
    serve.shutdown()


def test_an_uploaded_image_gets_the_maps_of_the_job(endpoint: str, written: list[tuple[Sample, Sample]]) -> None:
    assert httpx.get(f"{endpoint}/health").json() == {"methods": list(METHODS), "max_bytes": 100 * 1024}
    image, sample = written[0]
    found = httpx.post(f"{endpoint}/explain", content=image.files["jpg"], timeout=60)
    assert found.status_code == 200
    answer, expected = found.json(), json.loads(sample.files["json"])
    assert (answer["prediction"], answer["target"]) == (expected["prediction"], expected["target"])
    for method in METHODS:
        array = np.load(io.BytesIO(base64.b64decode(answer["maps"][method]["npy"])))
        same(array, answer["maps"][method]["exponent"], sample, method)
    picture = httpx.post(f"{endpoint}/explain?picture=gradient", content=image.files["jpg"], timeout=60)
    assert picture.headers["content-type"] == "image/png"
    assert picture.content == base64.b64decode(answer["maps"]["gradient"]["png"])


def test_simultaneous_requests_get_the_maps_of_their_own_image(
    endpoint: str, written: list[tuple[Sample, Sample]]
) -> None:
    barrier = threading.Barrier(len(written))

    def ask(image: Sample) -> httpx.Response:
        barrier.wait()
        return httpx.post(f"{endpoint}/explain", content=image.files["jpg"], timeout=60)

    with ThreadPoolExecutor(len(written)) as pool:
        answers = list(pool.map(ask, [image for image, _ in written]))
    for answer, (_, sample) in zip(answers, written):
        array = np.load(io.BytesIO(base64.b64decode(answer.json()["maps"]["gradient"]["npy"])))
        same(array, answer.json()["maps"]["gradient"]["exponent"], sample, "gradient")


@pytest.mark.parametrize(
    ("query", "body", "status", "detail"),
    [
        ("", b"no image", 422, "not an image"),
        ("", b"", 422, "an empty file"),
        ("", b"x" * 200_000, 413, "more than 102400 bytes"),
        ("?picture=lrp", b"", 422, "no method 'lrp'; there are gradient, patternattribution"),
    ],
)
def test_a_request_that_cannot_be_answered_gets_a_reason(
    endpoint: str, query: str, body: bytes, status: int, detail: str
) -> None:
    found = httpx.post(f"{endpoint}/explain{query}", content=body, timeout=60)
    assert found.status_code == status
    assert found.json()["detail"].startswith(detail)


def test_missing_and_unknown_arguments_are_rejected(fitted: str) -> None:
    with pytest.raises(UserError, match="missing") as error:
        app({})
    assert error.value.where == "run"
    with pytest.raises(UserError, match="unknown argument") as error:
        app({"runs": fitted})
    assert error.value.where == "runs"
