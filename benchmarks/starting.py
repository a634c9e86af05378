"""What starting costs: `python -m benchmarks.starting [--write docs]`.

CPU seconds of processes, which other work on the machine changes little, and for some rows seconds of a clock. The fit
is that of five images by EfficientNet-Lite0 of timm, 4 positions, one worker.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch

from benchmarks.pages import Cell, Table, make_parser, save_results
from benchmarks.timing import write_photographs
from ray_jobs.config import FitConfig, ModelConfig
from ray_jobs.data.shard_specs import list_shards
from ray_jobs.engine.shard_worker import WorkerResources
from ray_jobs.engine.worker_hosts import WorkerHost, pack
from ray_jobs.jobs.fit.fit import list_passes, make_observer
from ray_jobs.jobs.moments_job import MomentsTask, MomentsWorker
from ray_jobs.models import loading
from ray_jobs.runs.run_folder import Run

SPEC, IMAGES, POSITIONS = "timm:tf_efficientnet_lite0", 5, 4
LIBRARIES = "import torch, ray"
OPEN = """
import sys
import ray_jobs.jobs.fit.fit
from ray_jobs.config import ModelConfig
from ray_jobs.io.object_store import locate
from ray_jobs.models.loading import open_model

run = locate(sys.argv[1])
open_model(ModelConfig(spec=sys.argv[2], weights="random"), run).traced.store(run)
"""


def cpu_seconds(command: Sequence[str]) -> float:
    """Return the CPU seconds of a command and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def clock_seconds(work: Callable[[], object]) -> float:
    """Return the seconds of a clock that some work takes."""
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def python(code: str) -> list[str]:
    """Return the command that runs code."""
    return [sys.executable, "-c", code]


def measure_opening() -> list[list[Cell]]:
    """Measure a driver from its start to the traced model, before and after the run keeps the network."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*python(OPEN), folder, SPEC]
        first, later = cpu_seconds(command), cpu_seconds(command)
    return [["driver: from its start to the traced model", first], ["the same if the run keeps the network", later]]


def measure_driver() -> list[list[Cell]]:
    """Measure what the driver does before its first worker: imports, the model, the trace."""
    rows: list[list[Cell]] = [
        ["`import torch, ray`", cpu_seconds(python(LIBRARIES))],
        ["`patternnet --help`", cpu_seconds([sys.executable, "-m", "ray_jobs", "--help"])],
        ["`import patterns`", cpu_seconds(python("import patterns"))],
        ["driver: imports, and those of timm", cpu_seconds(python("import ray_jobs.jobs.fit.fit, timm"))],
    ]
    loading.load(ModelConfig(spec=SPEC, weights="random")).network  # noqa: B018 - imports the compiler
    begun = time.process_time()
    loading.load(ModelConfig(spec=SPEC, weights="random")).network  # noqa: B018
    return [*rows, ["driver: the model and its trace", time.process_time() - begun], *measure_opening()]


def measure_worker(config: FitConfig) -> list[list[Cell]]:
    """Measure a worker on Ray from the start of its process to its first batch.

    The clock includes the imports of torch and Ray, which a process of their own measures too. Their difference can be
    negative, because Ray starts processes, with Ray imported, before an actor needs them.
    """
    imports = clock_seconds(partial(cpu_seconds, python(LIBRARIES)))
    loaded = loading.load(config.model)
    (only,) = list_passes(Run(config.out), loaded.network, config)
    observe = ObserverOf(config, only.operators)
    task = MomentsTask(config.shards[0], IMAGES, number=0)
    content, digest = pack((MomentsWorker, loaded.traced, only.store, config.batch_size, observe, None))
    started = time.monotonic()
    host: Any = ray.remote(WorkerHost).remote()
    begun: float = ray.get(host.call.remote(time.process_time))
    host.start.remote([ray.put(content)], digest, WorkerResources())
    ray.get(host.prepare.remote())
    ready: float = ray.get(host.call.remote(time.process_time))
    reports = iter(host.work.options(num_returns="streaming").remote(task))
    ray.get(next(reports))
    first = time.monotonic() - started
    for report in reports:
        ray.get(report)
    worked: float = ray.get(host.call.remote(time.process_time))
    ray.kill(host)
    return [
        ["worker: Ray's process with torch", begun],
        ["worker: the model, placed", ready - begun],
        [f"worker: a shard of {IMAGES} images", worked - ready],
        ["worker: from its start to its first report, in seconds of a clock", first],
        ["`import torch, ray` in seconds of a clock", imports],
    ]


class ObserverOf:
    """Makes the observer of a fit, in a worker."""

    def __init__(self, config: FitConfig, operators: Sequence[str]) -> None:
        self.config, self.operators = config, operators

    def __call__(self, network: Any) -> Any:
        """Return the observer."""
        return make_observer(self.config, self.operators, network)


def measure_fit(config: FitConfig) -> list[list[Cell]]:
    """Measure a whole fit as a user runs it, with its own Ray."""
    model = ["--model", SPEC, "--weights", "random", "--positions", str(POSITIONS)]
    data = ["--shards", *config.shards, "--max-samples", str(IMAGES), "--out", config.out]
    begun = time.monotonic()
    cpu = cpu_seconds([sys.executable, "-m", "ray_jobs", "fit", *model, *data, "--workers", "1"])
    clock = time.monotonic() - begun
    return [["the whole fit, with Ray's own processes", cpu], ["the same in seconds of a clock", clock]]


def main() -> None:
    """Measure, and print the table or write it to the docs."""
    options = make_parser("benchmarks.starting", __doc__).parse_args()
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - the name that Ray reads
    with tempfile.TemporaryDirectory() as folder:
        shard = write_photographs(Path(folder) / "0.tar", 500, 375)
        model = ModelConfig(spec=SPEC, weights="random")
        config = FitConfig(model=model, shards=list_shards([shard]), out=f"{folder}/run", positions=POSITIONS)
        rows = measure_driver()
        start_ray = partial(ray.init, address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        rows.append(["`ray.init` in seconds of a clock", clock_seconds(start_ray)])
        rows += measure_worker(config)
        ray.shutdown()
        rows += measure_fit(config)
    table = Table({"what": "", "CPU seconds": "{:.1f}"}, rows)
    print(table.render())
    if options.write:
        save_results(options.write, "benchmarks-starting", table, torch=torch.__version__.partition("+")[0])


if __name__ == "__main__":
    main()
