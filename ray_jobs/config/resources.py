"""The options that all jobs share: workers, their resources, limits on failures, log, tracker and price."""

from dataclasses import dataclass
from typing import Literal

from ray_jobs.config.option import Validated, option
from ray_jobs.config.parsing import parse_price, parse_tracker
from ray_jobs.config.timing import PRODUCTION, Timing
from ray_jobs.units import parse_duration


@dataclass(frozen=True, kw_only=True)
class Resources(Validated):
    """Workers of a job, their resources, and the limits on failures. They may change when a run is resumed.

    `max_bad_fraction` is checked while the job runs, from 100 samples on, and at its end, also if it has fewer samples.
    A job that could use no sample always fails.
    """

    workers: int | None = option(
        None,
        "Maximum number of workers (default: as many as the cluster can hold). 0 runs in this process without Ray.",
        min=0,
    )
    gpus_per_worker: float | None = option(None, "GPUs per worker (default: 1 if the cluster has any, else 0).", min=0)
    cpus_per_worker: float | None = option(
        None,
        "CPUs per worker, and threads of its process (default: 1; with GPUs, an equal share of the node's CPUs, at "
        "most 8).",
        min=0,
    )
    max_loss: float = option(
        900.0, "Maximum work that is repeated if a worker is lost: 90s, 15m, 2h.", parse=parse_duration
    )
    address: str | None = option(
        None, "Address of the Ray cluster (default: RAY_ADDRESS, else a Ray started on this machine)."
    )
    min_workers: int = option(
        0, "Workers to request from an autoscaling cluster even if it has no room for them now.", min=0
    )
    stall_timeout: float = option(900.0, "Time without a batch after which a worker is replaced.", parse=parse_duration)
    shard_timeout: float = option(
        6 * 3600.0, "Time after which a shard is tried on another worker.", parse=parse_duration
    )
    retries: int = option(3, "Further attempts at a shard that failed.", min=0)
    max_bad_shards: int = option(0, "Maximum number of shards that may fail without failing the job.", min=0)
    max_bad_fraction: float = option(
        0.5, "Maximum fraction of rejected samples, checked from 100 samples on and at the end.", min=0, max=1
    )
    log: Literal["plain", "json"] = option(
        "plain", "Format of the log: plain lines, or one JSON object per line.", choices=("plain", "json")
    )
    track: str | None = option(
        None,
        "Experiment tracker that mirrors options, progress, final figures and the report: mlflow, mlflow:URI, wandb or "
        "trackio.",
        parse=parse_tracker,
        metavar="TRACKER",
    )
    price: str | None = option(
        None,
        "Price of the workers: 2.5/gpu-hour, 0.3/worker-hour or 0.04/cpu-hour. The manifest, status and report then "
        "show the cost.",
        parse=parse_price,
        metavar="PRICE",
    )
    timing: Timing = PRODUCTION  # no option: for tests
