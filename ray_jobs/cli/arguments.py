"""Conversions of options that several commands share."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_jobs.cli.typer_options import Given
from ray_jobs.config import ModelConfig, Resources
from ray_jobs.config.commands import FittedModel, ShardOptions
from ray_jobs.io.object_store import locate, require_writable

if TYPE_CHECKING:
    from ray_jobs.runs.run_folder import Run


def fitted_model(patterns: str, given: FittedModel) -> ModelConfig:
    """Return the model of a finished fit, with the given values instead of the fit's."""
    from ray_jobs.runs.run_folder import Run

    return ModelConfig(**Run(patterns).read_fitted_model() | {k: v for k, v in vars(given).items() if v is not None})


def methods_options(given: Given[Any], model: FittedModel, reading: ShardOptions) -> dict[str, Any]:
    """Return the fields of a MethodsConfig that follow from several options.

    Raises:
        UserError: If a method or a setting is unknown, or the folder holds no finished fit.
    """
    from patterns.attribution import parse_method, resolve_settings

    methods = {name: parse_method(name) for name in given.methods or ("",)}
    settings = tuple(resolve_settings(methods, dict(given.settings)).items())
    return {**data_options(given, model, reading), "methods": tuple(methods), "settings": settings}


def data_options(given: Given[Any], model: FittedModel, reading: ShardOptions) -> dict[str, Any]:
    """Return the model, patterns, shards and output folder of a job that uses a finished fit.

    Raises:
        UserError: If the folder holds no finished fit, or the shards cannot be listed.
    """
    return {
        "model": fitted_model(given.patterns, model),
        "patterns": absolute(given.patterns),
        "shards": resolve_shards(given.shards, reading),
        "out": output_folder(given.out or given.patterns),
    }


def resolve_shards(specs: Iterable[str], reading: ShardOptions) -> tuple[str, ...]:
    """Return the shards that some specs name; see `list_shards`."""
    from ray_jobs.data.shard_specs import list_shards

    return list_shards(specs, reading.allow_pipes, reading.image_column, reading.image_base)


def absolute(where: str) -> str:
    """Return a folder or URL as every process understands it."""
    return str(locate(where))


def output_folder(where: str) -> str:
    """Return the folder or URL that a job writes to. Raise UserError if it cannot be written."""
    return str(require_writable(where))


def output_file(path: Path | None, run: str, name: str) -> Path:
    """Return an output file's path: by default in the run's folder, or in this directory if the run is at a URL."""
    return path or (locate(run).local or Path()) / name


def mirror_report(run: "Run", resources: Resources, job: str, figures: Mapping[str, float] | None = None) -> None:
    """Attach the report of a run, and figures of a job that its manifest lacks, to the tracker if there is one."""
    if resources.track is not None:
        from ray_jobs.engine.tracking import mirror_file
        from ray_jobs.views.report import write_report

        mirror_file(
            resources, run, job, lambda file: write_report(file, [str(run.folder)]), "report.html", figures or {}
        )


def echo(text: str) -> None:
    """Print a line and flush, so that it appears in a log at once."""
    print(text, flush=True)
