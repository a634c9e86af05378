"""What a job tells Prometheus by way of Ray: `ray_patternnet_…` on the metrics port of its driver's node."""

from functools import cache

import ray
from ray.util.metrics import Counter, Gauge

TAGS = ("run", "job")
METRICS = {  # counters, by worker; each has `_total` behind its name
    "samples": "Samples that went through the model, those of lost work too.",
    "refused": "Samples that could not be used.",
    "batches": "Batches that went through the model.",
    "waiting_seconds": "Seconds that workers waited for data.",
    "shards": "Shards worked on.",
    "failures": "Shards that failed, each time.",
    "commits": "Parts, or shards of explanations, that count.",
    "lost_workers": "Workers lost by an error, or given up.",
}
GAUGES = {  # of the job as a whole, while it works on its shards: Ray drops one 20 s after it was last set
    "shards_left": "Shards yet to be worked on; 0 at last where a job is done, whatever it went on without.",
    "workers": "Workers that are ready or at work.",
}


@cache
def counter(name: str) -> Counter:
    return Counter(f"patternnet_{name}", METRICS[name], (*TAGS, "worker"))


@cache
def gauge(name: str) -> Gauge:
    return Gauge(f"patternnet_{name}", GAUGES[name], TAGS)


def count(name: str, value: float, run: str, job: str, worker: str = "") -> None:
    """Add to one of METRICS; nothing where a job works without Ray."""
    if ray.is_initialized() and value > 0:
        counter(name).inc(value, {"run": run, "job": job, "worker": worker})


def show(name: str, value: float, run: str, job: str) -> None:
    """Set one of GAUGES; nothing where a job works without Ray."""
    if ray.is_initialized():
        gauge(name).set(value, {"run": run, "job": job})
