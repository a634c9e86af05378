"""Timings as ratios within one run: `python -m benchmarks [--device cuda] [--only PART …] [--write FILE]`."""

import argparse
import platform
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

import torch

from benchmarks import compiling, decoding, explaining, fitting
from benchmarks.machine import Machine
from benchmarks.timing import HEAD, MODELS, SIZE, THREADS, Bench, Row
from patterns.compilation import CUDA_GRAPHS
from ray_jobs.engine.shard_worker import keep_freed_memory

PARTS: dict[str, Callable[[Bench], Iterable[Row]]] = {
    "fit": fitting.passes,
    "explain": explaining.passes,
    "compile": compiling.compiled,
    "quality": lambda bench: [fitting.judging(bench)],
    "decode": decoding.reading,
    "jobs": lambda bench: chain(fitting.jobs(bench), explaining.whole_job(bench)),
}
ON_GPU = ("fit", "explain", "compile")  # the others are the CPU's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--compile", metavar="MODE", help="default on a CPU, cudagraphs on a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=["float32", "tf32"], default="float32")
    parser.add_argument("--batch", type=int, help="4 on a CPU, 64 on a GPU")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.precision == "tf32"
    keep_freed_memory()  # as the workers do; for every variant alike
    batch = options.batch or (4 if options.device == "cpu" else 64)
    mode = options.compile or ("default" if options.device == "cpu" else CUDA_GRAPHS)
    bench = Bench(Machine.measured(options.device), options.rounds, batch, options.models, mode)
    parts = options.only or (PARTS if options.device == "cpu" else ON_GPU)
    name = bench.machine.name()  # now, since jobs set their own number of threads
    print(HEAD, end="", flush=True)
    rows = []
    for row in chain.from_iterable(PARTS[part](bench) for part in parts):
        print(row, flush=True)
        rows.append(row)
    text = f"""# Benchmarks

Made by `make bench{"" if options.device == "cpu" else "-gpu"}` on: {name} ({platform.machine()}), torch
{torch.__version__.partition("+")[0]}.

{SIZE}×{SIZE} pixels, batches of {batch}, {options.precision}, random weights; VGG-16 without its large linear layers.
Each ratio is the median of {options.rounds} rounds (3 of 16 positions, of ρ, of what is compiled, and of
jobs), within a round, and the middle half's spread.

*Of the roofline*: the least time that this machine needs for the products, at the rate of a plain {options.precision}
matrix product ({bench.machine.flops / 1e9:.0f} GFLOP/s), or for what operations read and write, each by itself, at the
rate of a plain copy ({bench.machine.bytes / 1e9:.1f} GB/s), whichever is more, as a share of the time it took.

*Peak memory*: the most that is allocated at once beside what was there before, against that of the variant it is
compared with.

{HEAD}"""
    text += "".join(f"{row}\n" for row in rows)
    if options.write:
        options.write.write_text(text)


if __name__ == "__main__":
    main()
