"""A fit from sampled positions equals the library's, for any number of workers and any order of shards."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from patterns import Observer, UserError, solve
from ray_jobs.config import Resources
from ray_jobs.data.samples import derive_seed
from ray_jobs.data.selection import Selection
from ray_jobs.data.shard_reader import ReaderConfig, ShardReader, list_samples
from ray_jobs.jobs.fit import position_pilot
from ray_jobs.jobs.fit.fit import fit, merge
from ray_jobs.jobs.fit.position_pilot import count_images, read_pilot
from ray_jobs.models import loading
from tests.conftest import make_shards
from tests.patterns.networks import relative
from tests.ray_jobs.runs import assert_same_patterns, make_fit_config
from tests.ray_jobs.servers import http_server

HERE = Resources(workers=0)
Capsys = pytest.CaptureFixture[str]


@pytest.mark.full
def test_the_job_samples_the_positions_that_the_library_samples(
    model_spec: str, shards: list[str], tmp_path: Path
) -> None:
    config = make_fit_config(
        model_spec, shards, tmp_path / "run", positions=3, seed=4, estimators=("linear", "two-component")
    )
    run = fit(config, HERE)
    loaded = loading.load(config.model)
    observer = Observer(loaded.network, positions=3, seed=4)
    for shard in shards:
        for batch in ShardReader(shard, ReaderConfig(loaded.preprocessing, 100)):
            observer.update(batch.images, [derive_seed(key) for key in batch.keys])
    found, moments = load_file(run.folder / "patterns.safetensors"), observer.moments()
    for name, operator in loaded.network.operators.items():
        for row, pattern in solve(operator, moments[name], config.estimators).patterns.items():
            # float32, other batches, and some neurons' denominators are close to 0.
            assert relative(found[f"{name}/{row}"], pattern) < 2e-3
    assert run.manifest()["fit"]["options"]["positions"] == 3


@pytest.mark.slow
def test_the_number_of_workers_and_the_order_of_shards_change_no_digit(
    local_ray: None, model_spec: str, shards: list[str], tmp_path: Path
) -> None:
    config = make_fit_config(model_spec, shards, tmp_path / "one", positions=3)
    one = fit(config, HERE)
    two = fit(replace(config, out=str(tmp_path / "two")), Resources(workers=2, gpus_per_worker=0))
    back = fit(replace(config, out=str(tmp_path / "back"), shards=config.shards[::-1]), HERE)
    assert_same_patterns(one.folder, two.folder)
    assert_same_patterns(one.folder, back.folder)


@pytest.mark.parametrize("positions", ["0", "-1", "some", "1.5"])
def test_a_wrong_number_of_positions_is_rejected(complaint, positions: str) -> None:  # type: ignore[no-untyped-def]
    line = complaint("fit", "--model", "torchvision:vgg11", "--shards", "x.tar", "--out", "x", "--positions", positions)
    assert f"'{positions}' is not a number of positions; write 16, all or auto" in line


@pytest.mark.full
def test_merged_fits_of_sampled_positions_equal_the_fit_of_all_their_shards(
    model_spec: str, shards: list[str], tmp_path: Path
) -> None:
    halves = [
        str(fit(make_fit_config(model_spec, part, tmp_path / name, positions=3), HERE).folder)
        for name, part in (("a", shards[:5]), ("b", shards[5:]))
    ]
    whole = fit(make_fit_config(model_spec, shards, tmp_path / "whole", positions=3), HERE)
    merged = merge(halves, str(tmp_path / "all"), HERE)
    assert_same_patterns(whole.folder, merged.folder)
    assert merged.manifest()["fit"]["options"]["positions"] == 3


@pytest.mark.full
def test_fits_that_chose_other_positions_are_not_merged(
    model_spec: str, shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(position_pilot, "MANY", 20)  # 12 images are few, and 60 many
    runs = [
        str(fit(make_fit_config(model_spec, part, tmp_path / name, until_converged=100.0), HERE).folder)
        for name, part in (("some", shards[:2]), ("rest", shards[2:]))
    ]
    with pytest.raises(UserError, match="positions None, now 16") as error:
        merge(runs, str(tmp_path / "all"), HERE)
    assert "--positions all" in error.value.remedy


@pytest.mark.full
@pytest.mark.parametrize(("tolerance", "expected"), [(100.0, 16), (1e-6, None), (None, None)])
def test_auto_chooses_the_positions_that_the_tolerance_needs_and_keeps_them(
    model_spec: str,
    shards: list[str],
    tmp_path: Path,
    tolerance: float | None,
    expected: int | None,
    capsys: Capsys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(position_pilot, "MANY", 70)
    config = make_fit_config(model_spec, shards, tmp_path / "run", positions="auto", until_converged=tolerance)
    section = fit(config, HERE).manifest()["fit"]
    assert section["options"]["positions"] == expected
    chosen = section["positions"]
    wanted = 0.01 if tolerance is None else tolerance
    assert (chosen["positions"], chosen["tolerance"], chosen["images"]) == (expected, wanted, 72)
    assert (0 < chosen["expected_error"] <= wanted) == (expected is not None)
    number = "all" if expected is None else str(expected)
    assert f"{number} positions of each image: " in capsys.readouterr().err
    assert fit(config, HERE).manifest()["fit"]["positions"] == chosen
    assert "positions of each image" not in capsys.readouterr().err


def test_auto_takes_all_positions_if_there_are_few_images(
    model_spec: str, shards: list[str], tmp_path: Path, capsys: Capsys
) -> None:
    section = fit(make_fit_config(model_spec, shards[:1], tmp_path / "run"), HERE).manifest()["fit"]
    assert section["options"]["positions"] is None
    assert section["positions"] == {"positions": None, "images": 6}
    assert "fit: all positions of each image: about 6 images are fewer than the 5000 " in capsys.readouterr().err


def test_images_are_counted_in_the_selection_and_the_pilot_has_no_others(
    model_spec: str, shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = {shard: [sample.key for sample in list_samples(shard)] for shard in shards}
    chosen = {shard: frozenset(keys[1:3]) for shard, keys in every.items() if shard != shards[0]}
    lists = {"only": Selection(only=chosen), "skip": Selection(skip=chosen)}
    config = make_fit_config(model_spec, shards, tmp_path / "run")
    assert count_images(config, lists["only"]) == 2 * (len(shards) - 1)
    assert count_images(replace(config, max_samples=7), lists["only"]) == 7
    monkeypatch.setattr(position_pilot, "MANY", 10)
    assert count_images(replace(config, shards=config.shards[1:]), lists["skip"]) == 4 * (len(shards) - 1)
    loaded = loading.load(config.model)
    for name, selection in lists.items():
        found = torch.cat(read_pilot(config, loaded, selection))
        others = {shard: frozenset(keys) - chosen.get(shard, frozenset()) for shard, keys in every.items()}
        reader_config = ReaderConfig(loaded.preprocessing, 100)
        used = [batch.images for shard in shards for batch in ShardReader(shard, reader_config, skip=others[shard])]
        images = torch.cat(used)
        seen = [bool((images == one).flatten(1).all(1).any()) for one in found]
        assert seen == [name == "only"] * len(seen), name
        assert seen


def test_images_of_a_server_that_fails_once_are_counted(model_spec: str, tmp_path: Path) -> None:
    make_shards(tmp_path / "data", 1, 6)
    with http_server(tmp_path / "data") as address:
        (shard,) = (path.name for path in (tmp_path / "data").glob("*.tar"))
        config = make_fit_config(model_spec, [f"{address}/once/{shard}"] * 1000, tmp_path / "run")
        assert count_images(config, Selection()) == 6000


@pytest.mark.full
def test_more_positions_than_an_image_has_are_all_positions(model_spec: str, shards: list[str], tmp_path: Path) -> None:
    every = fit(make_fit_config(model_spec, shards[:2], tmp_path / "every"), HERE)
    many = fit(make_fit_config(model_spec, shards[:2], tmp_path / "many", positions=10**6), HERE)
    assert_same_patterns(every.folder, many.folder)
