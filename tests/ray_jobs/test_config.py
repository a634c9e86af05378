"""The configs: every field is an option with a help text, and a wrong value is an error of its parameter."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import pytest

from patterns import UserError
from patterns.evaluation import PATCH, REPLACEMENTS, STEPS
from ray_jobs import config
from ray_jobs.cli.app import COMMANDS
from ray_jobs.config import (
    OUTPUTS,
    PRECISIONS,
    REDUCTIONS,
    AtlasConfig,
    DegradeConfig,
    EvaluateConfig,
    ExplainConfig,
    FitConfig,
    ModelConfig,
    QualityConfig,
    Resources,
    commands,
    model,
)
from ray_jobs.config.commands import DATASETS, ExportOptions, PackOptions, ReproduceOptions
from ray_jobs.config.option import Validated, choices_of, options_of
from ray_jobs.jobs.explain import map_statistics
from ray_jobs.jobs.fit import position_pilot
from ray_jobs.models import loading
from ray_jobs.runs.map_files import estimate_bytes_per_sample
from ray_jobs.studies import datasets

# Every config that a command takes, itself or as `Given[config]`.
CONFIGS: list[Any] = sorted(
    {(*get_args(hint), hint)[0] for command in COMMANDS.values() for hint in command.configs().values()},
    key=lambda config: config.__name__,
)
# Fields that commands fill from other options, and methods of `concepts`, which always takes the gradient.
FILLED = {"model", "classes", "timing", "vector"}
FIXED = {"ConceptsConfig": {"methods", "estimator", "preset", "settings"}}
MODEL = ModelConfig(spec="m.py:net")
FIT = FitConfig(model=MODEL, shards=("a.tar",), out="run")
EXPLAIN = ExplainConfig(model=MODEL, patterns="run", shards=("a.tar",), out="run")
DEGRADE = DegradeConfig(model=MODEL, patterns="run", shards=("a.tar",), out="run")
ATLAS = AtlasConfig(model=MODEL, patterns="run", shards=("a.tar",), out="run")
QUALITY = QualityConfig(model=MODEL, patterns="run", shards=("a.tar",), evaluate=("b.tar",), out="run")
ATLAS = AtlasConfig(model=MODEL, patterns="run", shards=("a.tar",), out="run")
EVALUATE = EvaluateConfig(model=MODEL, patterns="run", shards=("a.tar",), out="run")
PACK = PackOptions(images=Path("images"), out=Path("out"))
EXPORT = ExportOptions(run="run", to="coco", out=Path("out"))
REPRODUCE = ReproduceOptions(out=Path("out"))


def test_every_config_of_the_package_is_an_argument_of_a_command() -> None:
    classes = [each for module in (config, commands, model) for each in vars(module).values() if is_dataclass(each)]
    own = {each for each in classes if options_of(cast(type, each))}
    assert own - {base for each in CONFIGS for base in each.__mro__} == set()


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_is_an_option_with_a_help_text(config: Any) -> None:
    options = options_of(config)
    assert {field.name for field in fields(config)} - options.keys() <= FILLED | FIXED.get(config.__name__, set())
    for name, option in options.items():
        help_text = option.help() if callable(option.help) else option.help
        assert help_text.endswith("."), name


@pytest.mark.parametrize("config", CONFIGS)
def test_config_whose_options_have_limits_validates_them(config: Any) -> None:
    limits = [(each.min, each.max, each.validate, choices_of(each)) for each in options_of(config).values()]
    assert issubclass(config, Validated) or set(limits) <= {(None, None, None, ())}


@pytest.mark.parametrize("config", CONFIGS)
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
        (ATLAS, "pooled", 65),
        (ATLAS, "cluster_by", "colors"),
        (EVALUATE, "measures", ("degradation", "beauty")),
        (EVALUATE, "target", "label"),
        (PACK, "per_shard", 0),
        (EXPORT, "to", "voc"),
        (EXPORT, "threshold", 1.5),
        (REPRODUCE, "dataset", "cifar"),
        (REPRODUCE, "degraded", 0),
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
    assert set(DATASETS) == {*datasets.NAMES, "folder"}
    assert set(PRECISIONS) == set(loading.PRECISIONS)
    assert choices_of(options_of(DegradeConfig)["replacement"]) == tuple(REPLACEMENTS)
    assert set(estimate_bytes_per_sample({"gradient": (3, 8, 8)}, OUTPUTS)) == set(OUTPUTS)


def test_help_of_positions_states_the_numbers_of_the_pilot() -> None:
    text = options_of(FitConfig)["positions"].help
    pilot = f"fewer than {position_pilot.MANY:,} images", f"on {position_pilot.BATCHES * position_pilot.IMAGES} images"
    assert isinstance(text, str)
    assert all(number in text for number in (*pilot, f"at most {position_pilot.TOLERANCE * 100:g} %"))


def test_defaults_of_the_degradation_are_those_of_the_paper() -> None:
    assert (DEGRADE.patch, DEGRADE.steps) == (PATCH, STEPS)
