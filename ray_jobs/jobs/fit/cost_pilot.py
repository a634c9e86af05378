"""What a fit will take: a pilot runs a few batches as the fit would, and its times are scaled to all samples.

The pilot is a fit: the same workers read the same shards and write partial moments, and the driver solves for patterns.
So start-up, waits for data, workers that share a machine's cores, and the end of the job are measured, not modeled.
"""

import math
import os
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from tempfile import TemporaryDirectory
from uuid import uuid4

from patterns import UserError
from ray_jobs.config import FitConfig, Resources
from ray_jobs.data.selection import load_selection
from ray_jobs.engine.shard_worker import ShardReport, WorkerInfo
from ray_jobs.io import object_store
from ray_jobs.io.web import PATIENCE, call_patiently
from ray_jobs.jobs.fit.fit import finish, list_passes, make_observer, validate
from ray_jobs.jobs.fit.position_pilot import count_used, resolve_positions
from ray_jobs.jobs.job_session import JobSession
from ray_jobs.jobs.moments_job import MAX_FILES, MomentsJob, MomentsSpec
from ray_jobs.models import loading
from ray_jobs.runs.ledger import PartialMoments
from ray_jobs.runs.run_folder import Run
from ray_jobs.runs.usage import Usage

BATCHES = 10  # of each worker
WARM_UP = 2  # of these, which are slower: memory, caches and compiled batches
COUNTED = 3  # shards whose samples are counted
LEAST_SPREAD = 0.1  # relative half-width of the interval at least: machines are not equally fast at all times
UNKNOWN_SPREAD = 0.5  # if there are too few batches to tell


