"""The output folder of a run, and its manifest: the options, inputs and results of each job."""

import json
import platform
from collections.abc import Collection, Iterable, Sequence
from dataclasses import MISSING, asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from patterns import Operator, UserError
from patterns.io import TEMPORARY_PREFIX, Patterns, list_patterns, load, write_json, write_table
from patterns.operators import TYPE_NAMES, AnyGate, SmoothGate
from ray_jobs.config import AUTO, FitConfig, MethodsConfig, ModelConfig, Preprocessing, QualityConfig
from ray_jobs.data.samples import RejectedSample
from ray_jobs.io import object_store
from ray_jobs.io.file_systems import translate_errors
from ray_jobs.models.loading import AnyModel, TracedModel
from ray_jobs.units import find_version, make_printable

FORMAT = 1
PROGRESS = "progress.json"
JOBS = ("fit", "quality", "explain", "degrade", "evaluate", "atlas", "concepts")
Config = FitConfig | QualityConfig | MethodsConfig
LIBRARIES = ("patternnet-ray", "torch", "torchvision", "ray", "webdataset", "zennit", "pyarrow", "safetensors")
REJECTED = pa.schema([(name, pa.string()) for name in ("shard", "key", "stage", "reason")])
QUARANTINE = REJECTED.insert(0, pa.field("job", pa.string()))


class Run:
    """The folder of a run. Its manifest has a section for each job that wrote to it.

    Args:
        folder: The folder or its URL.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = object_store.locate(folder)
        self.path = self.folder / "manifest.json"
        self.moments = self.folder / "moments"

    def manifest(self) -> dict[str, Any]:
        """Return the manifest; it is empty for a new run.

        Raises:
            UserError: If the file is no manifest of this format.
        """
        try:
            manifest = json.loads(self.path.read_text())
            assert manifest["format"] == FORMAT
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise UserError(str(self.path), "not a manifest of this version", "Choose another --out.") from error
        return dict(manifest)

    def progress(self) -> dict[str, Any]:
        """Return the last heartbeat of a driver; it is empty if there is none."""
        path = self.folder / PROGRESS
        try:
            with translate_errors(str(path), remedy="Delete it; only the progress of the last driver is lost."):
                return dict(json.loads(path.read_text()))
        except FileNotFoundError:
            return {}

    def require_job(self, job: str, remedy: str) -> dict[str, Any]:
        """Return the section of a finished job.

        Args:
            job: The name of the job.
            remedy: The remedy of the error.

        Raises:
            UserError: If the job has not finished in this folder.
        """
        section = self.manifest().get(job, {})
        if section.get("status") != "complete":
            raise UserError(str(self.folder), f"holds no finished {job}", remedy)
        return dict(section)

    def read_fitted_model(self) -> dict[str, Any]:
        """Return the model of this folder's finished fit, as the arguments of ModelConfig.

        Raises:
            UserError: If there is no finished fit.
        """
        model = self.require_job("fit", "Run `patternnet fit` to the end first, or name another --patterns.")["model"]
        return {key: tuple(value) if isinstance(value, list) else value for key, value in model.items()}

    def section(self, job: str, config: Config, loaded: AnyModel) -> dict[str, Any]:
        """Return the section of a job that starts or is resumed; nothing is written.

        Args:
            job: The name of the job.
            config: The job.
            loaded: Its model.

        Raises:
            UserError: If the folder holds this job with other options.
        """
        options = {**options_of(config), "weights": loaded.digest, "preprocessing": asdict(loaded.preprocessing)}
        options = json.loads(json.dumps(options))
        before = self.manifest().get(job)
        if before is not None:
            begun = upgrade_options(before["options"], config)
            if begun != (now := upgrade_options(options, config)):
                what = f"this {job} was begun with {describe_difference(begun, now)}"
                raise UserError(str(self.path), what, "Use the options it was begun with, or another --out.")
        return before or {"options": options, "model": asdict(config.model), "status": "begun", "missing": {}}

    def record(self, job: str, section: dict[str, Any], loaded: AnyModel) -> None:
        """Write the section of a job, and what all jobs have in common. No worker may write to it then.

        Args:
            job: The name of the job.
            section: Its section.
            loaded: Its model.

        Raises:
            UserError: See `require_model`.
        """
        self.remove_temporary_files()
        self.require_model(loaded.traced)
        manifest = {
            **self.manifest(),
            "format": FORMAT,
            "model": {
                "digest": loaded.digest,
                "constants": loaded.network.constants,
                "precision": loaded.config.precision,
                "input_shape": loaded.network.input_shape,
            },
            "operators": [describe_operator(op) for op in loaded.network.operators.values()],
            "constant_factors": loaded.network.constant_factors,
            "versions": {"python": platform.python_version()} | {name: find_version(name) for name in LIBRARIES},
            job: {**section, "written": datetime.now(UTC).isoformat(timespec="seconds")},
        }
        with object_store.publish(self.folder) as folder:
            write_json(folder / self.path.name, manifest)

    def require_model(self, model: TracedModel) -> None:
        """Raise UserError if this folder's model had other numbers that are not among its weights.

        The digest of the weights is compared elsewhere. Such numbers may differ between versions of torch, and between
        precisions.
        """
        manifest = self.manifest()
        before = manifest.get("model", {})
        same = manifest.get("versions", {}).get("torch") == find_version("torch")
        same = same and (before.get("digest"), before.get("precision")) == (model.digest, model.config.precision)
        if same:
            model.require(model.digest, before.get("constants"), str(self.folder), "the runs of this folder")

    def remove_temporary_files(self) -> None:
        """Delete the unfinished files of workers and drivers that were killed."""
        if self.folder.local is not None:
            with translate_errors(str(self.folder), "cleaned"):
                for temporary in self.folder.local.rglob(f"{TEMPORARY_PREFIX}*"):
                    temporary.unlink(missing_ok=True)

    def write_quarantine(self, job: str, rejected: list[RejectedSample]) -> None:
        """Write quarantine.parquet: the samples that a job rejected, with those of the folder's other jobs.

        Args:
            job: The name of the job.
            rejected: All samples that it rejected.
        """
        path = self.folder / "quarantine.parquet"
        try:
            earlier = object_store.read_table(path).to_pylist()
        except FileNotFoundError:
            earlier = []
        rows = [row for row in earlier if row["job"] != job]
        rows += [{"job": job, **row} for row in to_rows(rejected)]
        with object_store.publish(self.folder) as folder:
            write_table(folder / path.name, QUARANTINE, [pa.Table.from_pylist(rows, QUARANTINE)])

    def read_quarantine(self, job: str) -> list[RejectedSample]:
        """Return the samples that a job rejected, from quarantine.parquet."""
        rows = object_store.read_table(self.folder / "quarantine.parquet").to_pylist()
        return [RejectedSample(**{k: v for k, v in row.items() if k != "job"}) for row in rows if row["job"] == job]


def write_rejected(path: Path, rejected: Iterable[RejectedSample]) -> None:
    """Write a table of rejected samples."""
    write_table(path, REJECTED, [pa.Table.from_pylist(to_rows(rejected), REJECTED)])


def read_rejected(path: object_store.Location) -> list[RejectedSample]:
    """Return the rejected samples of a table, on this machine or in an object store."""
    return [RejectedSample(**row) for row in object_store.read_table(path).to_pylist()]


def to_rows(rejected: Iterable[RejectedSample]) -> list[dict[str, str]]:
    """Return rejected samples as rows of a table, whose text must be UTF-8; names of shards may be other bytes."""
    return [{name: make_printable(value) for name, value in asdict(each).items()} for each in rejected]


def load_patterns(run: str, weights: str, operators: Collection[str] | None = None) -> Patterns:
    """Return the patterns of a run.

    Args:
        run: The run's folder or URL.
        weights: The digest of the weights that they must be fitted to.
        operators: The operators whose patterns are loaded; None: all.

    Raises:
        UserError: If the patterns are those of other weights, or are not there.
    """
    with object_store.fetch(object_store.locate(run) / "patterns.safetensors") as file:
        return load(file.parent, weights, operators)


def list_solved(run: str) -> dict[str, list[str]]:
    """Return the names of the patterns of each operator in a run.

    Args:
        run: The run's folder or URL.

    Raises:
        UserError: If there are no patterns.
    """
    with object_store.fetch(object_store.locate(run) / "patterns.safetensors") as file:
        return list_patterns(file.parent)


def options_of(config: Config) -> dict[str, Any]:
    """Return the options that a resumed job must share: without the weights' path, because their digest is compared."""
    options = asdict(config)
    model = options.pop("model")
    options.pop("out")
    return {**{k: v for k, v in model.items() if k != "weights"}, **options}


