"""What an operation needs at least, what this machine reaches, and how much memory was allocated meanwhile."""

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

SIDE = 2048  # of the square matrices that are multiplied, and a tenth of a second on a slow core
COPIED = 2**26  # float32 numbers that are copied, 256 MiB
TRIES = 5


def synchronise(device: str) -> None:
    """Wait until what was asked of a device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def best(device: str, work: Callable[[], object]) -> float:
    """Seconds of the fastest of several tries."""
    found = []
    for _ in range(TRIES):
        synchronise(device)
        begun = time.perf_counter()
        work()
        synchronise(device)
        found.append(time.perf_counter() - begun)
    return min(found)


@dataclass(frozen=True)
class Cost:
    """flops: of all products and convolutions.  bytes: read and written by all operations, each by itself."""

    flops: int
    bytes: int


def backward_flops(grad: Tensor, x: Tensor, weight: Tensor, *more: Any, out_val: Any) -> int:
    """Of a convolution's gradients. torch's own count takes each group for the whole."""
    *_, transposed, _, _, wanted = more
    return sum(wanted[:2]) * 2 * (x if transposed else grad).numel() * weight[0].numel()


def winograd_flops(x: Tensor, grad: Tensor, kernel: Sequence[int], padding: Sequence[int], out_val: Any) -> int:
    """Six products for twelve."""
    return grad.numel() * x.shape[1] * kernel[0] * kernel[1]


FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten.convolution_backward: backward_flops,
    winograd.OPERATION: winograd_flops,
}


class Counted(TorchDispatchMode):
    """Counts products, and the bytes of all tensors that operations read and write; views cost nothing."""

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
        places = {t.untyped_storage().data_ptr() for t in given}
        if func._schema.is_mutable or not all(t.untyped_storage().data_ptr() in places for t in made):
            self.bytes += sum(t.numel() * t.element_size() for t in {id(t): t for t in (*given, *made)}.values())
        return found


def cost(work: Callable[[], object]) -> Cost:
    """What some work needs."""
    with Counted() as counted:
        work()
    return Cost(counted.flops, counted.bytes)


@dataclass(frozen=True)
class Machine:
    """flops, bytes: a second, of a plain float32 matrix product, and read and written by a plain copy."""

    device: str
    flops: float
    bytes: float

    def roofline(self, needed: Cost, seconds: float) -> float:
        """The share of what the machine reaches: the time that the costlier of the two takes at least, of the time."""
        return max(needed.flops / self.flops, needed.bytes / self.bytes) / seconds

    @staticmethod
    def measured(device: str) -> "Machine":
        """This machine."""
        a, b = torch.randn(2, SIDE, SIDE, device=device)
        source = torch.zeros(COPIED, device=device)
        target = torch.empty_like(source)
        flops = 2 * SIDE**3 / best(device, lambda: a @ b)
        return Machine(device, flops, 2 * source.nbytes / best(device, lambda: target.copy_(source)))

    def name(self) -> str:
        """The device, in words."""
        return torch.cuda.get_device_name() if self.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def peak(work: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes allocated at once while it runs, above those of before; what operations need inside too."""
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
    now = most = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        now += change.nbytes()
        most = max(most, now)
    return most
