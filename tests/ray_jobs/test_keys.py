"""Keys: different names have different keys, and every output and library keeps them."""

import io
import os
import tarfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import example, given
from hypothesis import strategies as st

from ray_jobs.cli.app import exit_status
from ray_jobs.config import OUTPUTS, ExplainConfig, ModelConfig, Resources
from ray_jobs.data.samples import make_key
from ray_jobs.data.tar_reader import read_samples
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.runs.run_folder import Run
from ray_jobs.views.gallery import Gallery
from tests.conftest import jpeg, write_tar

HERE = Resources(workers=0)
NAMES = [
    *("a.b", "a,b", "a%20b", "a b", " ends ", "100%", ".", "..", "../x", "/x", "a//b", "a/", "a/.x", "a\nb", "a\\b"),
    *(
        "__meta__",
        "__x__/y",
        "_x",
        "http://x.org/1.jpg",
        "\x85",
        "\u2028",
        "日本/é",
        "-x",
        "#1",
        "'\"",
        "x?y*[z]",
        "COM1",
    ),
]
TAR_KEYS = [
    "a b",
    "a,b",
    "a%20b",
    "b",
    "100%",
    "x/y,z",
    "日本",
    "a;b",
    "-x",
]  # that WebDataset supports


@pytest.mark.full
@given(st.text(min_size=1, max_size=20) | st.lists(st.sampled_from("a._/%, \\-é\n"), min_size=1).map("".join))
@example("caf\udce9")
def test_key_can_be_decoded_and_survives_a_tar(name: str) -> None:
    key = make_key(name)
    assert unquote(key, errors="surrogateescape") == name
    assert not set(key) & {".", ",", "\\"}
    buffer = io.BytesIO()
    tar = webdataset.TarWriter(buffer, encoder=False)
    tar.write({"__key__": key, "cls": b"1", "x.npy": b"2"})
    tar.close()
    (ours,) = read_samples(io.BytesIO(buffer.getvalue()))
    assert ours == {"__key__": key, "cls": b"1", "x.npy": b"2"}
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as archive:
        members = archive.getnames()
    assert [webdataset.tariterators.base_plus_ext(m) for m in members] == [(key, "cls"), (key, "x.npy")]


def explained(fitted: str, model: ModelConfig, shard: Path, outputs: tuple[str, ...] = ("npy", "png")) -> Run:
    out = str(shard.parent / "run")
    return explain(
        ExplainConfig(
            model=model, patterns=fitted, shards=(str(shard),), out=out, methods=("gradient",), outputs=outputs
        ),
        HERE,
    )


def photographs(count: int) -> list[bytes]:
    return [jpeg(np.random.default_rng(i)) for i in range(count)]


def read_back(path: Path) -> list[dict[str, Any]]:
    return list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))


def test_every_output_has_a_sample_for_every_name(fitted: str, model: ModelConfig, tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr", reason="needs zarr: pip install zarr")
    shard = tmp_path / "x.parquet"
    pq.write_table(pa.table({"key": NAMES, "jpg": photographs(len(NAMES))}), shard)
    run = explained(fitted, model, shard, OUTPUTS)
    folder = tmp_path / "run" / "explanations"
    found = read_back(folder / "x.tar")
    assert [unquote(sample["__key__"]) for sample in found] == NAMES
    assert all({"json", "gradient.npy", "gradient.png"} <= set(sample) for sample in found)
    keys = [sample["__key__"] for sample in found]
    assert pq.read_table(folder / "x.maps.parquet")["key"].to_pylist() == keys
    assert pq.read_table(tmp_path / "run" / "explanations.parquet")["key"].to_pylist() == keys
    with zarr.storage.ZipStore(folder / "x.zarr.zip", mode="r") as store:
        assert zarr.open_group(store, mode="r").attrs["keys"] == keys
    assert [row["key"] for row in Gallery(run, {}).find_all(",".join(keys))] == keys


def test_names_of_a_folder_are_restored_whether_read_or_packed(fitted: str, model: ModelConfig, tmp_path: Path) -> None:
    names = [name.encode("utf-8", "surrogateescape") for name in ("1", "a.b", "a,b", "a b", " x", "é", "caf\udce9")]
    (tmp_path / "f" / "cat").mkdir(parents=True)
    for name, data in zip(names, photographs(len(names))):
        Path(os.fsdecode(bytes(tmp_path / "f" / "cat") + b"/" + name + b".jpg")).write_bytes(data)
    assert exit_status(["pack", str(tmp_path / "f"), str(tmp_path / "packed")]) == 0
    shard = tmp_path / "packed" / "000000.tar"
    for found in (read_back(shard), read_back(explained(fitted, model, shard).folder / "explanations" / "000000.tar")):
        keys = [unquote(sample["__key__"], errors="surrogateescape") for sample in found]
        assert sorted(os.fsencode(key) for key in keys) == sorted(b"cat/" + name for name in names)


@pytest.mark.full
def test_samples_are_chosen_by_key_or_name(
    fitted: str, model: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], complaint: Any
) -> None:
    shard = write_tar(
        tmp_path / "x.tar", [{"__key__": key, "jpg": data} for key, data in zip(TAR_KEYS, photographs(len(TAR_KEYS)))]
    )
    run = explained(fitted, model, shard)
    gallery = Gallery(run, {})
    for key in TAR_KEYS:
        assert gallery.find(key)["key"] == key
    assert [row["key"] for row in gallery.find_all(",".join(TAR_KEYS))] == TAR_KEYS
    assert [row["key"] for row in gallery.find_all("x/y,z.jpg, b ,a,b")] == ["x/y,z", "b", "a,b"]
    assert exit_status(["grid", str(run.folder), "--keys", "a,b,x/y,z"]) == 0
    assert exit_status(["show", str(run.folder), "x/y,z"]) == 0
    assert exit_status(["report", str(run.folder)]) == 0
    assert "a,c" not in TAR_KEYS
    assert "no sample with this key" in complaint("grid", run.folder, "--keys", "a,c")


def test_name_of_several_samples_is_an_error(fitted: str, model: ModelConfig, tmp_path: Path, complaint: Any) -> None:
    keys = ["a%2Cb", "%61%2Cb", "a%2Eb%2Ejpg"]
    data = photographs(len(keys))
    shard = write_tar(tmp_path / "x.tar", [{"__key__": key, "jpg": image} for key, image in zip(keys, data)])
    run = explained(fitted, model, shard)
    assert "several samples have this name" in complaint("show", run.folder, "a,b")
    assert Gallery(run, {}).find("a.b.jpg")["key"] == keys[2]
