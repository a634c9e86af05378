"""Preprocessing equals the transform of the model's library: timm's evaluation transform, torchvision's presets."""

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from timm.data import create_transform, resolve_data_config  # type: ignore[attr-defined]

from patterns import UserError
from ray_jobs.config import FitConfig, ModelConfig, Preprocessing
from ray_jobs.data.annotations import parse_boxes
from ray_jobs.data.image_decoding import decode
from ray_jobs.models import loading
from ray_jobs.models.libraries import convert_timm_config, convert_torchvision_preset, has_torchvision_weights
from ray_jobs.models.loading import IMAGENET, override_preprocessing
from ray_jobs.runs.run_folder import Run
from tests.ray_jobs.runs import PREPROCESSING

LEVEL = 2 / 255  # pixels may differ by two levels of 255, as docs/data.md says
SIZES = [(500, 375), (375, 500), (61, 40), (224, 224), (640, 90)]


def photograph(width: int, height: int) -> bytes:
    rng = np.random.default_rng(width)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8))
    buffer = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "png")
    return buffer.getvalue()


def compare(expected: torch.Tensor, data: bytes, preprocessing: Preprocessing) -> None:
    found = decode({"png": data}, preprocessing)
    assert found.shape == expected.shape
    difference = (found - expected).abs() * torch.tensor(preprocessing.std).view(-1, 1, 1)
    assert difference.max() <= LEVEL + 1e-6
    assert difference.mean() <= LEVEL / 10


def timm_configs() -> Iterator[tuple[str, dict[str, Any]]]:
    for name in timm.list_models(pretrained=True):
        found = timm.get_pretrained_cfg(name)  # type: ignore[attr-defined]
        yield name, resolve_data_config(pretrained_cfg=found.to_dict())


@pytest.mark.full
def test_every_pretrained_configuration_of_timm_is_converted_or_rejected_by_name() -> None:
    kinds: dict[tuple[Any, ...], dict[str, Any]] = {}
    rejected = []
    for name, config in timm_configs():
        if config["input_size"][1] != config["input_size"][2]:
            with pytest.raises(UserError, match=name):
                convert_timm_config(config, f"timm:{name}")
            rejected.append(name)
            continue
        preprocessing = convert_timm_config(config, f"timm:{name}")
        assert preprocessing.input_shape == config["input_size"]
        small = config["input_size"][1] <= 256  # large images would only take longer
        kind = config["crop_mode"], config["interpolation"], config["crop_pct"] == 1, config["crop_pct"] > 1, small
        kinds.setdefault(kind, config)
    assert rejected
    assert {kind[0] for kind in kinds} == {"center", "squash", "border"}
    for config in kinds.values():
        transform = create_transform(**config, is_training=False)
        for size in SIZES[:3]:
            data = photograph(*size)
            expected = transform(Image.open(io.BytesIO(data)).convert("RGB"))
            compare(expected, data, convert_timm_config(config, "timm:x"))


@pytest.mark.cases
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest", "lanczos"])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0, 1.15])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_transform_of_timm_is_reproduced(
    crop_mode: str, interpolation: str, crop_pct: float, channels: int
) -> None:
    mean, std = (0.4, 0.5, 0.6)[:channels], (0.2, 0.3, 0.4)[:channels]
    common = {"crop_mode": crop_mode, "interpolation": interpolation, "crop_pct": crop_pct, "mean": mean, "std": std}
    config = {**common, "input_size": (channels, 56, 56)}
    transform = create_transform(**config, is_training=False)
    for size in SIZES:
        data = photograph(*size)
        expected = transform(Image.open(io.BytesIO(data)).convert("RGB" if channels == 3 else "L"))
        compare(expected, data, convert_timm_config(config, "timm:x"))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"input_size": (3, 1024, 768)}, "1024×768"),
        ({"input_size": (4, 32, 32)}, "4 channels"),
        ({"input_size": (1, 32, 32)}, "1 channels"),
        ({"interpolation": "random"}, "'random'"),
        ({"crop_mode": "corner"}, "'corner'"),
    ],
)
def test_unsupported_transform_is_named(changed: dict[str, Any], named: str) -> None:
    config = {"input_size": (3, 32, 32), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(UserError) as caught:
        convert_timm_config({**config, "crop_pct": 0.9, "crop_mode": "center", **changed}, "timm:x")
    assert named in caught.value.what


@pytest.mark.full
def test_every_preset_of_torchvisions_classifiers_is_reproduced() -> None:
    presets: dict[tuple[Any, ...], Any] = {}
    for name in torchvision.models.list_models(module=torchvision.models):
        for weights in torchvision.models.get_model_weights(name):
            assert has_torchvision_weights(f"torchvision:{name}", weights.name)
            preset = weights.transforms()
            found = convert_torchvision_preset(preset, name)
            presets.setdefault((found.interpolation, found.resize == found.image_size, found.std), preset)
    assert len(presets) > 4
    for preset in presets.values():
        for size in SIZES[:3]:
            data = photograph(*size)
            expected = preset(Image.open(io.BytesIO(data)).convert("RGB"))
            compare(expected, data, convert_torchvision_preset(preset, "x"))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(80, 40), (40, 80), (50, 50), (33, 47)])
