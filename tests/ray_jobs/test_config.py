"""The configs: every field is an option with a help text, and a wrong value is an error of its parameter."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest

from patterns import UserError
from patterns.evaluation import PATCH, REPLACEMENTS, STEPS
from ray_jobs.config import (
    OUTPUTS,
    PRECISIONS,
    REDUCTIONS,
    AtlasConfig,
    DegradeConfig,
    ExplainConfig,
    FitConfig,
    ModelConfig,
    QualityConfig,
    Resources,
)
from ray_jobs.config.option import choices_of, options_of
from ray_jobs.jobs.explain import map_statistics
from ray_jobs.models import loading
from ray_jobs.runs.map_files import estimate_bytes_per_sample

JOBS = FitConfig, QualityConfig, ExplainConfig, DegradeConfig
# Fields that commands fill from other options.
FILLED = {"model", "classes", "timing", "vector"}
MODEL = ModelConfig(spec="m.py:net")
FIT = FitConfig(model=MODEL, shards=("a.tar",), out="run")
EXPLAIN = ExplainConfig(model=MODEL, patterns="run", shards=("a.tar",), out="run")
DEGRADE = DegradeConfig(model=MODEL, patterns="run", shards=("a.tar",), out="run")
ATLAS = AtlasConfig(model=MODEL, patterns="run", shards=("a.tar",), out="run")
QUALITY = QualityConfig(model=MODEL, patterns="run", shards=("a.tar",), evaluate=("b.tar",), out="run")


@pytest.mark.parametrize("config", [*JOBS, ModelConfig, Resources])
def test_every_field_is_an_option(config: type) -> None:
    assert {field.name for field in fields(config)} - options_of(config).keys() <= FILLED


@pytest.mark.parametrize("config", [*JOBS, ModelConfig, Resources])
def test_configs_take_keywords_only(config: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="positional"):
        config("m.py:net")


@pytest.mark.parametrize(
    ("config", "parameter", "value"),
    [
        (MODEL, "precision", "float8"),
        (MODEL, "image_size", 0),
        (MODEL, "seed", -1),
        (ATLAS, "seed", -1),
        (FIT, "batch_size", 0),
        (FIT, "positions", 0),
        (FIT, "compile", "fastest"),
        (FIT, "until_converged", -1.0),
        (FIT, "until_converged", float("nan")),
        (QUALITY, "positions", 0),
        (EXPLAIN, "compile", "fastest"),
        (EXPLAIN, "outputs", ("npy", "bmp")),
        (EXPLAIN, "outputs", ()),
        (EXPLAIN, "reduction", "mean"),
        (EXPLAIN, "size", 0),
        (DEGRADE, "replacement", "noise"),
        (DEGRADE, "patch", 0),
        (Resources(), "workers", -1),
        (Resources(), "max_bad_fraction", 1.5),
        (Resources(), "log", "xml"),
    ],
)
def test_wrong_value_is_an_error_of_its_parameter(config: Any, parameter: str, value: object) -> None:
    with pytest.raises(UserError) as caught:
        replace(config, **{parameter: value})
    assert caught.value.parameter == parameter
    assert caught.value.remedy


def test_sampled_positions_cannot_be_compiled() -> None:
    with pytest.raises(UserError) as caught:
        replace(FIT, compile="default", positions=3)
    assert caught.value.parameter == "compile"
    assert "`positions`" in caught.value.remedy


@pytest.mark.parametrize("positions", [None, "auto"])
@pytest.mark.parametrize("mode", ["default", "auto", None])
def test_all_positions_can_be_compiled(positions: Any, mode: str | None) -> None:
    assert replace(FIT, compile=mode, positions=positions).compile == mode


def test_choices_are_the_names_that_the_jobs_know() -> None:
    assert set(REDUCTIONS) == set(map_statistics.REDUCTIONS)
    assert set(PRECISIONS) == set(loading.PRECISIONS)
    assert choices_of(options_of(DegradeConfig)["replacement"]) == tuple(REPLACEMENTS)
    assert set(estimate_bytes_per_sample({"gradient": (3, 8, 8)}, OUTPUTS)) == set(OUTPUTS)


def test_defaults_of_the_degradation_are_those_of_the_paper() -> None:
    assert (DEGRADE.patch, DEGRADE.steps) == (PATCH, STEPS)
