"""Parquet files that name their images: fetched concurrently, within limits, and only from where a table may."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from patterns import UserError
from ray_jobs.cli.app import exit_status
from ray_jobs.config import Preprocessing, Resources
from ray_jobs.data import references
from ray_jobs.data.references import ImageColumn, name_column, resolve, split_shard
from ray_jobs.data.samples import Sample, SampleError
from ray_jobs.data.shard_reader import ReaderConfig, ShardReader, list_samples, read_shard
from ray_jobs.data.shard_specs import list_shards, name_outputs
from ray_jobs.io import web
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.runs.run_folder import Run
from tests.conftest import jpeg
from tests.ray_jobs.hub import Hub, hub_server
from tests.ray_jobs.runs import OPTIONS, make_fit_config, read_command
from tests.ray_jobs.servers import http_server

IMAGES = [jpeg(np.random.default_rng(i)) for i in range(8)]
HERE = Resources(workers=0, retries=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of images, next to a file that no table may read."""
    (tmp_path / "data" / "img").mkdir(parents=True)
    for number, image in enumerate(IMAGES):
        (tmp_path / "data" / "img" / f"{number}.jpg").write_bytes(image)
    (tmp_path / "secret.jpg").write_bytes(IMAGES[0])
    return tmp_path / "data"


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    web.PAUSES.until.clear()
    with http_server(folder) as address:
        yield address


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "FIRST_PAUSE", 0.01)


def written(folder: Path, column: object, base: str | None = None, name: str = "url") -> str:
    """Write a table and return its shard."""
    pq.write_table(pa.table({"label": range(len(column)), name: column}), folder / "table.parquet")  # type: ignore[arg-type]
    (shard,) = list_shards([f"{folder}/*.parquet"], image_column=name, image_base=base)
    return shard


def images(shard: str) -> list[bytes | None]:
    return [sample.files.get("jpg") for sample in read_shard(shard)]


def reasons(shard: str) -> list[str]:
    return [sample.rejection or "" for sample in read_shard(shard)]


def test_urls_and_relative_paths_are_fetched_in_order(folder: Path, server: str) -> None:
    names = [f"{server}/plain/img/{n}.jpg?q=a/b" if n % 2 else f"img/{n}.jpg" for n in range(8)]
    for column in (names, pa.array(names, pa.large_string()), pa.array(names).dictionary_encode()):
        shard = written(folder, column)
        assert images(shard) == IMAGES
        assert [int(sample.files["cls"]) for sample in read_shard(shard)] == list(range(8))


def test_base_is_a_folder_a_store_or_a_server(folder: Path, server: str, tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe({f"/bucket/img/{n} a.jpg": image for n, image in enumerate(IMAGES)})
    (tmp_path / "tables").mkdir()
    for base, end in ((str(folder), ""), (f"{server}/plain", ""), ("memory://bucket", " a")):
        shard = written(tmp_path / "tables", [f"img/{n}{end}.jpg" for n in range(8)], base)
        assert images(shard) == IMAGES
    absolute = [str(folder / "img" / f"{n}.jpg") for n in range(8)]
    assert images(written(tmp_path / "tables", absolute, str(folder))) == IMAGES


def test_scheme_in_upper_case_is_one_of_the_web(folder: Path, server: str, tmp_path: Path) -> None:
    upper = server.replace("http://", "HTTP://")
    assert images(written(folder, [f"{upper}/plain/img/{n}.jpg" for n in range(8)])) == IMAGES
    (folder / "img" / "a%20b.jpg").write_bytes(IMAGES[3])  # the server takes names as they are sent
    assert images(written(folder, ["img/a b.jpg"], f"{upper}/plain")) == [IMAGES[3]]


def test_only_the_images_that_are_used_are_fetched(folder: Path) -> None:
    requested: list[str] = []
    preprocessing = Preprocessing(
        image_size=16, resize=16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), interpolation="bilinear"
    )
    with http_server(folder, requested) as address:
        shard = written(folder, [f"{address}/plain/img/{n}.jpg" for n in range(8)])
        batches = list(ShardReader(shard, ReaderConfig(preprocessing, 4), only=frozenset({"00000003"})))
    assert [batch.keys for batch in batches] == [["00000003"]]
    assert requested == ["/plain/img/3.jpg"]


def test_struct_of_hugging_face_holds_bytes_or_a_path(folder: Path) -> None:
    rows = [{"bytes": IMAGES[n] if n % 2 else None, "path": f"img/{n}.jpg"} for n in range(8)]
    shard = written(folder, [*rows, {"bytes": None, "path": None}, None], name="photo")
    assert images(shard)[:8] == IMAGES
    assert reasons(shard)[8:] == ["the row has no image bytes"] * 2
    plain = split_shard(shard)[0]
    assert "--image-column" in reasons(plain)[0], "paths are fetched only if the user asks for it"