@pytest.mark.parametrize("resize", [24, 32, 37])
def test_boxes_stay_on_their_objects(crop_mode: str, size: tuple[int, int], resize: int) -> None:
    width, height = size
    box = (width // 4, height // 4, 3 * width // 4, 3 * height // 4)
    image = np.zeros((height, width), np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = 255
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    sample = {"png": buffer.getvalue(), "json": json.dumps({"boxes": [box]}).encode()}
    preprocessing = Preprocessing(
        image_size=32, resize=resize, interpolation="bilinear", mean=(0.0,), std=(1.0,), crop_mode=crop_mode
    )
    ((x0, y0, x1, y1),) = parse_boxes(sample, preprocessing) or ()
    rows, columns = (decode(sample, preprocessing)[0] > 0.5).nonzero(as_tuple=True)
    found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    expected = [min(max(edge, 0), 32) for edge in (x0, y0, x1, y1)]
    assert np.abs(np.array([float(edge) for edge in found]) - expected).max() <= 1


@pytest.mark.parametrize(
    ("mean", "std", "named"),
    [
        ((0.5,) * 3, (0.0,) * 3, "0,0,0"),
        ((0.5,) * 3, (0.2, -0.2, 0.2), "0.2,-0.2,0.2"),
        ((float("nan"),) * 3, (1.0,) * 3, "nan,nan,nan"),
        ((0.5,) * 3, (float("inf"),) * 3, "inf,inf,inf"),
        ((0.5,), (0.5,) * 3, "1 means and 3"),
    ],
)
def test_invalid_means_and_deviations_are_an_error(mean: tuple[float, ...], std: tuple[float, ...], named: str) -> None:
    with pytest.raises(UserError) as caught:
        override_preprocessing(IMAGENET, ModelConfig(spec="m.py:net", mean=mean, std=std))
    assert named in caught.value.what


@pytest.mark.parametrize("std", [(58.395, 57.12, 57.375), (1.0, 1.0, 1.0)])
def test_means_on_the_scale_of_bytes_are_an_error_that_names_the_right_values(std: tuple[float, ...]) -> None:
    mean = (123.675, 116.28, 103.53)
    with pytest.raises(UserError) as caught:
        override_preprocessing(IMAGENET, ModelConfig(spec="m.py:net", mean=mean, std=std))
    words = caught.value.remedy.rstrip(".").split()
    advised = {word: tuple(map(float, words[words.index(word) + 1].split(","))) for word in ("--mean", "--std")}
    pixels = torch.rand(3, 8)
    as_meant = (255 * pixels - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]
    as_advised = (pixels - torch.tensor(advised["--mean"])[:, None]) / torch.tensor(advised["--std"])[:, None]
    torch.testing.assert_close(as_advised, as_meant, rtol=1e-3, atol=1e-2)
    override_preprocessing(IMAGENET, ModelConfig(spec="m.py:net", mean=advised["--mean"], std=advised["--std"]))


def test_run_whose_manifest_lacks_newer_fields_resumes(model_spec: str, tmp_path: Path) -> None:
    config = FitConfig(
        model=ModelConfig(spec=model_spec, **PREPROCESSING), shards=("a.tar",), out=str(tmp_path / "run")
    )  # type: ignore[arg-type]
    loaded, run = loading.load(config.model), Run(config.out)
    section = run.section("fit", config, loaded)
    del section["options"]["preprocessing"]["crop_mode"]
    run.record("fit", section, loaded)
    assert Run(config.out).section("fit", config, loaded)["options"] == section["options"]
    squash = replace(loaded.preprocessing, crop_mode="squash")
    assert asdict(squash) != asdict(loaded.preprocessing)
    with pytest.raises(UserError, match="preprocessing"):
        Run(config.out).section("fit", config, replace(loaded, preprocessing=squash))


def test_mean_without_deviation_is_converted_alone() -> None:
    with pytest.raises(UserError) as caught:
        override_preprocessing(IMAGENET, ModelConfig(spec="m.py:net", mean=(123.675, 116.28, 103.53)))
    assert caught.value.where == "--mean"
    assert "--std" not in caught.value.remedy