class PilotJob(MomentsJob):
    """A fit's job that records when each worker reported which number of samples."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.reports: dict[WorkerInfo, list[tuple[float, int]]] = defaultdict(list)
        self.assigned: dict[str, WorkerInfo] = {}
        self.finished: dict[WorkerInfo, float] = {}
        self.commits: list[float] = []  # seconds

    def on_assigned(self, item: str, worker: WorkerInfo) -> None:
        """Note which worker has the shard."""
        self.assigned[item] = worker
        super().on_assigned(item, worker)

    def on_progress(self, item: str, report: ShardReport) -> None:
        """Note a batch."""
        worker = self.assigned[item]
        new = report.samples - self.active[item].shard_samples
        if new:
            done = self.reports[worker][-1][1] if self.reports[worker] else 0
            self.reports[worker].append((time.monotonic(), done + new))
        super().on_progress(item, report)

    def on_done(self, item: str, report: ShardReport) -> None:
        """Note when the worker may begin to commit."""
        self.finished[self.assigned[item]] = time.monotonic()
        super().on_done(item, report)

    def on_committed(self, items: list[str], result: PartialMoments) -> None:
        """Note how long the commit took."""
        self.commits.append(time.monotonic() - self.finished[self.assigned[items[-1]]])
        super().on_committed(items, result)


@dataclass(frozen=True)
class Pilot:
    """What a pilot measured, in seconds unless stated otherwise.

    Attributes:
        start: From the command to the first worker that is ready, with loading and tracing.
        warm_up: How much longer the first batches of a worker took than later ones.
        per_sample: Time of a worker for a sample.
        spread: Relative half-width of the confidence interval of `per_sample`.
        batches: Number of batches that were measured.
        prepare: Time that a worker has its place before it is ready.
        commit: Time of a commit of partial moments.
        end: From the last commit to the end: merging, solving, writing.
        moments_bytes: Bytes of a file of partial moments.
        result_bytes: Bytes of all other files of the run.
        workers: Number of workers that the cluster had room for.
        cpus: CPUs of a worker.
        gpus: GPUs of a worker.
        passes: How often the fit reads its data.
    """

    start: float
    warm_up: float
    per_sample: float
    spread: float
    batches: int
    prepare: float
    commit: float
    end: float
    moments_bytes: int
    result_bytes: int
    workers: int
    cpus: float
    gpus: float
    passes: int


@dataclass(frozen=True)
class Range:
    """An expected value with the bounds of its interval."""

    low: float
    value: float
    high: float


@dataclass(frozen=True)
class Forecast:
    """What a fit will take.

    Attributes:
        samples: Number of its samples.
        seconds: Time from the command to the end.
        usage: Hours of workers, GPUs and CPUs, in this order.
        written: Bytes that are written, including partial moments that are merged later.
        kept: Bytes in the run's folder at the end.
    """

    samples: float
    seconds: Range
    usage: tuple[Usage, Usage, Usage]
    written: float
    kept: float

    def cost(self, price: str) -> Range:
        """Return the money for a price."""
        return Range(*(usage.cost(price) for usage in self.usage))


def plan_cost(config: FitConfig, resources: Resources) -> tuple[Pilot, Forecast]:
    """Run a pilot in a folder that is deleted afterwards, and return what it measured and what the fit will take.

    Args:
        config: The fit. If `out` is empty, the folder is on this machine.
        resources: The workers.

    Raises:
        UserError: If the fit could not run either, the number of workers is not given, or they may be on other machines
            and `out` is empty.
    """
    if resources.workers is None:
        raise UserError("", "a forecast needs the number of workers", "Give it; 0 is this process.", "workers")
    elsewhere = resources.workers != 0 and (resources.address or os.environ.get("RAY_ADDRESS", "").strip())
    if elsewhere and not config.out:
        what = "the workers of a cluster need a folder for the files of the pilot"
        raise UserError("", what, "Name a folder or URL that every worker writes.", "out")
    with TemporaryDirectory(prefix="patternnet-pilot-") as local:
        folder = object_store.locate(config.out or local) / f"pilot-{uuid4().hex[:8]}"
        samples = count_samples(config)
        try:
            pilot = run_pilot(replace(config, out=str(folder)), resources)
        finally:
            remove_folder(folder)
    ratio = resources.timing.commit_ratio
    return pilot, forecast(pilot, config, samples, max(resources.workers, 1), resources.max_loss, ratio)


def remove_folder(folder: object_store.Location) -> None:
    """Delete a folder."""
    if folder.local is not None:
        shutil.rmtree(folder.local, ignore_errors=True)
        return
    for name in measure_files(folder):
        object_store.remove(folder / name)


def run_pilot(config: FitConfig, resources: Resources) -> Pilot:
    """Run a few batches of a fit.

    Args:
        config: The fit. Its folder `out` receives the files of the pilot; the caller deletes them.
        resources: The workers.

    Raises:
        UserError: If the fit could not run either.
    """
    begun = time.monotonic()
    resources = replace(resources, timing=replace(resources.timing, report_interval=0.0), track=None, price=None)
    validate(config, resources)
    loaded = loading.open_model(config.model, Run(config.out).folder)
    config, _ = resolve_positions(Run(config.out), config, loaded)
    count = min(len(config.shards), 2 * max(resources.workers or 1, 1))
    shards = tuple(config.shards[number * len(config.shards) // count] for number in range(count))
    samples = BATCHES * config.batch_size * max(resources.workers or 1, 1)
    small = replace(config, shards=shards, max_samples=samples, until_converged=None)
    session = JobSession("fit", small, loaded)
    passes = list_passes(session.run, loaded.network, small)
    jobs: list[PilotJob] = []
    with session.work(resources, config.compile):
        for one in passes:
            spec = MomentsSpec(shards, one.store, small.batch_size, samples)
            jobs.append(PilotJob("pilot", session.heartbeat, spec, session.tasks, resources))
            jobs[-1].gather(partial(make_observer, config, one.operators), loaded.traced)
        committed = time.monotonic()
        finish(session, small, passes)
    ended = time.monotonic()
    per_sample, spread, warm_up, batches = measure_batches([r for job in jobs for r in job.reports.values()])
    sizes = measure_files(session.run.folder)
    parts = [size for name, size in sizes.items() if name.endswith(".safetensors") and name.startswith("moments/")]
    commits = [seconds for job in jobs for seconds in job.commits]
    job, held = jobs[0], session.heartbeat.usage
    workers = max(len(job.reports), 1)
    return Pilot(
        start=job.first_ready - begun,
        warm_up=warm_up,
        per_sample=per_sample,
        spread=spread,
        batches=batches,
        prepare=max(3600 * held.worker_hours / workers - sum(job.seconds for job in jobs), 0.0),
        commit=statistics.mean(commits) if commits else 0.0,
        end=ended - committed,
        moments_bytes=sum(parts) // max(len(parts), 1),
        result_bytes=sum(size for name, size in sizes.items() if not name.startswith("moments/")),
        workers=workers,
        cpus=job.options.get("num_cpus", 1.0),
        gpus=job.options.get("num_gpus", 0.0),
        passes=len(passes),
    )


def measure_batches(workers: Sequence[Sequence[tuple[float, int]]]) -> tuple[float, float, float, int]:
    """Return the time of a worker for a sample, its relative spread, the time lost to warming up, and the batches.

    Args:
        workers: For each worker the times of its reports, and the number of its samples at each.

    Returns:
        `per_sample`, `spread`, `warm_up` and `batches` of a `Pilot`.

    Raises:
        UserError: If no worker reported twice.
    """
    rates: list[float] = []
    seconds = samples = 0.0
    for reports in workers:
        steady = reports[WARM_UP - 1 :] if len(reports) > WARM_UP else reports
        rates += [(b[0] - a[0]) / (b[1] - a[1]) for a, b in pairwise(steady)]
        if len(steady) > 1:
            seconds, samples = seconds + steady[-1][0] - steady[0][0], samples + steady[-1][1] - steady[0][1]
    if not samples:
        raise UserError("", "the pilot saw too few samples to measure a batch", "Choose a smaller one.", "batch_size")
    per_sample = seconds / samples
    spread = UNKNOWN_SPREAD
    if len(rates) > 2:
        spread = student_quantile(len(rates) - 1) * statistics.stdev(rates) / math.sqrt(len(rates)) / per_sample
    late = [(r[1][0] - r[0][0]) - per_sample * (r[1][1] - r[0][1]) for r in workers if len(r) > WARM_UP]
    return per_sample, max(spread, LEAST_SPREAD), max(statistics.mean(late) if late else 0.0, 0.0), len(rates)


def student_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t, by the expansion in 1/freedom (Abramowitz and Stegun 26.7.5)."""
    z = statistics.NormalDist().inv_cdf(0.975)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def measure_files(folder: object_store.Location, prefix: str = "") -> dict[str, int]:
    """Return the bytes of the files in a folder by their relative path."""
    sizes: dict[str, int] = {}
    for name in folder.entries():
        path = folder / name
        info = path.info()
        if info["type"] == "directory":
            sizes |= measure_files(path, f"{prefix}{name}/")
        else:
            sizes[prefix + name] = path.local.stat().st_size if path.local else int(info["size"])
    return sizes


