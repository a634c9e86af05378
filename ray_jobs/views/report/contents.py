"""Read a run's files into the values that the report's templates show."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from patterns import UserError
from ray_jobs.io.object_store import read_table
from ray_jobs.models.class_names import load_class_names, map_numbers_to_names
from ray_jobs.runs.run_folder import JOBS, Run
from ray_jobs.runs.usage import Usage
from ray_jobs.units import format_duration
from ray_jobs.views.gallery import Gallery
from ray_jobs.views.report.charts import WHISKERS, Chart, convergence_lines, curves_with_bands, spreads
from ray_jobs.views.report.evaluation import Evaluation, read_evaluation
from ray_jobs.views.report.filters import Filters, read_filters
from ray_jobs.views.report.samples import Samples, read_samples

FLAGS = ("ok", "dead", "constant", "degenerate", "outliers")
REASONS = 12  # maximum number of different rejection reasons in the table
SHARDS = "shards", "evaluate"  # options that hold long lists


@dataclass(frozen=True)
class Job:
    """A row of the table of jobs; None if a value is unknown."""

    name: str
    status: str
    samples: int | None
    shards: int | None
    missing: int
    rejected: int | None
    seconds: float | None
    written: str
    usage: Usage
    price: str | None

    @property
    def used(self) -> str:
        """The hours and the cost of the workers as text."""
        return self.usage.describe(self.price) if self.usage.worker_hours else ""

    @property
    def time(self) -> str:
        """The duration of the job as text."""
        return "" if self.seconds is None else format_duration(self.seconds)

    @property
    def rate(self) -> str:
        """Samples per second as text."""
        return f"{self.samples / self.seconds:.3g}" if self.samples and self.seconds else ""


@dataclass(frozen=True)
class Rho:
    """ρ of a run.

    Attributes:
        chart: The distribution over neurons by operator and estimator.
        estimators: The columns of `rows`.
        medians: The median over all neurons by estimator.
        rows: For each operator the median of each estimator; None if it is undefined.
    """

    chart: Chart
    estimators: list[str]
    medians: dict[str, float]
    rows: list[tuple[str, list[float | None]]]


@dataclass(frozen=True)
class Health:
    """Counts of neurons by flag, in the order of `FLAGS`, for each operator and in total."""

    rows: list[tuple[str, list[int]]]
    total: list[int]


@dataclass(frozen=True)
class Curves:
    """Results of the image degradation.

    Attributes:
        chart: The mean curve of each method.
        areas: Method, area and the bounds of its confidence interval; None for the bounds if there is one image.
        least_first: The least relevant patches were replaced first, so small areas are good.
    """

    chart: Chart
    areas: list[tuple[str, float, float | None, float | None]]
    least_first: bool


@dataclass(frozen=True)
class Contents:
    """Everything that the page shows of a run; None for results that do not exist."""

    id: str
    name: str
    folder: str
    facts: dict[str, str]
    jobs: list[Job]
    rejected: list[tuple[str, str, str, int]]
    options: list[tuple[str, list[tuple[str, str]]]]
    versions: dict[str, str]
    rho: Rho | None
    health: Health | None
    filters: Filters | None
    convergence: list[Chart] | None
    tolerance: float | None
    curves: Curves | None
    evaluation: Evaluation | None
    samples: Samples | None
    unseen: str  # the reason why existing explanations cannot be shown

    @property
    def compared(self) -> dict[str, dict[str, str]]:
        """Values to compare with other runs, in groups."""
        counts = {
            f"{job.name}: {what}": text
            for job in self.jobs
            for what, text in (
                ("samples", thousands(job.samples)),
                ("rejected", thousands(job.rejected)),
                ("time", job.time),
                ("per second", job.rate),
                ("used", job.used),
            )
        }
        neurons = zip(FLAGS, map(thousands, self.health.total)) if self.health else ()
        groups = {
            "Model": {**self.facts, "Folder": self.folder},
            "Data": counts,
            "Median ρ": {name: f"{value:.3f}" for name, value in self.rho.medians.items()} if self.rho else {},
            "Neurons": dict(neurons),
            "Area over the degradation curve": {m: f"{a:.4f}" for m, a, *_ in self.curves.areas} if self.curves else {},
            "Evaluation": self.evaluation.compared if self.evaluation else {},
        }
        return {name: {k: v for k, v in rows.items() if v} for name, rows in groups.items()}


def read_contents(
    folder: str, number: int, count: int, classes: str | None, seed: int, pages: int, price: str | None = None
) -> Contents:
    """Read everything that the page shows of a run.

    Args:
        folder: The folder of the run.
        number: The number of the run on the page.
        count: Maximum number of samples to show.
        classes: A file of class names; None for the names of the model's library.
        seed: Seed of the random choice of samples.
        pages: Number of runs on the page.
        price: Price of the workers; None: what each job was given.

    Raises:
        UserError: If the folder does not hold a run, or the class names cannot be read.
    """
    run = Run(folder)
    manifest = run.manifest()
    jobs = [job_of(name, manifest[name], price) for name in JOBS if name in manifest]
    if not jobs:
        raise UserError(str(run.folder), "holds no run", "Name the folder that was passed as --out.")
    complete = {job.name for job in jobs if job.status == "complete"}
    id_, options = f"run{number}", manifest.get("fit", {}).get("options", {})
    tolerance = options.get("until_converged")
    seen, unseen = None, ""
    if "explain" in complete and count:
        names = map_numbers_to_names(load_class_names(manifest["explain"]["model"]["spec"], classes))
        try:
            seen = read_samples(Gallery(run, names), count, seed, pages)
        except UserError as error:
            unseen = str(error)
    return Contents(
        id=id_,
        name="/".join(run.folder.parts[-2:]).strip("/"),
        folder=str(run.folder),
        facts=facts(manifest),
        jobs=jobs,
        rejected=count_rejections(table_of(run, "quarantine.parquet")),
        options=[(name, format_options(manifest[name]["options"])) for name in JOBS if name in manifest],
        versions=manifest["versions"],
        rho=rho(id_, table_of(run, "quality.parquet")),
        health=health(table_of(run, "neurons.parquet")),
        filters=read_filters(run, manifest) if "fit" in complete else None,
        convergence=convergence(id_, table_of(run, "convergence.parquet"), tolerance),
        tolerance=tolerance,
        curves=curves(id_, table_of(run, "degradation-curves.parquet"), manifest.get("degrade", {})),
        evaluation=read_evaluation(table_of(run, "evaluation-summary.parquet"), manifest.get("evaluate", {})),
        samples=seen,
        unseen=unseen,
    )


def thousands(value: int | None) -> str:
    """Format a count with separators; empty for None."""
    return "" if value is None else f"{value:,}"


def table_of(run: Run, name: str) -> pa.Table | None:
    """Return a table of a run; None if the file is missing or has no rows."""
    path = run.folder / name
    table = read_table(path) if path.exists() else None
    return table if table is not None and len(table) else None


def job_of(name: str, section: Mapping[str, Any], price: str | None = None) -> Job:
    """Return the row of a job from its section of the manifest."""
    return Job(
        name,
        section["status"],
        section.get("samples"),
        section.get("shards"),
        len(section.get("missing", {})),
        section.get("refused"),
        section.get("seconds"),
        section.get("written", "").replace("T", " ")[:16],
        Usage.read(section),
        price or section.get("price"),
    )


def facts(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the main properties of the model."""
    section: Mapping[str, Any] = next((manifest[name] for name in JOBS if name in manifest), {})
    kinds = Counter(op["kind"].replace("_", " ") for op in manifest["operators"])
    estimators = manifest.get("fit", {}).get("solved", section["options"].get("estimators", []))
    found = {
        "Model": section["model"]["spec"],
        "Weights": manifest["model"]["digest"].removeprefix("sha256:")[:12],
        "Precision": section["model"]["precision"],
        "Input": " × ".join(map(str, manifest["model"]["input_shape"])),
        "Operators": f"{sum(kinds.values())}: " + ", ".join(f"{n} {kind}" for kind, n in kinds.most_common()),
        "Estimators": ", ".join(estimators),
        "Methods": ", ".join(manifest.get("explain", {}).get("options", {}).get("methods", [])),
        "Target": str(manifest.get("explain", {}).get("options", {}).get("target", "")),
    }
    return {name: value for name, value in found.items() if value}


