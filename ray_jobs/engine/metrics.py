"""A job's Prometheus metrics, exported through Ray: `ray_patternnet_…` on the metrics port of the driver's node."""

from functools import cache

import ray
from ray.util.metrics import Counter, Gauge

TAGS = ("run", "job")
COUNTERS = {  # by worker; Ray appends `_total` to each name
    "samples": "Samples that went through the model, including those of lost work.",
    "refused": "Samples that were rejected.",
    "batches": "Batches that went through the model.",
    "waiting_seconds": "Seconds that workers waited for data.",
    "shards": "Shards that workers finished, including lost ones.",
    "failures": "Failed attempts at a shard.",
    "commits": "Commits: files of partial moments, or shards of explanations.",
    "lost_workers": "Workers that were lost by an error, or replaced because they stalled.",
}
GAUGES = {  # of the whole job while it works on shards; Ray drops a gauge 20 s after it was last set
    "shards_left": "Shards that are not done; 0 at the end of a job, also if it continues without some shards.",
    "workers": "Workers that are ready or working.",
}


@cache
def make_counter(name: str) -> Counter:
    """Return the counter of a name in `COUNTERS`; Ray allows only one per process."""
    return Counter(f"patternnet_{name}", COUNTERS[name], (*TAGS, "worker"))


@cache
def make_gauge(name: str) -> Gauge:
    """Return the gauge of a name in `GAUGES`; Ray allows only one per process."""
    return Gauge(f"patternnet_{name}", GAUGES[name], TAGS)


def count(name: str, value: float, run: str, job: str, worker: str = "") -> None:
    """Add to a counter; a no-op without Ray.

    Args:
        name: Name in `COUNTERS`.
        value: What to add.
        run: The run's folder.
        job: Name of the job.
        worker: Short name of the worker.
    """
    if ray.is_initialized() and value > 0:
        make_counter(name).inc(value, {"run": run, "job": job, "worker": worker})


def set_gauge(name: str, value: float, run: str, job: str) -> None:
    """Set a gauge; a no-op without Ray.

    Args:
        name: Name in `GAUGES`.
        value: Its value.
        run: The run's folder.
        job: Name of the job.
    """
    if ray.is_initialized():
        make_gauge(name).set(value, {"run": run, "job": job})
