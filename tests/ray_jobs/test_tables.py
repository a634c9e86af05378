"""Parquet files with images: columns, keys and labels of every type, and damage that is reported."""

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from patterns import UserError
from ray_jobs.config import Preprocessing
from ray_jobs.data import parquet_reader
from ray_jobs.data.shard_reader import ReaderConfig, ShardReader, read_shard
from ray_jobs.data.shard_specs import list_shards
from tests.conftest import jpeg

PLAIN = Preprocessing(image_size=16, resize=16, interpolation="bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
IMAGES = [jpeg(np.random.default_rng(i)) for i in range(50)]


def written(folder: Path, columns: dict[str, Any], groups: int = 20) -> str:
    path = folder / "train-00000-of-00001.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=groups)
    return str(path)


def hugging_face(images: list[bytes | None]) -> list[dict[str, Any]]:
    return [{"bytes": image, "path": f"n01_{i}.JPEG"} for i, image in enumerate(images)]


LAYOUTS = {
    "Hugging Face": {"image": hugging_face(list(IMAGES)), "label": list(range(50))},
    "bytes": {"jpg": IMAGES, "cls": list(range(50)), "mask": IMAGES},
    "large bytes": {"img": pa.array(IMAGES, pa.large_binary()), "label": pa.array(range(50), pa.int16())},
    "one column of bytes": {"scan": IMAGES, "target": [str(i) for i in range(50)]},
}


@pytest.mark.parametrize("columns", LAYOUTS.values(), ids=LAYOUTS)
def test_images_and_labels_keep_their_order(tmp_path: Path, columns: dict[str, Any]) -> None:
    (shard,) = list_shards([f"{tmp_path}/*.parquet"] if written(tmp_path, columns) else [])
    found = list(read_shard(shard))
    assert [(s.key, s.files["jpg"], int(s.files["cls"])) for s in found] == [
        (f"{i:08}", IMAGES[i], i) for i in range(50)
    ]


def test_key_column_gives_the_keys(tmp_path: Path) -> None:
    keys = ["a", "b", "a", "../c", "", None, "x.jpg", "k" * 5000]
    shard = written(tmp_path, {"__key__": keys, "jpg": IMAGES[:8]})
    reasons = {s.key: s.rejection or "" for s in read_shard(shard)}
    assert list(reasons) == ["a", "b", "a#2", "%2E%2E/c", "00000004", "00000005", "x%2Ejpg", "00000007"]
    assert [bool(reason) for reason in reasons.values()] == [n in (2, 7) for n in range(8)]


KEYS = {
    "numbers": (pa.array([7, 8]), ["7", "8"]),
    "bytes": (pa.array([b"a.b", b"\xff"], pa.binary()), ["a%2Eb", "%FF"]),
    "text that is not UTF-8": (pa.array([b"a", b"\xff"], pa.binary()).view(pa.string()), ["a", "%FF"]),
    "large text": (pa.array(["a", "é"], pa.large_string()), ["a", "é"]),
    "a dictionary": (pa.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
}


@pytest.mark.parametrize(("column", "keys"), KEYS.values(), ids=KEYS)
def test_keys_of_every_type_are_read(tmp_path: Path, column: pa.Array, keys: list[str]) -> None:
    shard = written(tmp_path, {"key": column, "jpg": IMAGES[:2]})
    assert [s.key for s in read_shard(shard)] == keys


LABELS = {
    "text": (pa.array(["0", " 2 "]), [0, 2]),
    "floats": (pa.array([0.0, 2.0]), [0, 2]),
    "not a number": (pa.array([float("nan"), 2.0]), [None, 2]),
    "decimals": (pa.array([0, 2], pa.decimal128(5, 2)), [0, 2]),
    "booleans": (pa.array([False, True]), [0, 1]),
    "lists of one": (pa.array([[0], [2]]), [0, 2]),
    "a dictionary": (pa.array(["0", "2"]).dictionary_encode(), [0, 2]),
    "null and -1": (pa.array([None, -1], pa.int64()), [None, None]),
}


@pytest.mark.parametrize(("column", "labels"), LABELS.values(), ids=LABELS)
def test_whole_numbers_of_every_type_are_labels(tmp_path: Path, column: pa.Array, labels: list[int | None]) -> None:
    (batch,) = ShardReader(written(tmp_path, {"jpg": IMAGES[:2], "label": column}), ReaderConfig(PLAIN, 2))
    assert batch.labels == labels


@pytest.mark.parametrize("label", ["cat", "", "1_0", "١", 1.5, float("inf"), [1, 2], [], -2, 2**40])
def test_other_labels_are_rejected_with_their_value(tmp_path: Path, label: Any) -> None:
    reader = ShardReader(written(tmp_path, {"jpg": IMAGES[:1], "label": [label]}), ReaderConfig(PLAIN, 2))
    assert not list(reader)
    assert "not a class number" in reader.rejected[0].reason


def test_class_names_of_hugging_face_are_labels(tmp_path: Path) -> None:
    features = {"label": {"names": ["eel", "cat"], "_type": "ClassLabel"}}
    table = pa.table({"jpg": IMAGES[:2], "label": ["cat", "eel"]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "x.parquet")
    (batch,) = ShardReader(str(tmp_path / "x.parquet"), ReaderConfig(PLAIN, 2))
    assert batch.labels == [1, 0]


def test_bitmap_is_read_if_its_path_has_the_extension(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (10, 20, 30)).save(buffer, "bmp")
    images = [{"bytes": buffer.getvalue(), "path": path} for path in ("a/x.BMP", "a/x.jpg", None)]
    reader = ShardReader(written(tmp_path, {"image": images}), ReaderConfig(PLAIN, 4))
    (batch,) = reader
    assert batch.keys == ["00000000"]
    assert all("BMP" in r.reason for r in reader.rejected)
    assert len(reader.rejected) == 2


def test_bad_rows_are_rejected_and_others_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_reader, "MAX_SAMPLE_BYTES", 3000)
    images = [IMAGES[0], None, bytes(4000), b"no image", b"", IMAGES[1]]
    shard = written(tmp_path, {"image": hugging_face(images), "label": [0, 1, 2, 3, 4, None]})
    reader = ShardReader(shard, ReaderConfig(PLAIN, 2))
    (batch,) = reader
    assert (batch.keys, batch.labels) == (["00000000", "00000005"], [0, None])
    assert [(r.key[-1], r.stage) for r in reader.rejected] == [
        ("1", "read"),
        ("2", "read"),
        ("3", "decode"),
        ("4", "decode"),
    ]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"label": [1, 2]}, "no column of image bytes; its columns are label"),
        ({"a": IMAGES[:2], "b": IMAGES[:2]}, "no column of image bytes; its columns are a, b"),
        ({"jpg": pa.array([], pa.binary())}, "a Parquet file without a sample"),
    ],
)
def test_file_without_images_is_an_error(tmp_path: Path, columns: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        list(read_shard(written(tmp_path, columns)))


def test_huge_row_group_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_reader, "MAX_GROUP_BYTES", 10_000)
    with pytest.raises(UserError, match=r"row group 0 has \d+ bytes; at most 10000 are read"):
        list(read_shard(written(tmp_path, {"jpg": IMAGES})))


def test_file_truncated_anywhere_is_an_error(tmp_path: Path) -> None:
    path = Path(written(tmp_path, {"jpg": IMAGES}))
    data = path.read_bytes()
    for cut in range(1, len(data), len(data) // 50):
        path.write_bytes(data[:cut])
        with pytest.raises(UserError, match="cannot be read"):
            list(read_shard(str(path)))


@pytest.mark.full
def test_damaged_file_is_read_or_is_an_error(tmp_path: Path) -> None:
    path = Path(written(tmp_path, {"image": hugging_face(list(IMAGES[:6])), "label": list(range(6))}))
    data = path.read_bytes()
    rng = random.Random(0)
    broken = 0
    for _ in range(600):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 5)):
            changed[rng.choice([rng.randrange(len(data)), rng.randrange(len(data) - 800, len(data))])] ^= (
                1 << rng.randrange(8)
            )
        path.write_bytes(changed)
        try:
            for batch in ShardReader(str(path), ReaderConfig(PLAIN, 4)):
                assert torch.isfinite(batch.images).all()
        except UserError:
            broken += 1
    assert 0 < broken < 600