def count_rejections(table: pa.Table | None) -> list[tuple[str, str, str, int]]:
    """Return job, stage, reason and count of rejected samples, the most frequent first."""
    if table is None:
        return []
    rows = Counter(zip(*(table[name].to_pylist() for name in ("job", "stage", "reason")))).most_common()
    rest = sum(count for _, count in rows[REASONS:])
    more = [("", "", f"{len(rows) - REASONS} other reasons", rest)] if rest else []
    return [(*row, count) for row, count in rows[:REASONS]] + more


def format_options(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A job's options in words; those that were not set are left out."""
    return [(name, format_option(name, value)) for name, value in options.items() if value not in (None, [], {}, "")]


def format_option(name: str, value: Any) -> str:
    """Format the value of an option; long lists of shards are shortened."""
    if name in SHARDS and len(value) > 2:
        return f"{len(value)}: {value[0]} … {value[-1]}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {format_option(k, v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join("=".join(map(str, v)) if isinstance(v, list) else str(v) for v in value[:50])
    return str(value)


def rho(id_: str, table: pa.Table | None) -> Rho | None:
    """Return ρ by operator and estimator with its chart; None if it was not measured."""
    table = table and table.drop_null()
    if not table:
        return None
    operators, estimators = (table[name].unique().to_pylist() for name in ("operator", "estimator"))
    grouped = table.group_by(["operator", "estimator"], use_threads=False).aggregate([("rho", "list")]).to_pylist()
    spread = {(row["operator"], row["estimator"]): np.percentile(row["rho_list"], WHISKERS).tolist() for row in grouped}
    chart = spreads(f"{id_}-rho", "ρ by operator and estimator", "ρ, higher is better", operators, spread)
    middle = {operator: [spread.get((operator, one), [None] * 3)[2] for one in estimators] for operator in operators}
    values = {one: table.filter(pc.equal(table["estimator"], one))["rho"].to_numpy() for one in estimators}
    medians = {one: float(np.median(value)) for one, value in values.items()}
    return Rho(chart, estimators, medians, list(middle.items()))


def health(table: pa.Table | None) -> Health | None:
    """Return the number of neurons of each operator by flag; None if there is no table."""
    if table is None:
        return None
    counts = {operator: dict.fromkeys(FLAGS, 0) for operator in table["operator"].unique().to_pylist()}
    for row in table.group_by(["operator", "flag"]).aggregate([([], "count_all")]).to_pylist():
        counts[row["operator"]][row["flag"]] = row["count_all"]
    rows = [(operator, list(count.values())) for operator, count in counts.items()]
    return Health(rows, [sum(column) for column in zip(*(count for _, count in rows))])


def convergence(id_: str, table: pa.Table | None, tolerance: float | None) -> list[Chart] | None:
    """Return for each estimator a chart of the standard error of every operator's patterns."""
    if table is None:
        return None
    known = table.filter(pc.greater(table["p90"], 0)).sort_by("samples")
    charts = []
    for number, one in enumerate(known["estimator"].unique().to_pylist()):
        own = known.filter(pc.equal(known["estimator"], one))
        lines: dict[str, list[tuple[float, float]]] = {}
        for operator, count, error in zip(*(own[name].to_pylist() for name in ("operator", "samples", "p90"))):
            lines.setdefault(operator, []).append((count, error))
        name = f"{id_}-convergence{number}"
        charts.append(convergence_lines(name, one, "images", "standard error / pattern", lines, tolerance))
    return charts


def curves(id_: str, table: pa.Table | None, section: Mapping[str, Any]) -> Curves | None:
    """Return the degradation curves with their areas; None if they were not measured."""
    if table is None:
        return None
    rows: dict[str, list[tuple[float, float, float, float]]] = {m: [] for m in table["method"].unique().to_pylist()}
    for row in table.sort_by("step").to_pylist():
        rows[row["method"]].append((row["step"], row["mean"], row["low"], row["high"]))
    title = "probability of the first prediction"
    chart = curves_with_bands(f"{id_}-degradation", title.capitalize(), "patches replaced", title, rows)
    areas = [(method, a["area"], a["low"], a["high"]) for method, a in section.get("areas", {}).items()]
    least_first = bool(section.get("options", {}).get("least_first"))
    return Curves(chart, sorted(areas, key=lambda area: -area[1]), least_first)
