"""What accumulating moments needs, measured: every tensor that is alive, at the worst moment."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from patterns import Observer, trace


class Peak(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, and the most that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in given and key not in self.alive:
                    self.alive[key] = size
                    self.now += size
                    weakref.finalize(storage, self.free, key)
        self.most = max(self.most, self.now)
        return result

    def free(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)


def peak(run: Callable[[], object]) -> int:
    with Peak() as mode:
        run()
    return mode.most


def test_accumulating_takes_the_moments_and_little_more_than_a_forward_and_backward() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inner, outer in ((3, 32), (32, 32), (32, 64), (64, 64), (64, 64)):
        layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()
    model.requires_grad_(False)
    x = torch.randn(4, 3, 64, 64)
    network = trace(model, x[:2])
    observer = Observer(network)
    moments = sum(m.nbytes for m in observer.moments().values())

    def forward_and_backward() -> None:
        inputs = x.clone().requires_grad_()
        torch.autograd.grad(model(inputs).sum(), inputs)

    plain, accumulating = peak(forward_and_backward), peak(lambda: observer.update(x))
    assert plain > 4 * (2 * 32 + 3 * 64) * x[0, 0].numel() * len(x)  # every activation was alive: the measure counts
    assert moments + accumulating <= moments + 1.3 * plain
