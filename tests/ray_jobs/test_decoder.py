"""The user's decoder, from a sample's files to the model's input."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from patterns import UserError, load
from ray_jobs.cli.app import make_app
from ray_jobs.config import FitConfig, ModelConfig, Resources
from ray_jobs.config.parsing import parse_function
from ray_jobs.data.decoders import call_decoder, load_decoder
from ray_jobs.data.samples import Sample, SampleError
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.jobs.input_size import read_first_shape
from ray_jobs.views.gallery import open_gallery
from tests.conftest import write_tar

HERE = Resources(workers=0)
CODE = """
import io
import numpy as np
import torch
from torch import nn
from scaling import WHITE


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(5, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3))


def decode(sample):
    if sample["__key__"] == "dark":
        raise ValueError("no light")
    values = np.frombuffer(sample["raw"], np.uint16).reshape(5, -1, 8) / WHITE
    return values / 0 if sample["__key__"] == "bright" else values
"""
SAMPLES = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder that imports a file of its folder, a model, a shard of 16-bit values, and one of the ready tensors."""
    folder = tmp_path_factory.mktemp("decoder")
    (folder / "mine.py").write_text(CODE)
    (folder / "scaling.py").write_text("WHITE = 65535")
    rng = np.random.default_rng(0)
    values = rng.integers(0, 65536, (SAMPLES, 5, 8, 8), np.uint16)
    raw: list[dict[str, object]] = [
        {"__key__": f"s{number}", "RAW": each.tobytes()} for number, each in enumerate(values)
    ]
    raw[3] = raw[3] | {"__key__": "dark"}
    raw[4] = raw[4] | {"__key__": "bright"}
    raw[5] = raw[5] | {"RAW": values[5][:, :4].tobytes()}
    write_tar(folder / "raw-0.tar", raw)
    write_tar(
        folder / "npy-0.tar",
        [
            {"__key__": f"s{number}", "npy": npy((each / 65535).astype(np.float32))}
            for number, each in enumerate(values)
            if number not in (3, 4, 5)
        ],
    )
    return folder


def npy(array: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_fit_with_a_decoder_has_the_patterns_of_ready_tensors(folder: Path, tmp_path: Path) -> None:
    found, expected = (
        fit(
            FitConfig(
                model=ModelConfig(spec=f"{folder / 'mine.py'}:net", decoder=decoder),
                shards=(str(folder / f"{kind}-0.tar"),), out=str(tmp_path / kind), batch_size=4,
            ),
            HERE,
        )
        for kind, decoder in (("raw", f"{folder / 'mine.py'}:decode"), ("npy", None))
    )  # fmt: skip
    ours, theirs = (load(str(run.folder), None) for run in (found, expected))
    for name, estimators in theirs.items():
        for estimator, pattern in estimators.items():
            torch.testing.assert_close(ours[name][estimator], pattern, rtol=1e-5, atol=1e-7)
    rejected = {row["key"]: row["reason"] for row in pq.read_table(tmp_path / "raw/quarantine.parquet").to_pylist()}
    assert rejected["dark"].startswith("the decoder failed (ValueError: no light, at ")
    assert "mine.py:" in rejected["dark"]
    assert rejected["bright"] == "the decoder returned values that are not finite"
    assert rejected["s5"] == "the decoder returned the shape (5, 4, 8), but the model takes (5, 8, 8)"
    assert len(rejected) == 3


def test_later_jobs_and_pictures_use_the_decoder_of_the_fit(folder: Path, tmp_path: Path) -> None:
    shards = str(folder / "raw-0.tar")
    model, decoder, out = f"{folder / 'mine.py'}:net", f"{folder / 'mine.py'}:decode", str(tmp_path / "run")
    for command in (
        ["fit", "--model", model, "--decoder", decoder, "--out", out],
        ["explain", "--patterns", out, "--methods", "gradient"],
    ):
        common = ["--shards", shards, "--workers", "0", "--max-bad-fraction", "0.9"]
        assert CliRunner().invoke(make_app(), [*command, *common]).exit_code == 0
    assert pq.read_table(tmp_path / "run/explanations.parquet").num_rows == SAMPLES - 3
    gallery = open_gallery(str(tmp_path / "run"), None)
    pictures = gallery.pictures([gallery.find(key) for key in ("s0", "s1")])
    assert [picture.photograph.size for picture in pictures] == [(8, 8), (8, 8)]


@pytest.mark.ray
@pytest.mark.full
def test_workers_of_ray_import_the_decoder(local_ray: None, folder: Path, tmp_path: Path) -> None:
    config = FitConfig(
        model=ModelConfig(spec=f"{folder / 'mine.py'}:net", decoder=f"{folder / 'mine.py'}:decode"),
        shards=(str(folder / "raw-0.tar"),), out=str(tmp_path),
    )  # fmt: skip
    assert fit(config, Resources(workers=1, gpus_per_worker=0)).manifest()["fit"]["samples"] == SAMPLES - 3


@pytest.mark.full
@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "sys.exit()"])
def test_decoder_that_ends_its_process_costs_one_sample(folder: Path, tmp_path: Path, end: str) -> None:
    code = f"import os, sys, torch\n\n\ndef decode(sample):\n    {end} if sample['__key__'] == 's0' else None\n"
    (tmp_path / "ending.py").write_text(f"{code}    return torch.zeros(5, 8, 8)\n")
    assert read_first_shape(str(folder / "raw-0.tar"), f"{tmp_path / 'ending.py'}:decode") == (5, 8, 8)
    if end == "sys.exit()":  # without processes that decode
        decode = load_decoder(f"{tmp_path / 'ending.py'}:decode")
        with pytest.raises(SampleError, match=r"the decoder failed \(SystemExit"):
            call_decoder(decode, Sample("s0", {}))


@pytest.mark.parametrize(
    ("name", "what"),
    [("mine.py:encode", "no attribute 'encode'"), ("mine.py:WHITE", "no function"),
     ("other.py:f", "cannot be imported"), ("nowhere.at_all:f", "cannot be imported")],
)  # fmt: skip
def test_decoder_that_cannot_be_imported_is_one_error(folder: Path, tmp_path: Path, name: str, what: str) -> None:
    place = name if name.startswith("nowhere") else str(folder / name)
    spec = f"{folder / 'mine.py'}:net"
    model = ModelConfig(spec=spec, decoder=place, image_size=8, mean=(0.0,) * 5, std=(1.0,) * 5)
    config = FitConfig(model=model, shards=(str(folder / "raw-0.tar"),), out=str(tmp_path))
    with pytest.raises(UserError) as caught:
        fit(config, HERE)
    assert caught.value.where.startswith(f"--decoder {place}")
    assert what in caught.value.what


@pytest.mark.parametrize("text", ["decode", ":decode", "mine.py", "mine.py:", "mine.py:a-b"])
def test_text_that_names_no_function_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="names no function"):
        parse_function(text)