@pytest.mark.parametrize(
    ("entry", "base"),
    [
        ("../secret.jpg", None),
        ("img/../../secret.jpg", None),
        ("/etc/passwd", None),
        ("{root}/secret.jpg", None),
        ("{root}/data/img/0.jpg", None),
        ("file://{root}/secret.jpg", None),
        ("file:{root}/data/img/0.jpg", None),
        ("~/x.jpg", None),
        ("memory://bucket/img/0.jpg", None),
        ("s3://bucket/0.jpg", None),
        ("zip::img/0.jpg", None),
        ("\\\\host\\share", None),
        ("..\\secret.jpg", None),
        ("{root}/secret.jpg", "{root}/data"),
        ("{root}/data/../secret.jpg", "{root}/data"),
        ("{root}/database/0.jpg", "{root}/data"),
        ("", None),
        ("a\0b", None),
    ],
)
def test_reference_outside_the_folder_is_rejected_and_not_read(folder: Path, entry: str, base: str | None) -> None:
    root = str(folder.parent)
    shard = written(folder, [entry.format(root=root)], base and base.format(root=root))
    (sample,) = read_shard(shard)
    assert sample.rejection is not None
    assert sample.files == {}


@given(st.text(), st.sampled_from([None, "/data", "s3://bucket/x"]))
def test_what_is_named_is_on_the_web_or_below_the_folder(entry: str, base: str | None) -> None:
    column = ImageColumn("url", base or "/tables", base)
    try:
        found = resolve(entry, column)
    except SampleError:
        return
    assert found.startswith(("http://", "https://", f"{column.folder}/"))
    if found.startswith(column.folder):
        assert ".." not in found.split("/")


@given(st.text(min_size=1), st.one_of(st.none(), st.just("s3://b/x y#&"), st.just("/")))
def test_shard_names_keep_column_and_base(column: str, base: str | None) -> None:
    for file in ("/data/a#b.parquet", "https://h/a.parquet?sign=x&y", "s3://b/a.pq"):
        found, image = split_shard(name_column(file, column, base))
        assert (found, image and image.name, image and image.base) == (file, column, base)


def test_outputs_are_named_after_the_file(folder: Path) -> None:
    assert list(name_outputs([written(folder, ["img/0.jpg"])]).values()) == ["table"]


@pytest.mark.parametrize(
    ("fault", "limit", "reason"),
    [
        ("404", "DEADLINE", "404"),
        ("500", "DEADLINE", "500"),
        ("truncated", "DEADLINE", "bytes were fetched"),
        ("stalled", "SILENCE", "cannot be fetched"),
        ("dripping", "DEADLINE", "not fetched within"),
    ],
)
def test_image_that_cannot_be_fetched_is_rejected_and_delays_no_other(
    folder: Path, server: str, fault: str, limit: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, limit, 0.3)
    shard = written(folder, [f"{server}/{fault}/img/0.jpg", f"{server}/plain/img/1.jpg"])
    bad, good = read_shard(shard)
    assert reason in str(bad.rejection)
    assert good.files["jpg"] == IMAGES[1]


@pytest.mark.full
def test_image_of_a_busy_server_is_fetched_after_the_pause(folder: Path, server: str) -> None:
    assert images(written(folder, [f"{server}/once/img/{n}.jpg" for n in range(8)])) == IMAGES
    with hub_server(Hub(folder, refusals=1)) as hub:
        entry = f"{hub.endpoint}/datasets/org/data/resolve/main/x.jpg"
        begun = time.monotonic()
        (reason,) = reasons(written(folder, [entry]))
        assert "404" in reason
        assert [count for path, count in hub.seen.items() if "x.jpg" in path] == [2]
        assert time.monotonic() - begun >= 1.0


def test_reference_to_a_large_image_or_to_no_file_is_rejected(
    folder: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "MAX_SAMPLE_BYTES", 100)
    entries = ["img/0.jpg", f"{server}/plain/img/0.jpg", f"{server}/chunked/img/0.jpg", "img", "none.jpg"]
    found = reasons(written(folder, entries))
    assert [("more than 100 bytes" in reason) for reason in found] == [True, True, True, False, False]
    assert "not a regular file" in found[3]
    assert "No such file" in found[4]


