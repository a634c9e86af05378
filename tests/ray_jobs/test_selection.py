"""`patternnet select`: expressions against plain Python, and the lists that fit, explain and pack take."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from patterns import UserError
from ray_jobs.cli.app import exit_status
from ray_jobs.config import (
    AtlasConfig,
    DegradeConfig,
    EvaluateConfig,
    ExplainConfig,
    FitConfig,
    ModelConfig,
    Preprocessing,
    Resources,
)
from ray_jobs.data.packing import pack
from ray_jobs.data.selection import load_selection, write_keys
from ray_jobs.data.shard_reader import ReaderConfig, ShardReader, read_shard
from ray_jobs.io.object_store import locate
from ray_jobs.jobs.atlas.atlas import atlas
from ray_jobs.jobs.degrade import degrade
from ray_jobs.jobs.evaluate import evaluate
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.jobs.fit.fit import fit
from ray_jobs.jobs.refitting import refit
from ray_jobs.models import loading
from ray_jobs.views.atlas.selection import parse_expression
from tests.conftest import write_tar
from tests.ray_jobs.runs import PREPROCESSING

HERE = Resources(workers=0)
SCHEMA = pa.schema([("class", pa.int64()), ("cluster", pa.int32()), ("key", pa.string()), ("score", pa.float32())])
ROWS = [
    {"class": number % 3, "cluster": number % 2, "key": f"k {number}", "score": None if number == 4 else number / 2}
    for number in range(12)
]


@pytest.mark.parametrize(
    ("expression", "holds"),
    [
        ("class=1", lambda r: r["class"] == 1),
        ("class == 1 and cluster=0", lambda r: r["class"] == 1 and r["cluster"] == 0),
        ("class=1 or class=2 and cluster=0", lambda r: r["class"] == 1 or (r["class"] == 2 and r["cluster"] == 0)),
        ("(class=1 or class=2) and cluster=0", lambda r: r["class"] in (1, 2) and r["cluster"] == 0),
        ("not (class=1 or score >= 2.5)", lambda r: r["score"] is not None and r["class"] != 1 and r["score"] < 2.5),
        ("cluster < 5000000000 and class > -9223372036854775808", lambda r: True),
        ("key='k 7' or key=\"k 8\"", lambda r: r["key"] in ("k 7", "k 8")),
        ("score = null", lambda r: r["score"] is None),
        ("score != null AND class != cluster", lambda r: r["score"] is not None and r["class"] != r["cluster"]),
    ],
)
def test_expressions_select_what_python_does(expression: str, holds: Callable[[dict[str, Any]], bool]) -> None:
    table = pa.Table.from_pylist(ROWS, SCHEMA)
    found = table.filter(parse_expression(expression, SCHEMA))["key"].to_pylist()
    assert found == [row["key"] for row in ROWS if holds(row)]


@pytest.mark.parametrize(
    ("expression", "named"),
    [
        ("klass=1", "klass"),
        ("class=", "class"),
        ("class=1 cluster=2", "cluster"),
        ("class='x'", "class"),
        ("key=3", "key"),
        ("(class=1", "parenthesis"),
        ("class ~ 1", "~"),
        ("class=1 and", "missing"),
        ("", "missing"),
        ("__import__('os')", "__import__"),
        ("class < null", "null"),
        ("class=key", "key"),
        ("class=100000000000000000000", "64 bits"),
        ("class=" + "9" * 5000, "64 bits"),
        ("not " * 100 + "class=1", "deeper"),
    ],
)
def test_wrong_expressions_are_errors_that_name_the_place(expression: str, named: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_expression(expression, SCHEMA)
    assert caught.value.parameter == "expression"
    assert named in caught.value.what


@pytest.mark.full
def test_selected_samples_are_used_or_left_out(
    model: ModelConfig, fitted: str, shards: list[str], tmp_path: Path
) -> None:
    shards = shards[:3]
    config = AtlasConfig(
        model=model, patterns=fitted, shards=tuple(shards), out=str(tmp_path / "atlas"), target="label"
    )
    run = Path(str(atlas(config, HERE).folder))
    samples = pq.read_table(run / "samples.parquet").to_pylist()
    wanted = {(s["shard"], s["key"]) for s in samples if s["class"] == samples[0]["class"]}
    out = tmp_path / "selection"
    assert exit_status(["select", str(run), f"class={samples[0]['class']}", "--out", str(out)]) == 0
    assert set((out / "shards.txt").read_text().split()) == {shard for shard, _ in wanted}
    keys = str(out / "keys.txt")
    for option, expected in (("keys", wanted), ("without_keys", {(s["shard"], s["key"]) for s in samples} - wanted)):
        common: dict[str, Any] = {"model": model, "shards": tuple(shards), "out": str(tmp_path / option), option: keys}
        fitting = FitConfig(**common | {"out": str(tmp_path / f"fit-{option}")})
        assert fit(fitting, HERE).manifest()["fit"]["samples"] == len(expected)
        common |= {"patterns": fitted}
        measured = {"methods": ("gradient",), "patch": 8, "steps": 2}
        runs = (
            explain(ExplainConfig(**common, methods=("gradient",)), HERE),
            atlas(AtlasConfig(**common), HERE),
            degrade(DegradeConfig(**common, **measured), HERE),
            evaluate(EvaluateConfig(**common, **measured, measures=("degradation", "class")), HERE),
        )
        tables = "explanations", "samples", "degradation", "evaluation"
        for run_of_job, table in zip(runs, tables, strict=True):
            rows = pq.read_table(Path(str(run_of_job.folder)) / f"{table}.parquet", columns=["shard", "key"])
            assert {(row["shard"], row["key"]) for row in rows.to_pylist()} == expected, table


@pytest.mark.parametrize(
    ("max_samples", "used", "rejected"),
    [(None, ["s000-1", "s000-4"], ["gone"]), (7, ["s000-1", "s000-4"], ["gone"]), (3, ["s000-1"], [])],
)
def test_listed_samples_beyond_the_limit_are_not_read(
    shards: list[str], max_samples: int | None, used: list[str], rejected: list[str]
) -> None:
    config = ReaderConfig(Preprocessing(**PREPROCESSING, interpolation="bilinear"), 4)  # type: ignore[arg-type]
    reader = ShardReader(shards[0], config, max_samples, frozenset(["s000-1", "s000-4", "gone"]))
    assert [key for batch in reader for key in batch.keys] == used
    assert [each.key for each in reader.rejected] == rejected


@pytest.mark.full
def test_jobs_do_not_reject_listed_samples_beyond_the_limit(
    model: ModelConfig, fitted: str, shards: list[str], tmp_path: Path
) -> None:
    shard, keys = shards[0], tmp_path / "keys.txt"
    write_keys(keys, [(shard, key) for key in ("s000-1", "s000-4", "gone")])
    common: dict[str, Any] = {"model": model, "patterns": fitted, "shards": (shard,)}
    explaining = ExplainConfig(**common, methods=("patternattribution",), outputs=("npy",), out=str(tmp_path / "all"))
    common |= {"explanations": str(explain(explaining, HERE).folder), "max_samples": 3, "keys": str(keys)}
    for explanations in (None, common["explanations"]):
        out = tmp_path / f"atlas-{explanations is None}"
        section = atlas(AtlasConfig(**common | {"explanations": explanations, "out": str(out)}), HERE).manifest()
        assert (section["atlas"]["samples"], section["atlas"]["refused"]) == (1, 0)
        assert pq.read_table(out / "samples.parquet")["key"].to_pylist() == ["s000-1"]


@pytest.mark.full
def test_refit_uses_the_selected_samples(model: ModelConfig, fitted: str, shards: list[str], tmp_path: Path) -> None:
    wanted = [(shards[0], "s000-1"), (shards[0], "s000-4"), (shards[1], "s001-5"), (shards[2], "s002-0")]
    by_key = {sample.key: sample for shard in shards[:3] for sample in read_shard(shard)}
    chosen = write_tar(tmp_path / "chosen.tar", [{"__key__": key, **by_key[key].files} for _, key in wanted[:3]])
    write_keys(tmp_path / "keys.txt", wanted)
    others = [(shard, f"s{number:03d}-{k}") for number, shard in enumerate(shards[:3]) for k in range(6)]
    write_keys(tmp_path / "others.txt", [sample for sample in others if sample not in wanted])
    traced, found = loading.load(model).traced, []
    for name, lists, read in (
        ("keys", (str(tmp_path / "keys.txt"), None), tuple(shards[:3])),
        ("others", (None, str(tmp_path / "others.txt")), tuple(shards[:3])),
        ("all", (None, None), (str(chosen),)),
    ):
        options: dict[str, Any] = {"model": model, "patterns": fitted, "batch_size": 2, "refit_samples": 3}
        config = EvaluateConfig(**options, shards=read, out=str(tmp_path / "out"))
        refit(config, traced, load_selection(*lists, read), locate(tmp_path / name))
        found.append(load_file(tmp_path / name / "patterns.safetensors"))
    for other in found[:2]:
        for name, expected in found[2].items():
            torch.testing.assert_close(other[name], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.full
def test_changed_lists_and_lists_of_other_shards_are_errors(
    model: ModelConfig, fitted: str, shards: list[str], tmp_path: Path
) -> None:
    keys = tmp_path / "keys.txt"
    write_keys(keys, [(shards[0], "no such key")])
    with pytest.raises(UserError) as caught:
        load_selection(str(keys), None, shards[1:])
    assert caught.value.parameter == "keys"
    keys.write_text("no tab\n")
    with pytest.raises(UserError) as caught:
        load_selection(None, str(keys), shards)
    assert "line 1" in caught.value.what
    config = ExplainConfig(
        model=model, patterns=fitted, shards=tuple(shards[:2]), out=str(tmp_path / "out"), methods=("gradient",),
        without_keys=str(keys),
    )  # fmt: skip
    write_keys(keys, [(shards[0], "a")])
    explain(config, HERE)
    write_keys(keys, [(shards[0], "b")])
    with pytest.raises(UserError) as caught:
        explain(config, HERE)
    assert "lists of keys" in caught.value.what


def test_pack_takes_only_the_images_of_a_list(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    write_keys(tmp_path / "keys.txt", [("anywhere", "cat/2"), ("anywhere", "dog/1")])
    (shard,) = pack(tmp_path / "images", tmp_path / "out", keys=str(tmp_path / "keys.txt"))
    import tarfile

    with tarfile.open(shard) as tar:
        assert {name.partition(".")[0] for name in tar.getnames()} == {"cat/2", "dog/1"}
    with pytest.raises(UserError) as caught:
        pack(tmp_path / "images", tmp_path / "none", keys=str(tmp_path / "keys.txt"),
             without_keys=str(tmp_path / "keys.txt"))  # fmt: skip
    assert caught.value.parameter == "without_keys"
