"""Shards: listed and read completely, and only good samples are used."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from torchvision.models import ResNet50_Weights

from patterns import UserError
from ray_jobs.config import ModelConfig, Preprocessing
from ray_jobs.data.image_decoding import decode
from ray_jobs.data.shard_reader import ReaderConfig, ShardReader, find_format, read_shard
from ray_jobs.data.shard_specs import list_shards
from ray_jobs.models import loading
from tests.conftest import jpeg, make_shards, write_tar

PLAIN = Preprocessing(image_size=16, resize=16, interpolation="bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def photograph(width: int, height: int) -> bytes:
    rng = np.random.default_rng(width)
    buffer = io.BytesIO()
    image = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)).resize((width, height))
    image.save(buffer, "png")
    return buffer.getvalue()


def test_brace_ranges_and_globs_list_the_same_shards(tmp_path: Path) -> None:
    made = make_shards(tmp_path, 3, 1)
    assert list(list_shards([f"{tmp_path}/train-{{000..002}}.tar"])) == made
    assert list(list_shards([f"{tmp_path}/*.tar"])) == made


def test_shards_of_every_format_are_listed_again_from_a_list(tmp_path: Path) -> None:
    make_shards(tmp_path, 2, 1)
    table = pa.table({"url": ["1.jpg"], "other": ["1.jpg"]})
    for name in ("plain", "a*b {0,1}"):
        pq.write_table(table, tmp_path / f"{name}.parquet")
    (tmp_path / "photos [1]").mkdir()
    (tmp_path / "photos [1]" / "1.jpg").write_bytes(jpeg(np.random.default_rng(0)))
    (tmp_path / "based").mkdir()
    plain = list_shards([f"{tmp_path}/*.tar", f"{tmp_path}/plain.parquet", f"{tmp_path}/photos [1]"])
    with_column = list_shards([f"{tmp_path}/*.parquet"], image_column="url")
    with_base = list_shards([f"{tmp_path}/*.parquet"], image_column="url", image_base=str(tmp_path / "based"))
    for number, written in enumerate((plain, with_column, with_base, plain + with_column)):
        (tmp_path / f"{number}.txt").write_text("".join(f"{shard}\n" for shard in written))
        assert list_shards([f"@{tmp_path}/{number}.txt"]) == written
    assert list_shards([f"@{tmp_path}/1.txt"], image_column="url") == with_column
    assert list_shards([f"@{tmp_path}/2.txt"], image_column="url", image_base=f"{tmp_path}/based") == with_base
    for column, base in (("other", None), ("url", str(tmp_path))):
        with pytest.raises(UserError) as caught:
            list_shards([f"@{tmp_path}/1.txt"], image_column=column, image_base=base)
        assert caught.value.parameter == "image_column"
    (tmp_path / "wrong.txt").write_text("none/images-00000-of-00001-00000000\nnone.parquet#image=url\n")
    for line in (tmp_path / "wrong.txt").read_text().splitlines():
        with pytest.raises(UserError, match="does not exist"):
            list_shards([f"{tmp_path}/{line}"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [("none.tar", "does not exist"), ("*.tgz", "nothing matches"), ("empty.tar", "file is empty")],
)
def test_missing_or_empty_shard_is_an_error(tmp_path: Path, spec: str, message: str) -> None:
    (tmp_path / "empty.tar").touch()
    with pytest.raises(UserError, match=message):
        list_shards([f"{tmp_path}/{spec}"])


@pytest.mark.parametrize(
    ("shard", "name"),
    [
        ("/data/photos/images-00017-of-01282-1a2b3c4d", "folder of images"),
        ("/data/a.parquet#image=url", "Parquet file"),
        ("s3://bucket/a.pq?version=2", "Parquet file"),
        ("/data/a.tar.gz", "tar archive"),
        ("pipe:cat a.tar", "tar archive"),
    ],
)
def test_format_of_a_shard_follows_from_its_name(shard: str, name: str) -> None:
    assert find_format(shard).name == name


def test_shard_that_is_listed_twice_is_an_error(tmp_path: Path) -> None:
    (path,) = make_shards(tmp_path, 1, 1)
    with pytest.raises(UserError, match="listed twice"):
        list_shards([path, f"{tmp_path}/*.tar"])


def test_archive_without_a_sample_is_an_error(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "none.tar", [])
    with pytest.raises(UserError, match="without a sample"):
        list(read_shard(str(path)))


@pytest.mark.parametrize("cut", ["within a member", "between two members"])
def test_truncated_shard_is_an_error(tmp_path: Path, cut: str) -> None:
    (path,) = make_shards(tmp_path, 1, 4)
    with tarfile.open(path) as tar:
        third = tar.getmembers()[4]
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: third.offset if cut == "between two members" else third.offset_data + 100])
    with pytest.raises(UserError, match="truncated"):
        list(read_shard(path))


def test_bytes_that_are_not_a_tar_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "noise.tar"
    path.write_bytes(b"not a tar at all" * 1000)
    with pytest.raises(UserError, match="cannot be read"):
        list(read_shard(str(path)))


def test_compressed_shard_has_the_same_samples(tmp_path: Path) -> None:
    import gzip

    (path,) = make_shards(tmp_path, 1, 3)
    packed = tmp_path / "train.tar.gz"
    packed.write_bytes(gzip.compress(Path(path).read_bytes()))
    assert [s.files["jpg"] for s in read_shard(str(packed))] == [s.files["jpg"] for s in read_shard(path)]


def test_bad_samples_are_rejected_with_a_reason_and_good_samples_are_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def npy(array: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, array)
        return buffer.getvalue()

    tensor = rng.normal(size=(3, 16, 16)).astype(np.float32)
    infinite = tensor.copy()
    infinite[0, 0, 0] = np.inf
    samples: list[dict[str, object]] = [
        {"__key__": "good", "jpg": jpeg(rng), "cls": b"3"},
        {"__key__": "cut", "jpg": jpeg(rng, 64)[:300]},
        {"__key__": "text", "txt": b"hello"},
        {"__key__": "tensor", "npy": npy(tensor)},
        {"__key__": "gray", "npy": npy(tensor[:1])},
        {"__key__": "infinite", "npy": npy(infinite)},
        {"__key__": "pickled", "npy": npy(np.array([{"a": 1}], dtype=object))},
        {"__key__": "label", "jpg": jpeg(rng), "cls": b"cat"},
    ]
    path = write_tar(tmp_path / "mixed.tar", samples)
    reader = ShardReader(str(path), ReaderConfig(PLAIN, batch_size=1))
    batches = list(reader)
    assert [b.keys[0] for b in batches] == ["good", "tensor"]
    assert [b.labels[0] for b in batches] == [3, None]
    assert torch.equal(batches[1].images[0], torch.from_numpy(tensor))
    reasons = {r.key: r.reason for r in reader.rejected}
    assert set(reasons) == {"cut", "text", "gray", "infinite", "pickled", "label"}
    assert "truncated" in reasons["cut"].lower()
    assert "neither an image" in reasons["text"]
    assert "(1, 16, 16)" in reasons["gray"]
    assert "not finite" in reasons["infinite"]
    assert "type object" in reasons["pickled"]
    assert "not a class number" in reasons["label"]


def steps(difference: torch.Tensor, preprocessing: Preprocessing) -> int:
    """Return the largest difference between two inputs, in steps of 8-bit pixels."""
    return round(float((difference.abs().amax((1, 2)) * torch.tensor(preprocessing.std)).max()) * 255)


@pytest.mark.full
@pytest.mark.parametrize("size", [(320, 256), (200, 500)])
def test_images_are_preprocessed_as_by_torchvision(size: tuple[int, int]) -> None:
    data = photograph(*size)
    loaded = loading.override_preprocessing(
        loading.load_torchvision_model("resnet50", "random")[1], ModelConfig(spec="x")
    )
    expected = ResNet50_Weights.DEFAULT.transforms()(Image.open(io.BytesIO(data)))
    assert steps(decode({"png": data}, loaded) - expected, loaded) <= 1


def test_images_are_preprocessed_as_by_timm() -> None:
    data = photograph(320, 300)
    model, preprocessing = loading.load_timm_model("tf_efficientnet_lite0", own_weights=False)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    expected = transform(Image.open(io.BytesIO(data)))
    assert steps(decode({"png": data}, preprocessing) - expected, preprocessing) <= 2


def test_one_mean_gives_gray_images() -> None:
    gray = Preprocessing(image_size=16, resize=16, interpolation="bilinear", mean=(0.0,), std=(1.0,))
    assert decode({"png": photograph(32, 32)}, gray).shape == (1, 16, 16)


def many(folder: Path) -> str:
    """Write a shard of s0 to s5, in which s1 is not an image, s3 is a link, and s4 and s5 have no valid label."""
    path, rng = folder / "many.tar", np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(6):
            for extension, data in (("jpg", b"" if number == 1 else jpeg(rng)), ("cls", b"xx"[: number // 4] or b"3")):
                info = tarfile.TarInfo(f"s{number}.{extension}")
                info.size = len(data)
                if number == 3:
                    info.type, info.linkname, info.size = tarfile.SYMTYPE, "s0.jpg", 0
                tar.addfile(info, io.BytesIO(data))
    return str(path)


def keys(reader: ShardReader) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the used keys, and the rejected keys with their stages."""
    used = [key for batch in reader for key in batch.keys]
    return used, [(r.key, r.stage) for r in reader.rejected]


