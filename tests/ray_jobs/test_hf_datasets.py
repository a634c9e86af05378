"""Datasets of the Hugging Face Hub, by its real client and a server on this machine that limits rates."""

import json
import socket
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from patterns import UserError
from ray_jobs.data.shard_reader import read_shard
from ray_jobs.data.shard_specs import list_shards, name_outputs
from ray_jobs.io import web
from ray_jobs.io.refusals import BusyError
from tests.conftest import make_shards
from tests.ray_jobs.hub import COMMIT, TOKEN, Hub, hub_server
from tests.ray_jobs.runs import OPTIONS, read_command

DATASET = "hf://datasets/org/data"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars and Parquet files of the same images in several folders."""
    folder = tmp_path_factory.mktemp("dataset")
    for number, tar in enumerate(make_shards(folder / "tars", 2, 3)):
        rows = {"image": [sample.files["jpg"] for sample in read_shard(tar)]}
        for split in ("train", "test"):
            (folder / "data" / split).mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(rows), folder / "data" / split / f"a b-{number}.parquet")
    (folder / "README.md").write_text("A dataset.\n")
    return folder


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(web, "FIRST_PAUSE", 0.01)
    web.PAUSES.until.clear()
    with hub_server(Hub(folder)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


def test_files_are_listed_over_several_pages_at_one_commit(hub: Hub) -> None:
    found = list_shards([f"{DATASET}@main/**/*.parquet"])
    root = f"{hub.endpoint}/datasets/org/data/resolve/{COMMIT}"
    assert found == tuple(f"{root}/data/{split}/a%20b-{n}.parquet" for split in ("test", "train") for n in (0, 1))
    pages = [path for path, _ in hub.requests if "cursor" in path]
    assert len(pages) > 1
    assert list(name_outputs(found).values()) == [f"{split}/a_20b-{n}" for split in ("test", "train") for n in (0, 1)]


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}", "@refs/convert/parquet", "@refs%2Fconvert%2Fparquet"])
def test_every_revision_is_pinned_to_its_commit_and_asked_for_once(hub: Hub, revision: str) -> None:
    found = list_shards([f"{DATASET}{revision}/tars/train-{{000,001}}.tar"])
    assert found == tuple(f"{hub.endpoint}/datasets/org/data/resolve/{COMMIT}/tars/train-00{n}.tar" for n in (0, 1))
    assert len(hub.requests) == 1


def test_samples_are_those_of_the_files(hub: Hub, folder: Path) -> None:
    shards = list_shards([f"{DATASET}/tars/*.tar", f"{DATASET}/data/train/*.parquet"])
    expected = [[s.files["jpg"] for s in read_shard(str(p))] for p in sorted((folder / "tars").iterdir())]
    assert [[s.files["jpg"] for s in read_shard(shard)] for shard in shards] == expected * 2


@pytest.mark.full
def test_listing_goes_on_after_the_pauses_of_a_server_that_limits_rates(hub: Hub) -> None:
    hub.refusals, hub.refusal = 1, (503, {"Retry-After": "1"})
    assert len(list_shards([f"{DATASET}/tars/*.tar"])) == 2
    assert max(hub.seen.values()) == 2


@pytest.mark.parametrize("status", [429, 503])
def test_refused_file_says_when_to_ask_again_and_is_not_asked_for_earlier(hub: Hub, status: int) -> None:
    (shard,) = list_shards([f"{DATASET}/tars/train-000.tar"])
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    hub.refusals, hub.refusal = 1, (status, {"Retry-After": later})
    asked = len(hub.requests)
    for _ in range(2):
        with pytest.raises(BusyError) as caught:
            list(read_shard(shard))
        assert caught.value.slow_down
        assert 90 < caught.value.retry_after <= 100
    assert len(hub.requests) == asked + 1
    web.PAUSES.until.clear()
    assert len(list(read_shard(shard))) == 3


@pytest.mark.parametrize("where", ["environment", "file"])
def test_token_is_sent_to_the_hub_and_to_no_other_server(
    hub: Hub, where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.private = True
    if where == "environment":
        monkeypatch.setenv("HF_TOKEN", f" {TOKEN}\n")
    else:
        (tmp_path / "hf").mkdir()
        (tmp_path / "hf" / "token").write_text(TOKEN + "\n")
    (shard,) = list_shards([f"{DATASET}/tars/*000.tar"])
    assert len(list(read_shard(shard))) == 3
    assert TOKEN not in shard
    for path, token in hub.requests:
        assert token == (None if path.startswith("/store/") else f"Bearer {TOKEN}")


def bad(hub: Hub, spec: str, complaint: Callable[..., str], tmp_path: Path) -> str:
    return complaint("fit", "--model", "m.py:f", "--shards", spec, "--out", tmp_path / "run", "--workers", 0)


@pytest.mark.parametrize(
    ("spec", "phrase"),
    [
        (f"{DATASET}@v9/**/*.parquet", "no such revision"),
        ("hf://datasets/org/none/**/*.parquet", "no such dataset"),
        (f"{DATASET}/none/*.parquet", f"nothing matches at commit {COMMIT}"),
        (f"{DATASET}/tars/*.parquet", "nothing matches"),
        (DATASET, "names no files"),
        ("hf://datasets/data/**.tar", "names no files"),
        ("hf://datasets/or g/da--ta/*.tar", "not the name of a dataset"),
    ],
)
def test_bad_spec_is_one_line(hub: Hub, spec: str, phrase: str, complaint: Callable[..., str], tmp_path: Path) -> None:
    line = bad(hub, spec, complaint, tmp_path)
    assert phrase in line
    assert spec in line


def test_bad_token_is_one_line_without_the_token(
    hub: Hub, complaint: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for token, phrase in (("hf_wrong", "does not accept the token"), ("hf_two\nlines", "HF_TOKEN: not a token")):
        monkeypatch.setenv("HF_TOKEN", token)
        line = bad(hub, f"{DATASET}/**/*.tar", complaint, tmp_path)
        assert phrase in line
        assert token[:6] not in line


def test_no_network_and_no_client_are_one_line(
    hub: Hub, complaint: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    assert "does not respond" in bad(hub, f"{DATASET}/**/*.tar", complaint, tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "patternnet-ray[hf]" in bad(hub, f"{DATASET}/**/*.tar", complaint, tmp_path)


def test_error_of_a_worker_without_access_says_to_set_the_token(hub: Hub) -> None:
    hub.private = True
    with pytest.raises(UserError, match="401") as caught:
        list(read_shard(f"{hub.endpoint}/datasets/org/data/resolve/{COMMIT}/tars/train-000.tar"))
    assert "credentials" in caught.value.remedy


@pytest.mark.full
def test_command_of_the_page_records_the_commit_and_no_token(
    hub: Hub, model_spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from ray_jobs.cli.app import exit_status

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.private, hub.refusals = True, 1
    monkeypatch.chdir(tmp_path)
    words = read_command("data.md", "## Hugging Face datasets")
    ours = {"torchvision:resnet50": model_spec, "ILSVRC/imagenet-1k": "org/data", "data/train-*": "data/train/*"}
    for theirs, own in ours.items():
        words = [word.replace(theirs, own) for word in words]
    assert exit_status([*words, *OPTIONS, "--workers", "0", "--retries", "0"]) == 0
    run = tmp_path / "runs" / "imagenet"
    text = (run / "manifest.json").read_text()
    section = json.loads(text)["fit"]
    assert section["samples"] == 6
    assert all(f"/resolve/{COMMIT}/data/train/" in shard for shard in section["options"]["shards"])
    out, err = capfd.readouterr()
    for each in (text, out, err, *(p.read_text("latin1") for p in run.rglob("*") if p.is_file())):
        assert TOKEN not in each
    assert "is put off" in err