def count_samples(config: FitConfig) -> Range:
    """Return how many samples a fit will read, if its shards are like some of them."""
    shards = config.shards
    chosen = sorted({number * len(shards) // COUNTED for number in range(COUNTED)})
    selection = load_selection(config.keys, config.without_keys, shards)
    counts = [call_patiently(partial(count_used, shards[number], selection), PATIENCE) for number in chosen]
    mean = statistics.mean(counts)
    error = 0.0
    if len(counts) < len(shards) and len(counts) > 1:
        error = 2 * statistics.stdev(counts) / math.sqrt(len(counts)) * len(shards)
    total, limit = mean * len(shards), math.inf if config.max_samples is None else config.max_samples
    return Range(*(min(max(value, 0.0), limit) for value in (total - error, total, total + error)))


def forecast(pilot: Pilot, config: FitConfig, samples: Range, workers: int, max_loss: float, ratio: float) -> Forecast:
    """Return what a fit will take.

    Args:
        pilot: What a pilot measured.
        config: The fit.
        samples: The number of samples.
        workers: The number of workers that the fit will have.
        max_loss: See `Resources`.
        ratio: `Timing.commit_ratio`.
    """
    workers, passes = min(workers, len(config.shards)), pilot.passes
    rounds = math.ceil(len(config.shards) / workers)  # shards of the worker that gets most of them

    def work(count: float, scale: float) -> float:
        return passes * (rounds * count / len(config.shards) * pilot.per_sample * scale + pilot.warm_up + pilot.commit)

    scales = (1 - pilot.spread, 1.0, 1 + pilot.spread)
    works = [work(count, scale) for count, scale in zip((samples.low, samples.value, samples.high), scales)]
    seconds = Range(*((pilot.start + pilot.end) * scale + each for each, scale in zip(works, scales)))
    held = (workers * (pilot.prepare * scale + each) for each, scale in zip(works, scales))
    low, value, high = (Usage.of(each, pilot.cpus, pilot.gpus) for each in held)
    interval = min(max_loss, ratio * pilot.commit)
    shard = works[1] / passes / rounds
    commits = passes * workers * max(1, min(rounds, math.ceil(works[1] / passes / max(interval, shard, 1e-9))))
    merged = 2.0 if commits > MAX_FILES else 1.0
    kept = passes * min(commits / passes, MAX_FILES) * pilot.moments_bytes + pilot.result_bytes
    written = merged * commits * pilot.moments_bytes + pilot.result_bytes
    return Forecast(samples.value, seconds, (low, value, high), written, kept)