def test_images_are_fetched_at_the_same_time_and_ahead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running, barrier = [], threading.Barrier(references.FETCHES, timeout=60)

    def fetch(where: str, stopped: threading.Event) -> bytes:
        running.append(where)
        barrier.wait()  # passes only if FETCHES images are being fetched
        return where.encode()

    monkeypatch.setattr(references, "fetch", fetch)
    shard = written(folder, [f"img/{n}.jpg" for n in range(4 * references.FETCHES)])
    with closing(read_shard(shard)) as samples:
        assert next(samples).files["jpg"].endswith(b"/0.jpg")
        assert len(running) <= 2 * references.FETCHES, "memory holds few images"
        assert sum(1 for _ in samples) == 4 * references.FETCHES - 1


def test_closing_does_not_wait_for_pauses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "DEADLINE", 1e6)
    with hub_server(Hub(folder, refusals=99, refusal=(503, {"Retry-After": "100000"}))) as hub:
        monkeypatch.setattr(web.PAUSES, "until", {})
        samples = read_shard(written(folder, ["img/0.jpg", *[f"{hub.endpoint}/x{n}.jpg" for n in range(40)]]))
        assert next(samples).files["jpg"] == IMAGES[0]
        samples.close()  # a day, if it waited


def test_only_chosen_samples_are_fetched(folder: Path, server: str) -> None:
    shard = written(folder, [f"{server}/plain/img/{n}.jpg" for n in range(8)])
    assert [isinstance(sample, Sample) and sample.reference is not None for sample in list_samples(shard)] == [True] * 8


BAD = {
    "missing column": ({"label": [0], "image": [b""]}, "no column 'url'; its columns are label, image"),
    "lists": ({"url": [["a.jpg", "b.jpg"]]}, "the column 'url' holds lists of images"),
    "numbers": ({"url": [1]}, "the column 'url' holds int64"),
}


@pytest.mark.parametrize(("columns", "reason"), BAD.values(), ids=BAD)
@pytest.mark.full
def test_unusable_column_is_one_line(
    tmp_path: Path, columns: dict[str, list[object]], reason: str, complaint: Callable[..., str], model_spec: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    command = ["fit", "--model", model_spec, "--image-size", 16, "--resize", 16, "--mean", "0,0,0", "--std", "1,1,1"]
    line = complaint(
        *command, "--shards", tmp_path / "a.parquet", "--image-column", "url", "--out", tmp_path / "run",
        "--workers", 0, "--retries", 0,
    )  # fmt: skip
    assert reason in line


def test_lists_of_images_are_refused_by_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"photos": [[b"a", b"b"]]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="'photos' holds lists of images"):
        list(read_shard(str(tmp_path / "a.parquet")))


def test_options_that_do_not_fit_are_one_line(folder: Path) -> None:
    with pytest.raises(UserError, match="no column names them"):
        list_shards([str(folder)], image_base="/data")
    with pytest.raises(UserError, match="not a Parquet file"):
        list_shards([f"{folder}/"], image_column="url")


@pytest.mark.full
def test_rejected_images_are_fetched_again_and_give_the_fit_of_all(
    folder: Path, server: str, model_spec: str, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    pq.write_table(pa.table({"image": IMAGES}), tmp_path / "a" / "x.parquet")
    fit(make_fit_config(model_spec, [str(tmp_path / "a" / "x.parquet")], tmp_path / "all"), HERE)
    missing = folder / "img" / "3.jpg"
    missing.rename(folder / "img" / "away.jpg")
    pq.write_table(pa.table({"url": [f"img/{n}.jpg" for n in range(8)]}), folder / "x.parquet")
    shards = list_shards([str(folder / "x.parquet")], image_column="url")
    config = make_fit_config(model_spec, list(shards), tmp_path / "run")
    section = fit(config, HERE).manifest()["fit"]
    assert (section["samples"], section["refused"]) == (7, 1)
    (folder / "img" / "away.jpg").rename(missing)
    section = fit(config, HERE, retry_quarantined=True).manifest()["fit"]
    assert (section["samples"], section["refused"]) == (8, 0)
    expected, found = (load_file(f / "patterns.safetensors") for f in (tmp_path / "all", tmp_path / "run"))
    for name, pattern in expected.items():  # the batches differ, and so does their rounding
        assert (pattern - found[name]).norm() <= 1e-4 * pattern.norm(), name


@pytest.mark.full
def test_command_of_the_page_runs(
    folder: Path, server: str, model_spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tables").mkdir()
    for number in range(2):
        table = pa.table({"url": [f"{server}/plain/img/{n}.jpg" for n in range(number, 8, 2)]})
        pq.write_table(table, tmp_path / "tables" / f"{number}.parquet")
    monkeypatch.chdir(tmp_path)
    words = read_command("data.md", "## Tables that name images")
    words = [model_spec if word == "torchvision:resnet50" else word for word in words]
    assert exit_status([*words, *OPTIONS, "--workers", "0"]) == 0
    assert Run("runs/laion").manifest()["fit"]["samples"] == 8