def test_each_rejection_has_its_stage(tmp_path: Path) -> None:
    rejections = [("s1", "decode"), ("s3", "read"), ("s4", "decode"), ("s5", "decode")]
    assert keys(ShardReader(many(tmp_path), ReaderConfig(PLAIN, 4))) == (["s0", "s2"], rejections)


@pytest.mark.parametrize(("limit", "used", "rejected"), [(0, [], []), (2, ["s0"], ["s1"]), (3, ["s0", "s2"], ["s1"])])
def test_limit_counts_samples_whether_they_can_be_used_or_not(
    tmp_path: Path, limit: int, used: list[str], rejected: list[str]
) -> None:
    found = keys(ShardReader(many(tmp_path), ReaderConfig(PLAIN, 4), max_samples=limit))
    assert found == (used, [(key, "decode") for key in rejected])


def test_only_requested_samples_are_used_or_rejected(tmp_path: Path) -> None:
    shard = many(tmp_path)
    assert keys(ShardReader(shard, ReaderConfig(PLAIN, 1), only=frozenset({"s2", "s3", "none"}))) == (
        ["s2"],
        [("s3", "read"), ("none", "read")],
    )
    assert keys(ShardReader(shard, ReaderConfig(PLAIN, 1), skip=frozenset({"s0", "s1", "s4", "s5"}))) == (
        ["s2"],
        [("s3", "read")],
    )
    both = ShardReader(
        shard, ReaderConfig(PLAIN, 1), only=frozenset({"s0", "s2"}), skip=frozenset({"s0"}), max_samples=3
    )
    assert keys(both) == (["s2"], [])
