"""A fit from sampled positions: the library's, whoever works on what and in what order."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from patterns import Observer, solve
from ray_jobs import models
from ray_jobs.config import Resources
from ray_jobs.fit import fit
from ray_jobs.samples import seed_of
from ray_jobs.shards import ShardReader
from tests.patterns.networks import relative
from tests.ray_jobs.runs import configured, same_patterns

HERE = Resources(workers=0)


def test_the_job_draws_what_the_library_draws(model_spec: str, shards: list[str], tmp_path: Path) -> None:
    config = configured(
        model_spec, shards, tmp_path / "run", positions=3, seed=4, estimators=("linear", "two-component")
    )
    run = fit(config, HERE)
    loaded = models.load(config.model)
    observer = Observer(loaded.network, positions=3, seed=4)
    for shard in shards:
        for batch in ShardReader(shard, loaded.preprocessing, 100):
            observer.update(batch.images, [seed_of(key) for key in batch.keys])
    found, moments = load_file(run.folder / "patterns.safetensors"), observer.moments()
    for name, operator in loaded.network.operators.items():
        for row, pattern in solve(operator, moments[name], config.estimators).patterns.items():
            # In float32, in other batches, and some neurons' denominators nearly vanish.
            assert relative(found[f"{name}/{row}"], pattern) < 2e-3
    assert run.manifest()["fit"]["options"]["positions"] == 3


@pytest.mark.slow
def test_neither_workers_nor_order_change_a_digit(
    local_ray: None, model_spec: str, shards: list[str], tmp_path: Path
) -> None:
    config = configured(model_spec, shards, tmp_path / "one", positions=3)
    one = fit(config, HERE)
    two = fit(replace(config, out=str(tmp_path / "two")), Resources(workers=2, gpus_per_worker=0))
    back = fit(replace(config, out=str(tmp_path / "back"), shards=config.shards[::-1]), HERE)
    same_patterns(one.folder, two.folder)
    same_patterns(one.folder, back.folder)


@pytest.mark.parametrize("positions", ["0", "-1", "some", "1.5"])
def test_what_is_no_number_of_positions_is_refused(complaint, positions: str) -> None:  # type: ignore[no-untyped-def]
    line = complaint("fit", "--model", "torchvision:vgg11", "--shards", "x.tar", "--out", "x", "--positions", positions)
    assert f"'{positions}' is no number of positions; write 16, or all" in line


def test_all_positions_are_all_positions(model_spec: str, shards: list[str], tmp_path: Path) -> None:
    every = fit(configured(model_spec, shards[:2], tmp_path / "every"), HERE)
    many = fit(configured(model_spec, shards[:2], tmp_path / "many", positions=10**6), HERE)
    same_patterns(every.folder, many.folder)
