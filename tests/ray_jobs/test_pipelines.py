"""The stage `verified_tar` in WebDataset pipelines of a user."""

import re
import tarfile
from pathlib import Path

import pytest
import webdataset

from patterns import UserError
from ray_jobs.data import verified_tar
from tests.conftest import make_shards
from tests.ray_jobs.test_tar import packed, special, stored


def test_rejected_sample_has_its_reason_in_place_of_its_files(tmp_path: Path) -> None:
    shard = stored(tmp_path, packed([("a.jpg", b"1"), ("b.cls", b"2"), (special("b.jpg", tarfile.SYMTYPE), b"")]))
    good, bad = verified_tar([{"url": shard}])
    assert good == {"__key__": "a", "__url__": shard, "jpg": b"1"}
    assert bad == {"__key__": "b", "__url__": shard, "__rejection__": "jpg: a link or a device, not a file"}


def test_pipeline_of_a_user_gets_the_samples_before_the_damage_and_then_an_error(tmp_path: Path) -> None:
    shard = stored(tmp_path, packed([("a.jpg", b"1"), ("b.jpg", b"2"), ("c.jpg", b"3")])[:2048])
    pipeline = webdataset.DataPipeline(webdataset.SimpleShardList([shard]), verified_tar, webdataset.to_tuple("jpg"))
    found = iter(pipeline)
    assert next(found) == (b"1",)
    with pytest.raises(UserError, match="truncated") as caught:
        next(found)
    assert caught.value.where == shard
    loose = webdataset.DataPipeline(webdataset.SimpleShardList([shard]), webdataset.tarfile_to_samples())
    assert [sample["jpg"] for sample in loose] == [b"1", b"2"], "webdataset takes the damage for the end"


@pytest.mark.full
def test_example_of_a_pipeline_in_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    (code,) = re.findall(r"```python\n([^`]*verified_tar[^`]*)```", text)
    make_shards(tmp_path / "shards", 4, 6)
    monkeypatch.chdir(tmp_path)
    seen: list[tuple[tuple[int, ...], list[int]]] = []
    exec(code, {"print": lambda shape, labels: seen.append((tuple(shape), list(labels)))})
    assert [shape for shape, _ in seen] == [(4, 3, 16, 16)] * 6
    assert all(0 <= label < 5 for _, labels in seen for label in labels)
