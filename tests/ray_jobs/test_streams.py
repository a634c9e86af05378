"""Byte streams: complete from every kind of source, or an error."""

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import boto3
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from patterns import UserError
from ray_jobs.data import byte_streams
from ray_jobs.data.shard_reader import read_shard
from ray_jobs.data.shard_specs import list_shards
from tests.conftest import make_shards
from tests.ray_jobs.servers import http_server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with good.tar and good.parquet of the same eight images, and the compressed tar."""
    folder = tmp_path_factory.mktemp("served")
    (path,) = make_shards(folder, 1, 8)
    data = Path(path).read_bytes()
    (folder / "good.tar").write_bytes(data)
    (folder / "good.tar.gz").write_bytes(gzip.compress(data))
    (folder / "good.tar.bz2").write_bytes(bz2.compress(data))
    (folder / "good.tar.xz").write_bytes(lzma.compress(data))
    pq.write_table(pa.table({"image": images(path)}), folder / "good.parquet")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    with http_server(folder) as address:
        yield address


@pytest.fixture(scope="module")
def s3(folder: Path) -> Iterator[str]:
    """Yield the endpoint of an S3 server whose bucket `data` has shards and a folder of images."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    keys = {"aws_access_key_id": "anyone", "aws_secret_access_key": "anything", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=endpoint, **keys)
    client.create_bucket(Bucket="data")
    for name in ("good.tar", "good.tar.gz", "good.parquet"):
        client.put_object(Bucket="data", Key=f"shards/{name}", Body=(folder / name).read_bytes())
    for number, image in enumerate(images(str(folder / "good.tar"))):
        client.put_object(Bucket="data", Key=f"train/class{number % 2}/{number}.jpg", Body=image)
    yield endpoint
    server.stop()


def images(shard: str) -> list[bytes]:
    return [sample.files["jpg"] for sample in read_shard(shard)]


@pytest.mark.parametrize("name", ["good.tar", "good.tar.gz", "good.tar.bz2", "good.tar.xz"])
def test_compression_is_detected_by_content_instead_of_name(folder: Path, tmp_path: Path, name: str) -> None:
    misnamed = tmp_path / "train.tar"
    misnamed.write_bytes((folder / name).read_bytes())
    assert images(str(misnamed)) == images(str(folder / "good.tar"))


@pytest.mark.parametrize("name", ["good.tar.gz", "good.tar.bz2", "good.tar.xz"])
def test_truncated_compressed_shard_is_an_error(folder: Path, tmp_path: Path, name: str) -> None:
    cut = tmp_path / name
    cut.write_bytes((folder / name).read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot be read"):
        images(str(cut))


def test_file_that_grows_while_it_is_read_is_an_error(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "growing.tar"
    path.write_bytes((folder / "good.tar").read_bytes())
    reading = read_shard(str(path))
    next(reading)
    with path.open("ab") as file:
        file.write(bytes(1 << 20))  # a valid tar, but not the file that was opened
    with pytest.raises(UserError, match=r"\d+ bytes were read, but its size is \d+ bytes"):
        list(reading)


@pytest.mark.parametrize("how", ["plain", "chunked", "unsized", "moved"])
@pytest.mark.parametrize("name", ["good.tar", "good.tar.gz", "good.parquet"])
def test_shards_are_read_over_http_from_servers_without_ranges_or_sizes(
    server: str, folder: Path, how: str, name: str
) -> None:
    (shard,) = list_shards([f"{server}/{how}/{name}?signature=a/b*c"])
    assert images(shard) == images(str(folder / "good.tar"))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("404", "404"),
        ("500", "500"),
        ("truncated", "truncated"),
        ("chunked-cut", "IncompleteRead"),
        ("unsized-cut", "truncated"),
    ],
)
def test_fault_of_an_http_server_is_an_error_with_its_reason(server: str, fault: str, reason: str) -> None:
    shard = f"{server}/{fault}/good.tar"
    with pytest.raises(UserError, match=reason) as caught:
        images(shard)
    assert caught.value.where == shard


@pytest.mark.parametrize("fault", ["truncated", "chunked-cut", "unsized-cut"])
@pytest.mark.parametrize("name", ["good.tar.gz", "good.parquet"])
def test_incomplete_transfer_is_an_error_in_every_format(server: str, fault: str, name: str) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        images(f"{server}/{fault}/{name}")


