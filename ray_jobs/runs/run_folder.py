"""One output folder and its manifest: what was run on what, and how far it came."""

import json
import platform
from collections.abc import Collection, Iterable
from dataclasses import MISSING, asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from patterns import Operator, UserError
from patterns.io import TEMPORARY, Patterns, load, write_json, write_table
from patterns.operators import TYPE_NAMES
from ray_jobs.config import FitConfig, MethodsConfig, ModelConfig, Preprocessing, QualityConfig
from ray_jobs.data.samples import Rejected
from ray_jobs.io import object_store
from ray_jobs.io.file_systems import translated
from ray_jobs.models.loading import Loaded
from ray_jobs.units import printable, version_of

FORMAT = 1
PROGRESS = "progress.json"
JOBS = ("fit", "quality", "explain", "degrade")
Config = FitConfig | QualityConfig | MethodsConfig
LIBRARIES = ("patternnet-ray", "torch", "torchvision", "ray", "webdataset", "zennit", "pyarrow", "safetensors")
REFUSED = pa.schema([(name, pa.string()) for name in ("shard", "key", "stage", "reason")])
QUARANTINE = REFUSED.insert(0, pa.field("job", pa.string()))


class Run:
    """A run's folder. Its manifest holds a section for each job that wrote to it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = object_store.located(folder)
        self.path = self.folder / "manifest.json"
        self.moments = self.folder / "moments"

    def manifest(self) -> dict[str, Any]:
        """The manifest; empty for a new run. UserError where it is not one of ours."""
        try:
            manifest = json.loads(self.path.read_text())
            assert manifest["format"] == FORMAT
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise UserError(str(self.path), "not a manifest of this version", "Choose another --out.") from error
        return dict(manifest)

    def progress(self) -> dict[str, Any]:
        """What the last driver noted of how far it was; empty where none has."""
        path = self.folder / PROGRESS
        try:
            with translated(str(path), remedy="Delete it: it only says how far the last driver was."):
                return dict(json.loads(path.read_text()))
        except FileNotFoundError:
            return {}

    def job(self, job: str, remedy: str) -> dict[str, Any]:
        """A job's section. UserError with this remedy where the job has not finished here."""
        section = self.manifest().get(job, {})
        if section.get("status") != "complete":
            raise UserError(str(self.folder), f"holds no finished {job}", remedy)
        return dict(section)

    def fitted_model(self) -> dict[str, Any]:
        """The model of this folder's finished fit, as the arguments of ModelConfig."""
        options = self.job("fit", "Run `patternnet fit` to the end first, or name another --patterns.")["model"]
        return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}

    def section(self, job: str, config: Config, loaded: Loaded) -> dict[str, Any]:
        """The section of a job that is begun here, or taken up again; nothing is written.

        UserError where the folder holds the same job with another configuration.
        """
        options = {**options_of(config), "weights": loaded.digest, "preprocessing": asdict(loaded.preprocessing)}
        options = json.loads(json.dumps(options))
        before = self.manifest().get(job)
        if before is not None and (begun := current(before["options"], config)) != current(options, config):
            raise UserError(
                str(self.path),
                f"this {job} was begun with {difference(begun, options)}",
                "Use the options it was begun with, or another --out.",
            )
        return before or {"options": options, "model": asdict(config.model), "status": "begun", "missing": {}}

    def record(self, job: str, section: dict[str, Any], loaded: Loaded) -> None:
        """Write a job's section, and what is the same for all jobs. No worker writes to the folder meanwhile."""
        self.clean()
        self.require_model(loaded)
        manifest = {
            **self.manifest(),
            "format": FORMAT,
            "model": {
                "digest": loaded.digest,
                "constants": loaded.network.constants,
                "precision": loaded.config.precision,
                "input_shape": loaded.network.input_shape,
            },
            "operators": [described(op) for op in loaded.network.operators.values()],
            "versions": {"python": platform.python_version()} | {name: version_of(name) for name in LIBRARIES},
            job: {**section, "written": datetime.now(UTC).isoformat(timespec="seconds")},
        }
        with object_store.published(self.folder) as folder:
            write_json(folder / self.path.name, manifest)

    def require_model(self, loaded: Loaded) -> None:
        """Raise UserError if this folder's model held other numbers in addition to its weights.

        The digest of the weights is compared elsewhere. Another version of torch, or precision, may hold others.
        """
        manifest = self.manifest()
        before = manifest.get("model", {})
        same = manifest.get("versions", {}).get("torch") == version_of("torch")
        same = same and (before.get("digest"), before.get("precision")) == (loaded.digest, loaded.config.precision)
        if same and before.get("constants") not in (None, loaded.network.constants):
            what = "the model holds other numbers than in the runs of this folder, which are not in its state"
            remedy = "Seed what the model's code draws at random, or make it a buffer that is loaded with the weights."
            raise UserError(str(self.folder), what, remedy)

    def clean(self) -> None:
        """Delete what workers and drivers that were killed had half written."""
        if self.folder.local is not None:
            with translated(str(self.folder), "cleaned"):
                for aside in self.folder.local.rglob(f"{TEMPORARY}*"):
                    aside.unlink(missing_ok=True)

    def quarantine(self, job: str, refused: list[Rejected]) -> None:
        """Write quarantine.parquet: every sample that a job refused, beside those of the folder's other jobs."""
        path = self.folder / "quarantine.parquet"
        try:
            earlier = object_store.read_table(path).to_pylist()
        except FileNotFoundError:
            earlier = []
        rows = [row for row in earlier if row["job"] != job]
        rows += [{"job": job, **row} for row in rows_of(refused)]
        with object_store.published(self.folder) as folder:
            write_table(folder / path.name, QUARANTINE, [pa.Table.from_pylist(rows, QUARANTINE)])

    def quarantined(self, job: str) -> list[Rejected]:
        """The samples that a job rejected, as quarantine.parquet has them."""
        rows = object_store.read_table(self.folder / "quarantine.parquet").to_pylist()
        return [Rejected(**{k: v for k, v in row.items() if k != "job"}) for row in rows if row["job"] == job]


