"""The words of the command line → values, and what it says."""

import os
from pathlib import Path

from patterns import UserError
from patterns.attribution import method_of, settings_of
from ray_jobs.config import MethodsConfig, ModelConfig
from ray_jobs.io.object_store import located, writable


def fitted(patterns: str, model: str | None, weights: str | None, precision: str | None) -> ModelConfig:
    """The model of a finished fit, with what is said otherwise of it."""
    from ray_jobs.runs.run_folder import Run

    said = {"spec": model, "weights": weights, "precision": precision}
    return ModelConfig(**Run(patterns).fitted_model() | {k: v for k, v in said.items() if v is not None})


def on_methods(
    model: ModelConfig,
    patterns: str,
    shards: tuple[str, ...],
    out: str | None,
    batch_size: int,
    methods: str,
    estimator: str,
    settings: list[str] | None,
    max_samples: int | None,
    seed: int,
) -> MethodsConfig:
    """What all jobs of methods are told, from the command line's words. UserError for what they do not mean."""
    chosen = {name: method_of(name) for name in words(methods) or ("",)}
    told = settings_of(chosen, assignments(settings or []))
    where = place(patterns), shards, target(out or patterns)
    return MethodsConfig(
        model, *where, batch_size, tuple(chosen), words(estimator), tuple(told.items()), max_samples, seed
    )


def beside(run: str, name: str) -> Path:
    """A file of a run's folder; of a run at a URL, in this directory."""
    return (located(run).local or Path()) / name


def place(where: str) -> str:
    """A folder or URL as every process understands it."""
    return str(located(where))


def target(where: str) -> str:
    """The same for a folder that a job writes. UserError if it cannot be one."""
    return str(writable(where))


def assignments(listed: list[str]) -> dict[str, float]:
    """Options of the form NAME=NUMBER."""
    found = {}
    for text in listed:
        name, _, value = text.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError as error:
            raise UserError("--set", f"{text!r} sets nothing", "Write METHOD.SETTING=NUMBER.") from error
    return found


def variables(listed: list[str]) -> tuple[tuple[str, str], ...]:
    """Options of the form NAME=VALUE, or NAME for the value that it has here."""
    found = {}
    for text in listed:
        name, given, value = text.partition("=")
        if not name or (not given and name not in os.environ):
            raise UserError("--env", f"{text!r} names no variable that has a value here", "Write NAME=VALUE or NAME.")
        found[name] = value if given else os.environ[name]
    return tuple(found.items())


def words(listed: str) -> tuple[str, ...]:
    """A comma-separated option of words."""
    return tuple(word.strip() for word in listed.split(",") if word.strip())


def numbers(listed: str | None) -> tuple[float, ...] | None:
    """A comma-separated option of numbers."""
    try:
        return None if listed is None else tuple(map(float, listed.split(",")))
    except ValueError as error:
        raise UserError("--mean --std", f"{listed!r} are no numbers", "Write 0.5,0.5,0.5.") from error


def say(text: str) -> None:
    print(text, flush=True)
