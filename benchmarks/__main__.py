"""Timings as ratios within one run: `python -m benchmarks [--device cuda] [--only PART …] [--write docs]`."""

import platform
from collections.abc import Callable, Iterable
from dataclasses import astuple
from itertools import chain

import torch

from benchmarks import compiling, decoding, explaining, feeding, fitting, modern
from benchmarks.machine import Machine
from benchmarks.pages import Table, make_parser, save_results
from benchmarks.timing import COLUMNS, MODELS, THREADS, Bench, Row
from patterns.compilation import CUDA_GRAPHS
from ray_jobs.engine.shard_worker import keep_freed_memory

PARTS: dict[str, Callable[[Bench], Iterable[Row]]] = {
    "fit": fitting.measure_passes,
    "explain": explaining.measure_passes,
    "modern": modern.measure_modern,
    "compile": compiling.measure_compiled,
    "quality": lambda bench: [fitting.measure_quality(bench)],
    "decode": decoding.measure_pipelines,
    "feed": feeding.measure_feeding,
    "jobs": lambda bench: chain(fitting.measure_job(bench), explaining.measure_job(bench)),
}
OTHERS = ("modern", "feed")  # parts that run only if they are asked for, with a table of their own
ON_GPU = ("fit", "explain", "compile")  # the other parts measure the CPU


def main() -> None:
    """Measure, and write the table of `benchmarks`, or `benchmarks-gpu`, with the parts of `--only` in its name."""
    parser = make_parser("benchmarks", __doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--compile", metavar="MODE", help="default on a CPU, cudagraphs on a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=["float32", "tf32"], default="float32")
    parser.add_argument("--batch", type=int, help="4 on a CPU, 64 on a GPU")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    torch.set_num_threads(THREADS)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.precision == "tf32"
    keep_freed_memory()  # as the workers do; for all variants alike
    batch = options.batch or (64 if on_gpu else 4)
    mode = options.compile or (CUDA_GRAPHS if on_gpu else "default")
    bench = Bench(Machine.measure(options.device), options.rounds, batch, options.models, mode)
    about = {
        "machine": f"{bench.machine.name()} ({platform.machine()})",  # before jobs set their own number of threads
        "torch": torch.__version__.partition("+")[0],
        "gflops": bench.machine.flops / 1e9,
        "gigabytes per second": bench.machine.bytes / 1e9,
        "batch": batch,
        "rounds": options.rounds,
        "precision": options.precision,
    }
    rows = []
    for row in chain.from_iterable(
        PARTS[part](bench)
        for part in options.only or (ON_GPU if on_gpu else [part for part in PARTS if part not in OTHERS])
    ):
        print(row, flush=True)
        rows.append(list(astuple(row)))
    table = Table(COLUMNS, rows)
    print(table.render())
    if options.write:
        name = "-".join(["benchmarks", *(["gpu"] if on_gpu else []), *(options.only or [])])
        save_results(options.write, name, table, **about)


if __name__ == "__main__":
    main()