def upgrade_options(options: dict[str, Any], config: Config) -> dict[str, Any]:
    """Return a manifest's options in the form of this version, with defaults for options that an older one lacked."""
    defaults = defaults_of(ModelConfig, type(config))
    # Before there was `auto`, jobs took all positions, and compiled nothing unless asked.
    options = {name: None if value == AUTO else value for name, value in defaults.items()} | options
    if options.get("compile") == AUTO:  # the same results as without, on any device
        options["compile"] = None
    options["preprocessing"] = defaults_of(Preprocessing) | options["preprocessing"]
    if "classes" in options:  # version 0.2.0 stored them in another order
        options["classes"] = sorted(options["classes"])
    return options


def defaults_of(*types: type[Config | ModelConfig | Preprocessing]) -> dict[str, Any]:
    """Return the default values of dataclasses, as JSON has them."""
    found = {f.name: f.default for each in types for f in fields(each) if f.default is not MISSING}
    return dict(json.loads(json.dumps(found)))


def describe_difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return a text that names the first option that differs."""
    for name in before | now:
        was, is_ = before.get(name), now.get(name)
        if was == is_:
            continue
        if isinstance(was, list) and isinstance(is_, list) and name in {"shards", "evaluate"} and was and is_:
            return f"{len(was)} shards from {was[0]}, now {len(is_)} from {is_[0]}"
        return f"{name} {was}, now {is_}"
    return "the same options"


def describe_gate(gate: AnyGate | None) -> Any:
    """Return a gate's entry in the manifest: the limits of a rectifier, or the name and parameters of a smooth gate."""
    if isinstance(gate, SmoothGate):
        return {"name": gate.name, "parameters": list(gate.parameters)}
    return None if gate is None else [gate.low, None if gate.high == float("inf") else gate.high]


def find_ranges(numbers: Sequence[int]) -> list[list[int]]:
    """Return the ranges of successive numbers in ascending numbers: the first and the last number of each."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ranges


def describe_operator(operator: Operator) -> dict[str, Any]:
    """Return an operator's entry in the manifest."""
    return {
        "name": operator.name,
        "kind": TYPE_NAMES[type(operator.operator_type)],
        "weight": list(operator.weight.shape),
        "rows": None if operator.rows is None else find_ranges(operator.rows),
        "input": [list(s) for s in operator.input_shapes],
        "output": list(operator.output_shape),
        "gate": describe_gate(operator.gate),
        "mixed_gates": operator.mixed_gates,
        "source": operator.source,
    }
