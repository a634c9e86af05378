"""What a job tells Prometheus by way of Ray: `ray_patternnet_…_total` on each node's metrics port."""

from functools import cache

import ray
from ray.util.metrics import Counter

TAGS = ("run", "job", "worker")
METRICS = {
    "samples": "Samples that went through the model.",
    "refused": "Samples that could not be used.",
    "batches": "Batches that went through the model.",
    "waiting_seconds": "Seconds that workers waited for data.",
    "shards": "Shards worked on.",
    "failures": "Shards that failed, each time.",
    "commits": "Parts, or shards of explanations, that count.",
    "lost_workers": "Workers lost by an error, or given up.",
}


@cache
def counter(name: str) -> Counter:
    return Counter(f"patternnet_{name}", METRICS[name], TAGS)


def count(name: str, value: float, run: str, job: str, worker: str = "") -> None:
    """Add to one of METRICS; nothing where a job works without Ray."""
    if ray.is_initialized() and value > 0:
        counter(name).inc(value, {"run": run, "job": job, "worker": worker})
