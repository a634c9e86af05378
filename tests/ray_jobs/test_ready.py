"""Ready tensors: the input shape is taken from them, as if it had been passed by options."""

import io
from pathlib import Path

import numpy as np
import pytest

from patterns import UserError
from ray_jobs.config import FitConfig, ModelConfig, Resources
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.jobs.input_size import infer_input_size
from tests.conftest import jpeg, make_shards, write_tar

HERE = Resources(workers=0)
NET = """
from torch import nn
def net(): return nn.Sequential(nn.Conv2d({0}, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 26 * 26, 3))
"""


def npy(*shape: int) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.random.default_rng(sum(shape)).random(shape, np.float32))
    return buffer.getvalue()


def tensors(path: Path, *shape: int, first: dict[str, object] | None = None) -> str:
    samples: list[dict[str, object]] = [] if first is None else [{"__key__": "first", **first}]
    return str(write_tar(path, samples + [{"__key__": f"s{i}", "npy": npy(*shape), "cls": b"1"} for i in range(4)]))


@pytest.mark.full
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_fit_of_ready_tensors_needs_no_options(tmp_path: Path, channels: int) -> None:
    (tmp_path / "m.py").write_text(NET.format(channels))
    shards = (tensors(tmp_path / "a.tar", channels, 28, 28), tensors(tmp_path / "b.tar", channels, 28, 28))
    spec = f"{tmp_path / 'm.py'}:net"
    config = FitConfig(model=ModelConfig(spec=spec), shards=shards, out=str(tmp_path / "run"))
    explicit = ModelConfig(spec=spec, image_size=28, resize=28, mean=(0.0,) * channels, std=(1.0,) * channels)
    run = fit(config, HERE)
    assert run.manifest()["fit"]["samples"] == 8
    assert ModelConfig(**run.read_fitted_model()) == explicit
    for shard in shards:  # a finished fit does not need its data
        Path(shard).unlink()
    assert fit(config, HERE).manifest() == run.manifest()


def test_other_data_and_options_do_not_change_a_config(tmp_path: Path) -> None:
    config = ModelConfig(spec="m.py:net")
    images = make_shards(tmp_path, 1, 2)
    small = tensors(tmp_path / "small.tar", 1, 8, 8)
    assert infer_input_size(config, images) == config
    assert infer_input_size(config, [tensors(tmp_path / "usual.tar", 3, 224, 224)]) == config
    both = {"jpg": jpeg(np.random.default_rng(0)), "npy": npy(7, 7, 7)}
    assert infer_input_size(config, [tensors(tmp_path / "both.tar", 1, 8, 8, first=both)]) == config
    for other in (ModelConfig(spec="m.py:net", mean=(0.5,), std=(0.5,)), ModelConfig(spec="timm:resnet18")):
        assert infer_input_size(other, [small]) == other
    assert infer_input_size(config, [str(tmp_path / "none.tar")]) == config


@pytest.mark.parametrize("first", [{"npy": b"no tensor"}, {"npy": npy(3)}, {"txt": b"text"}])
def test_first_sample_with_a_shape_determines_the_shape(tmp_path: Path, first: dict[str, object]) -> None:
    shards = [str(tmp_path / "none.tar"), tensors(tmp_path / "a.tar", 2, 8, 8, first=first)]
    found = infer_input_size(ModelConfig(spec="m.py:net"), shards)
    assert (found.image_size, found.resize, found.mean, found.std) == (8, 8, (0.0, 0.0), (1.0, 1.0))


def test_tensors_that_are_not_square_are_an_error(tmp_path: Path) -> None:
    shard = tensors(tmp_path / "a.tar", 3, 8, 9)
    with pytest.raises(UserError) as caught:
        infer_input_size(ModelConfig(spec="m.py:net"), [shard])
    assert caught.value.where == shard
    assert "(3, 8, 9)" in caught.value.what


@pytest.mark.full
def test_images_are_rejected_by_a_model_with_another_number_of_channels(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(NET.format(2))
    samples = [{"__key__": "s0", "npy": npy(2, 28, 28)}, {"__key__": "s1", "jpg": jpeg(np.random.default_rng(0))}]
    shard = str(write_tar(tmp_path / "a.tar", samples))
    run = fit(
        FitConfig(model=ModelConfig(spec=f"{tmp_path / 'm.py'}:net"), shards=(shard,), out=str(tmp_path / "run")), HERE
    )
    section = run.manifest()["fit"]
    assert (section["samples"], section["refused"]) == (1, 1)