def test_server_that_stalls_is_an_error(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_streams, "READ_TIMEOUT", 0.3)
    with pytest.raises(UserError, match=r"no data for 0\.3 s"):
        images(f"{server}/stalled/good.tar")


def test_unreachable_server_is_an_error(server: str) -> None:
    with pytest.raises(UserError, match="refused"):
        images("http://127.0.0.1:9/good.tar")


def test_shard_that_failed_can_be_read_at_the_next_attempt(server: str, folder: Path) -> None:
    with pytest.raises(UserError, match="500"):
        images(f"{server}/once/good.tar")
    assert images(f"{server}/once/good.tar") == images(str(folder / "good.tar"))


def test_memory_holds_samples_instead_of_the_shard(tmp_path: Path) -> None:
    path = tmp_path / "large.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(64):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = 1 << 20
            tar.addfile(info, io.BytesIO(bytes(1 << 20)))
    with http_server(tmp_path) as address:  # the server reads the file before its memory would be counted
        for shard in (str(path), f"{address}/plain/large.tar"):
            reading = read_shard(shard)
            next(reading)
            tracemalloc.start()
            assert sum(1 for _ in reading) == 63
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 8 << 20


def test_pipe_is_read_only_if_allowed(folder: Path) -> None:
    spec = f"pipe:cat '{folder}/good.tar'"
    with pytest.raises(UserError, match="runs a shell command"):
        list_shards([spec])
    (shard,) = list_shards([spec], allow_pipes=True)
    assert images(shard) == images(str(folder / "good.tar"))


def test_pipe_whose_command_fails_is_an_error_even_after_complete_output(folder: Path) -> None:
    with pytest.raises(UserError, match="exit status 3"):
        images(f"pipe:cat '{folder}/good.tar'; exit 3")


def test_any_file_system_of_fsspec_is_read(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in ("good.tar", "good.tar.gz", "good.parquet"):
        memory.pipe_file(f"/bucket/{name}", (folder / name).read_bytes())
    shards = list_shards(["memory://bucket/good*"])
    assert len(shards) == 3
    for shard in shards:
        assert images(shard) == images(str(folder / "good.tar"))


def test_missing_package_of_a_scheme_is_named() -> None:
    with pytest.raises(UserError, match="gcsfs"):
        images("gs://bucket/a.tar")


READ = """
import json, sys
from ray_jobs.data.shard_reader import read_shard
from ray_jobs.data.shard_specs import list_shards
print(json.dumps([[s.key for s in read_shard(shard)] for shard in list_shards(sys.argv[1:])]))
"""


@pytest.mark.full
@pytest.mark.parametrize(
    "variable", [pytest.param("AWS_ENDPOINT_URL", marks=pytest.mark.slow), "FSSPEC_S3_ENDPOINT_URL"]
)
def test_s3_is_read_with_credentials_of_the_environment(s3: str, folder: Path, variable: str) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "anyone", "AWS_SECRET_ACCESS_KEY": "anything"}
    specs = ["s3://data/shards/good.{tar,parquet}", "s3://data/shards/*.gz", "s3://data/train/"]
    command = [sys.executable, "-c", READ, *specs]
    done = subprocess.run(command, env=os.environ | keys | {variable: s3}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tar = [s.key for s in read_shard(str(folder / "good.tar"))]
    assert json.loads(done.stdout) == [
        tar,
        [f"{row:08}" for row in range(8)],
        tar,
        [f"class{n % 2}/{n}" for n in (0, 2, 4, 6, 1, 3, 5, 7)],
    ]


@pytest.mark.full
def test_missing_object_is_an_error(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ACCESS_KEY_ID", "anyone"), ("SECRET_ACCESS_KEY", "anything"), ("ENDPOINT_URL", s3)):
        monkeypatch.setenv(f"AWS_{name}", value)
    with pytest.raises(UserError, match="cannot be read") as caught:
        images("s3://data/none.tar")
    assert caught.value.where == "s3://data/none.tar"
    with pytest.raises(UserError, match="nothing matches"):
        list_shards(["s3://data/none/*.tar"])
