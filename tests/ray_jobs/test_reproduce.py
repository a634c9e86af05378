"""The paper's experiments in one command: a run on two thousand images, missing data, and the findings."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.datasets import load_digits

from patterns import UserError
from ray_jobs.cli.app import exit_status
from ray_jobs.config import ModelConfig
from ray_jobs.data.shard_reader import ReaderConfig, ShardReader
from ray_jobs.models.loading import load
from ray_jobs.runs.run_folder import Run
from ray_jobs.studies.datasets import read_digits, read_idx, write_digits
from ray_jobs.studies.reproduce import compare_findings

pytestmark = pytest.mark.full

TRAIN, TEST = 2000, 1000


def idx(array: np.ndarray) -> bytes:
    """Return an idx file of bytes, written by the format's description."""
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's digits at 28×28, shifted by up to 4 pixels, in files with the names of MNIST."""
    folder, rng = tmp_path_factory.mktemp("digits"), np.random.default_rng(0)
    small, labels = load_digits(return_X_y=True)
    large = np.kron(small.reshape(-1, 8, 8) * 15.9, np.ones((3, 3))).astype(np.uint8)
    for part, count in (("train", TRAIN), ("t10k", TEST)):
        chosen = rng.integers(0, len(large), count)
        images = np.zeros((count, 28, 28), np.uint8)
        for image, digit in zip(images, large[chosen]):
            y, x = rng.integers(0, 5, 2)
            image[y : y + 24, x : x + 24] = digit
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels[chosen].astype(np.uint8))))
    return folder


@pytest.mark.slow
def test_the_experiments_run_on_two_thousand_images(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = f"reproduce --dataset mnist --data {files} --out {out} --degraded 60 --batch-size 50 --workers 0"
    assert exit_status(command.split()) == 0
    run = Run(out / "run")
    manifest = run.manifest()
    halves = [manifest["fit"]["options"]["shards"], manifest["quality"]["options"]["shards"]]
    assert [manifest["fit"]["samples"], manifest["quality"]["regressed"]] == [TRAIN // 2, TRAIN // 2]
    assert not set(halves[0]) & set(halves[1])
    assert manifest["quality"]["evaluated"] == TEST
    rho = pq.read_table(out / "run" / "quality.parquet").drop_null().to_pandas()
    median = rho.groupby("estimator")["rho"].median()
    assert median["random"] < 0.05
    assert median["linear"] > 0.5
    text = (out / "results.md").read_text()
    right = float(text.split("degraded, ")[1].split("%")[0])
    assert right > 75  # the network was trained
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    heads = table[0][2:]
    (first,) = [line[2:] for line in table if line[0] == "`0`"]
    expected = rho[rho["operator"] == "0"].groupby("estimator")["rho"].median()
    assert first == [f"{expected[name]:.3f}" for name in heads]
    assert heads == ["random", "filter", "linear", "two-component"]
    areas = manifest["degrade"]["areas"]
    assert areas["patternattribution"]["area"] > areas["random"]["area"]
    for number in (3, 4, 5, 6):
        assert (out / f"figure-{number}.png").read_bytes().startswith(b"\x89PNG")
        assert f"(figure-{number}.png)" in text
    written = {path: path.read_bytes() for path in out.glob("*.*")}
    assert exit_status(command.split()) == 0
    assert {path: path.read_bytes() for path in out.glob("*.*")} == written  # nothing was trained or computed again


def test_shards_contain_the_images_and_labels_of_the_files(files: Path, tmp_path: Path) -> None:
    images, labels = read_digits(files, "train", 100)
    paths = write_digits(images, labels, tmp_path, "train")
    assert len(paths) == 8
    model = ModelConfig(
        spec="ray_jobs.studies.small_cnn:small_cnn", weights="random", image_size=28, resize=28, mean=(0.5,), std=(0.5,)
    )
    batches = [b for path in paths for b in ShardReader(str(path), ReaderConfig(load(model).preprocessing, 7))]
    x = torch.cat([batch.images for batch in batches])
    torch.testing.assert_close(x[:, 0], torch.from_numpy(images.copy()).float() / 127.5 - 1)
    assert [label for batch in batches for label in batch.labels] == labels.tolist()


@pytest.mark.parametrize("spoil", ["", "cut", "ints", "short"])
def test_a_file_that_is_no_complete_idx_file_is_rejected(tmp_path: Path, spoil: str) -> None:
    path = tmp_path / "file"
    whole = idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    assert read_idx_of(path, whole).tolist() == np.arange(24).reshape(2, 3, 4).tolist()
    spoilt = {"": b"", "cut": whole[:-1], "ints": whole[:2] + b"\x0c" + whole[3:], "short": whole[:9]}[spoil]
    with pytest.raises(UserError, match="not a complete idx file"):
        read_idx_of(path, spoilt)


def read_idx_of(path: Path, data: bytes) -> np.ndarray:
    path.write_bytes(data)
    return read_idx(path)


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ("--dataset mnist", "--data: no folder with the files of mnist"),
        ("--dataset mnist --data /nowhere", "/nowhere: holds neither train-images-idx3-ubyte nor train-images-idx3-"),
        ("--dataset cifar --data /nowhere", "--dataset: no dataset 'cifar'. Choose from mnist, fashion-mnist, folder."),
        ("--model torchvision:vgg16", "reproduce: neither a data set with its own model nor a model with data."),
    ],
)
def test_a_command_without_its_data_is_rejected(
    complaint: Callable[..., str], tmp_path: Path, options: str, phrase: str
) -> None:
    assert phrase in complaint(*f"reproduce --out {tmp_path / 'out'} {options}".split())
    assert not (tmp_path / "out").exists()


def test_findings_name_the_operators_that_differ_from_the_paper() -> None:
    kinds = {"a": "convolution", "b": "convolution", "c": "linear", "d": "linear"}
    rho = {
        "random": dict.fromkeys(kinds, 0.0),
        "filter": {"a": 0.5, "b": 0.01, "c": 0.3, "d": 0.0},
        "linear": {"a": 0.9, "b": 0.7, "c": 0.2, "d": 0.8},
        "two-component": {"a": 0.92, "b": 0.9, "c": 0.5},
    }
    assert compare_findings(rho, kinds) == [
        "- In convolutions, linear and two-component are comparable: differs in `b` (-0.2000).",
        "- In dense layers, two-component is best: as in the paper.",
        "- Above the first layer, the filter is little better than random: differs in `c` (+0.3000).",
    ]
