"""Where the time of an exact fit goes: `python -m benchmarks.excess [--write docs]`.

The time of one batch in units of a forward pass, by kind of operation. torch's profiler gives the share of each kind,
and an unprofiled fit the time that they share, because profiling makes small operations slower.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.fitting import FITS, make_observer
from benchmarks.machine import Machine
from benchmarks.pages import Table, make_parser, save_results
from benchmarks.timing import MODELS, THREADS, Bench, infer
from patterns import trace
from patterns.estimation.observer import ObservedOperator
from ray_jobs.engine.shard_worker import keep_freed_memory

BATCH = 8
BATCH_RANGE = "batch"  # the range of the whole batch in the profile
FORWARD = "convolutions and linear layers of the forward pass"
DENSE, GROUPED = (
    "weight gradients of dense convolutions and linear layers",
    "weight gradients of depthwise convolutions",
)
ADDITIONS = "additions and their sums"
ELEMENTWISE, SUMS = "gates, masks and centered outputs (elementwise)", "sums of outputs and inputs"
COPIES, REST, TOTAL = "layout changes, copies and fills", "rest", "the whole fit"
# Names of ranges and of torch's operations. What runs inside one of them counts for it.
NAMES = {
    FORWARD: ("convolution", "linear", "addmm"),
    DENSE: ("convolution_backward", "matmul", "bmm", "mm"),
    ELEMENTWISE: (
        *("sub", "sub_", "mul", "mul_", "div", "div_", "add", "add_", "addcmul_", "square", "pow", "where", "clamp"),
        *("relu", "hardtanh", "threshold_backward", "hardtanh_backward", "gt", "ge", "lt", "le", "logical_and"),
    ),
    SUMS: ("sum", "mean", "linalg_vector_norm", "linalg_vecdot"),
    COPIES: ("to", "contiguous", "clone", "copy_", "reshape", "new_ones", "new_zeros", "full_like", "fill_", "zero_"),
}
KINDS = {f"aten::{name}": kind for kind, names in NAMES.items() for name in names}
KINDS |= {"patternnet::winograd_weight_gradient": DENSE, "Addition": ADDITIONS}
ROWS = (FORWARD, DENSE, GROUPED, ELEMENTWISE, SUMS, ADDITIONS, COPIES, REST)


@contextmanager
def record_operators() -> Iterator[None]:
    """Record each observed operator as a range of the profile, which has the name of its type."""
    ranges: list[record_function] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, ObservedOperator):
            ranges.append(record_function(type(module.operator.operator_type).__name__))
            ranges[-1].__enter__()

    def leave(module: nn.Module, inputs: Any, outputs: Any) -> None:
        if isinstance(module, ObservedOperator):
            ranges.pop().__exit__(None, None, None)

    hooks = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def kind_of(event: FunctionEvent) -> str | None:
    """Return the kind of an event; None if the kinds of the events inside it count."""
    kind = KINDS.get(event.name)
    if event.name == "aten::convolution_backward":
        shapes: Any = event.input_shapes
        _, x, weight, *_ = shapes
        return DENSE if x[1] == weight[1] else GROUPED
    return kind


def add_times(event: FunctionEvent, times: Counter[str]) -> None:
    """Add the time of an event to that of its kind."""
    if kind := kind_of(event):
        times[kind] += event.cpu_time_total
        return
    times[REST] += event.self_cpu_time_total
    for child in event.cpu_children:
        add_times(child, times)


def profile_shares(work: Callable[[], object]) -> dict[str, float]:
    """Return the share of each kind in the time of some work, which runs an observer."""
    activities = [ProfilerActivity.CPU]
    with (
        profile(activities=activities, record_shapes=True) as profiler,
        record_operators(),
        record_function(BATCH_RANGE),
    ):
        work()
    (whole,) = (event for event in profiler.events() if event.name == BATCH_RANGE)
    times: Counter[str] = Counter()
    add_times(whole, times)
    return {kind: times[kind] / whole.cpu_time_total for kind in ROWS}


def measure_kinds(bench: Bench) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the name of each network and the time of each kind of operation in units of a forward pass."""
    for name, model, images in bench.models():
        update = partial(make_observer(trace(model, images[:2]), *FITS[next(iter(FITS))]).update, images)
        timed = bench.timed({"forward": partial(infer, model, images), "fit": update}, measured=False)
        whole = median(fit / forward for fit, forward in zip(timed["fit"].seconds, timed["forward"].seconds))
        shares = [profile_shares(update) for _ in range(bench.rounds)]
        times = {kind: whole * median(found[kind] for found in shares) for kind in ROWS}
        yield name, {**times, TOTAL: whole}


def main() -> None:
    """Measure, and print the table or write it to the docs."""
    parser = make_parser("benchmarks.excess", __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=BATCH)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    keep_freed_memory()  # as the workers do
    bench = Bench(Machine.measure("cpu"), options.rounds, options.batch, options.models, "default")
    found = dict(measure_kinds(bench))
    columns = {"kind of operation": "", **dict.fromkeys(found, "{:.2f}")}
    table = Table(columns, [[kind, *(times[kind] for times in found.values())] for kind in (*ROWS, TOTAL)])
    print(table.render())
    if options.write:
        about = {"torch": torch.__version__.partition("+")[0], "batch": options.batch, "rounds": options.rounds}
        save_results(options.write, "excess", table, **about)


if __name__ == "__main__":
    main()
