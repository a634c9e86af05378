"""Shard specs: resolved to shards, each with a unique name for its outputs."""

from pathlib import Path

import pytest

from patterns import UserError
from ray_jobs.data.shard_specs import list_shards, name_outputs
from tests.conftest import make_shards
from tests.ray_jobs.servers import http_server


def test_file_url_is_a_path(tmp_path: Path) -> None:
    (path,) = make_shards(tmp_path, 1, 1)
    for spec in (f"file://{path}", f"file:{path}", f"file://localhost{path}"):
        assert list_shards([spec]) == (path,)
    with pytest.raises(UserError, match="listed twice"):
        list_shards([path, f"file://{path}"])


def test_list_file_has_shards_relative_to_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_shards(tmp_path / "data", 4, 1)
    text = f"# the data\n\ndata/train-{{000..001}}.tar  # two\ndata/*-002.tar\n{made[3]}\ns3://bucket/a.tar\n"
    (tmp_path / "shards.txt").write_text(text)
    expected = (*made, "s3://bucket/a.tar")
    assert list_shards([f"@{tmp_path}/shards.txt"]) == expected
    assert list_shards([f"@file://{tmp_path}/shards.txt"]) == expected
    monkeypatch.chdir(tmp_path)
    assert list_shards(["@shards.txt"]) == expected


def test_list_and_its_shards_may_be_urls(tmp_path: Path) -> None:
    (tmp_path / "shards.txt").write_text("train-{000..001}.tar\n/data/none.tar\n")
    (tmp_path / "remote.txt").write_text("train-{000..001}.tar\n")
    with http_server(tmp_path) as address:
        assert list_shards([f"@{address}/plain/remote.txt"]) == tuple(
            f"{address}/plain/train-00{n}.tar" for n in range(2)
        )
        with pytest.raises(UserError, match="does not exist") as caught:
            list_shards([f"@{address}/plain/shards.txt"])
        assert caught.value.where == "/data/none.tar"
        with pytest.raises(UserError, match="404"):
            list_shards([f"@{address}/404/shards.txt"])


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("@none.txt", "none.txt: cannot be read"),
        ("train-{000..001.tar", "a brace is not closed"),
        ("pipe:cat {a,b}.tar", "pipe:cat {a,b}.tar: a pipe runs a shell command"),
        ("@pipes.txt", "a pipe runs a shell command"),
        ("@nothing.txt", "there are no shards"),
    ],
)
def test_invalid_spec_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipes.txt").write_text("pipe:cat a.tar\n")
    (tmp_path / "nothing.txt").write_text("# nothing\n")
    with pytest.raises(UserError) as caught:
        list_shards([spec])
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_with_wildcard_characters_are_found(tmp_path: Path) -> None:
    (path,) = make_shards(tmp_path / "a[1]*", 1, 1)
    assert list_shards([path]) == (path,)


def test_url_without_wildcards_does_not_change() -> None:
    specs = ("http://[::1]:80/a.tar", "https://host/a.tar?sign=x*y&z=[1]", "s3://bucket/a.tar")
    assert list_shards(specs) == specs


@pytest.mark.full
def test_hundred_thousand_shards_are_listed() -> None:
    assert len(list_shards(["s3://bucket/{000000..099999}.tar"])) == 100_000


OUTPUTS = {
    "alone": (["/data/a.tar"], ["a"]),
    "in one folder": (["/data/a.tar", "/data/b.tar.gz", "/data/c.tgz", "/data/d.parquet"], ["a", "b", "c", "d"]),
    "in folders": (["/data/train/0.tar", "/data/val/0.tar"], ["train/0", "val/0"]),
    "of a folder": (["/data/val/images-00000-of-00001-0a1b2c3d"], ["images-00000-of-00001-0a1b2c3d"]),
    "signed": (["https://host/x/a.tar?X-Signature=secret/1", "https://host/x/b.tar?X-Signature=secret/2"], ["a", "b"]),
    "in two stores": (["/data/a.tar", "s3://bucket/b.tar"], ["data/a", "bucket/b"]),
    "with parent folders": (["/data/x/../../a.tar", "/data/../b.tar"], ["x/a", "b"]),
    "piped": (["pipe:curl -s https://h/a.tar | cat"], ["curl_-s_https___h_a.tar_cat"]),
}


@pytest.mark.parametrize(("shards", "names"), OUTPUTS.values(), ids=OUTPUTS)
def test_outputs_are_named_after_their_shards(shards: list[str], names: list[str]) -> None:
    assert list(name_outputs(shards).values()) == names


def test_output_names_are_unique_and_valid_file_names(tmp_path: Path) -> None:
    shards = ["/data/a.tar", "/data/a.tar.gz", "/data/a b.tar", "/data/a:b.tar", f"pipe:{'x' * 5000}", "http://h/a.tar"]
    names = name_outputs(shards)
    assert len(set(names.values())) == len(shards)
    for name in names.values():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.refused.parquet").touch()
