"""The cost of operations, the speed of this machine, and peak memory."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from patterns.operators import winograd

SIDE = 2048  # of the square matrices whose product is timed: a tenth of a second on a slow core
COPIED = 2**26  # float32 numbers in the timed copy, 256 MiB
TRIES = 5


def synchronize(device: str) -> None:
    """Wait until a device has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def best_time(device: str, work: Callable[[], object]) -> float:
    """Return the seconds of the fastest of several tries."""
    found = []
    for _ in range(TRIES):
        synchronize(device)
        begun = time.perf_counter()
        work()
        synchronize(device)
        found.append(time.perf_counter() - begun)
    return min(found)


@dataclass(frozen=True)
class Cost:
    """The cost of some work.

    Attributes:
        flops: Operations in all products and convolutions.
        bytes: Bytes read and written by all operations, each counted on its own.
    """

    flops: int
    bytes: int


def backward_flops(grad: Tensor, x: Tensor, weight: Tensor, *more: Any, out_val: Any) -> int:
    """Count the operations of a convolution's gradients; torch's own count ignores groups."""
    *_, transposed, _, _, output_mask = more
    return sum(output_mask[:2]) * 2 * (x if transposed else grad).numel() * weight[0].numel()


def winograd_flops(x: Tensor, grad: Tensor, kernel: Sequence[int], padding: Sequence[int], out_val: Any) -> int:
    """Count the operations of Winograd's weight gradient: 6 products instead of 12."""
    return grad.numel() * x.shape[1] * kernel[0] * kernel[1]


FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten.convolution_backward: backward_flops,
    winograd.OPERATION: winograd_flops,
}


class CostCounter(TorchDispatchMode):
    """Counts products and convolutions, and the bytes of all tensors that operations read and write; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        count = FLOPS.get(func.overloadpacket)
        if count is None:
            with self:
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        found = func(*args, **kwargs)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=found)
        given, made = ([t for t in tree_leaves(x) if isinstance(t, Tensor)] for x in ((args, kwargs), found))
        storages = {t.untyped_storage().data_ptr() for t in given}
        if func._schema.is_mutable or not all(t.untyped_storage().data_ptr() in storages for t in made):
            self.bytes += sum(t.numel() * t.element_size() for t in {id(t): t for t in (*given, *made)}.values())
        return found


def measure_cost(work: Callable[[], object]) -> Cost:
    """Return the cost of some work."""
    with CostCounter() as counted:
        work()
    return Cost(counted.flops, counted.bytes)


@dataclass(frozen=True)
class Machine:
    """The speed of a machine.

    Attributes:
        device: cpu or cuda.
        flops: Operations per second of a plain float32 matrix product.
        bytes: Bytes per second that a plain copy reads and writes.
    """

    device: str
    flops: float
    bytes: float

    def roofline(self, needed: Cost, seconds: float) -> float:
        """Return the share of the roofline: the time for the products or for the bytes, if larger, over the time."""
        return max(needed.flops / self.flops, needed.bytes / self.bytes) / seconds

    @staticmethod
    def measure(device: str) -> "Machine":
        """Measure this machine."""
        a, b = torch.randn(2, SIDE, SIDE, device=device)
        source = torch.zeros(COPIED, device=device)
        target = torch.empty_like(source)
        flops = 2 * SIDE**3 / best_time(device, lambda: a @ b)
        return Machine(device, flops, 2 * source.nbytes / best_time(device, lambda: target.copy_(source)))

    def name(self) -> str:
        """Return the name of the device."""
        return torch.cuda.get_device_name() if self.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def peak(work: Callable[[], object], device: str = "cpu") -> int:
    """Return the peak of the bytes allocated by some work, including the workspace of operations."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results = profiler.profiler.kineto_results
    changes = [event for event in results.events() if event.name() == "[memory]"]
    now = highest = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        now += change.nbytes()
        highest = max(highest, now)
    return highest