def write_refused(path: Path, refused: Iterable[Rejected]) -> None:
    """Write a table of refused samples."""
    write_table(path, REFUSED, [pa.Table.from_pylist(rows_of(refused), REFUSED)])


def rows_of(refused: Iterable[Rejected]) -> list[dict[str, str]]:
    """Return rejected samples as rows of a table, whose text must be UTF-8; names of shards may be other bytes."""
    return [{name: printable(value) for name, value in asdict(each).items()} for each in refused]


def refused_in(path: object_store.Location) -> list[Rejected]:
    """The inverse of write_refused, wherever the table is."""
    return [Rejected(**row) for row in object_store.read_table(path).to_pylist()]


def load_patterns(run: str, weights: str, operators: Collection[str] | None = None) -> Patterns:
    """The patterns of a run, wherever its folder is: see `patterns.load`."""
    with object_store.fetched(object_store.located(run) / "patterns.safetensors") as file:
        return load(file.parent, weights, operators)


def options_of(config: Config) -> dict[str, Any]:
    """What must be the same when a job goes on; where the weights lie does not matter, their digest does."""
    options = asdict(config)
    model = options.pop("model")
    options.pop("out")
    return {**{k: v for k, v in model.items() if k != "weights"}, **options}


def current(options: dict[str, Any], config: Config) -> dict[str, Any]:
    """Return a manifest's options in the form of this version, with defaults for those that an earlier one lacked."""
    options = defaults(ModelConfig, type(config)) | options
    options["preprocessing"] = defaults(Preprocessing) | options["preprocessing"]
    if "classes" in options:  # version 0.2.0 stored them in another order
        options["classes"] = sorted(options["classes"])
    return options


def defaults(*kinds: type[Config | ModelConfig | Preprocessing]) -> dict[str, Any]:
    """Return the default values of dataclasses, as JSON has them."""
    found = {f.name: f.default for kind in kinds for f in fields(kind) if f.default is not MISSING}
    return dict(json.loads(json.dumps(found)))


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first options that differ, in words."""
    for name in before | now:
        was, is_ = before.get(name), now.get(name)
        if was == is_:
            continue
        if isinstance(was, list) and isinstance(is_, list) and name in {"shards", "evaluate"} and was and is_:
            return f"{len(was)} shards from {was[0]}, now {len(is_)} from {is_[0]}"
        return f"{name} {was}, now {is_}"
    return "the same options"


def described(operator: Operator) -> dict[str, Any]:
    """An operator for the manifest."""
    gate = operator.gate
    return {
        "name": operator.name,
        "kind": TYPE_NAMES[type(operator.operator_type)],
        "weight": list(operator.weight.shape),
        "input": [list(s) for s in operator.input_shapes],
        "output": list(operator.output_shape),
        "gate": None if gate is None else [gate.low, None if gate.high == float("inf") else gate.high],
        "mixed_gates": operator.mixed_gates,
        "source": operator.source,
    }
