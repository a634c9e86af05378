"""Smooth gates on every path of a fit: fast gradients, compiled updates, files, merging and standard errors."""

import math
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patterns import Explainer, Moments, Observer, SmoothGate, UserError, solve, trace
from patterns.estimation.jackknife import GROUPS, check_convergence
from patterns.io import TensorFile, load_moments, merge_moments, save_moments
from patterns.operators import winograd
from tests.oracles import window_patches
from tests.patterns.cases import Case, convolution, fixed, normal, values
from tests.patterns.drawn import make_loaders
from tests.patterns.networks import relative
from tests.patterns.test_gates import ACTIVATIONS, assert_sums, brute_force, gate_case, weights_of

pytestmark = pytest.mark.full

SOME = [
    SmoothGate("gelu"),
    SmoothGate("silu", (1.0,)),
    SmoothGate("elu", (1.6732632423543772, 1.0507009873554805, 1.0)),
]
some_gates = pytest.mark.parametrize("gate", SOME, ids=str)


@some_gates
def test_gradient_with_fewer_products_has_the_weighted_sums_over_patches(
    gate: SmoothGate, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    gradient = winograd.weight_gradient
    monkeypatch.setattr(winograd, "MIN_CHANNEL_COLUMNS", 0)
    monkeypatch.setattr(winograd, "weight_gradient", lambda *args: calls.append(args) or gradient(*args))
    plain = convolution(normal(4, 3, 3, 3), values(6, 3, 9, 8), (1, 1), (1, 1), (1, 1))
    case = replace(plain, bias=torch.linspace(-0.5, 0.5, 4).double(), gate=gate)  # type: ignore[arg-type]
    assert_sums(case.moments(), brute_force(case, gate))
    assert calls


def save(path: Path, moments: Moments) -> TensorFile:
    save_moments(path, {f"it/{name}": sums for name, sums in moments.tensors().items()}, {})
    return TensorFile(path)


@some_gates
def test_files_of_parts_merge_to_the_weighted_sums_over_patches(gate: SmoothGate, tmp_path: Path) -> None:
    case = gate_case("conv2d in groups", gate)
    with ExitStack() as stack:
        parts = [case.moments(inputs=batch) for batch in case.batches([2, 1, 4])]
        files = [stack.enter_context(save(tmp_path / str(number), part)) for number, part in enumerate(parts)]
        merge_moments(tmp_path / "merged", files, {})
        merged = stack.enter_context(TensorFile(tmp_path / "merged"))
        for found in (load_moments([merged], "it"), load_moments(files[::-1], "it")):
            assert_sums(found, brute_force(case, gate))
        rectified = stack.enter_context(save(tmp_path / "relu", fixed("conv2d in groups", "relu").moments()))
        with pytest.raises(UserError, match=r"the sums it/open\.n, and they cannot be added"):
            load_moments([merged, rectified], "it")


@some_gates
def test_standard_errors_are_the_jackknife_of_weighted_regressions(gate: SmoothGate) -> None:
    """The textbook's formula for equal groups, with patterns regressed on the samples themselves."""
    operator = gate_case("linear", gate).operator
    x = normal(GROUPS * 20, 6, seed=7) @ normal(6, 6, seed=8) + 0.5
    parts = [replace_inputs(gate, part).moments() for part in x.split(20)]
    row = "positive-own-mean"
    found = check_convergence(operator, make_loaders(parts), "two-component-own-mean").errors[row]
    assert found is not None
    whole = regress(gate, x)
    left = np.stack([regress(gate, torch.cat([*x.split(20)[:j], *x.split(20)[j + 1 :]])) for j in range(GROUPS)])
    variance = (GROUPS - 1) / GROUPS * ((left - left.mean(0)) ** 2).sum(0)
    expected = np.sqrt(variance.sum(1)) / np.linalg.norm(whole, axis=1)
    np.testing.assert_allclose(found.neurons, expected, rtol=1e-8)


def replace_inputs(gate: SmoothGate, x: Tensor) -> Case:
    return replace(gate_case("linear", gate), inputs=(x,))


def regress(gate: SmoothGate, x: Tensor) -> np.ndarray:
    """Return cov₊[x, y] / var₊[y] of each neuron, (K, D), by weighted means of the samples."""
    case = gate_case("linear", gate)
    assert case.bias is not None
    found = []
    for w, bias in zip(case.weight, case.bias):
        y = x @ w
        g = weights_of(gate, y + bias).numpy()
        cov = np.cov(x.T.numpy(), y.numpy(), aweights=g, bias=True)
        found.append(cov[-1, :-1] / cov[-1, -1])
    return np.stack(found)


class Gates(nn.Module):
    """Convolutions with three smooth gates and a slope for each channel, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1) for i in range(4))
        self.slopes, self.out = nn.PReLU(4), nn.Linear(4, 3)
        self.slopes.weight.data = torch.tensor([0.25, 0.5, 0.0, 0.75])
        self.double().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for conv, gate in zip(self.convs, SOME):
            x = ACTIVATIONS[gate](conv(x))
        return self.out(self.slopes(self.convs[3](x)).mean((2, 3)))

    def factor(self, number: int, z: Tensor) -> Tensor:
        """Return f(z) / z of a gate."""
        return (ACTIVATIONS[SOME[number]] if number < len(SOME) else self.slopes)(z) / z


X = torch.randn(7, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_compiled_updates_have_the_weighted_sums_over_patches() -> None:
    model = Gates()
    observer = Observer(trace(model, X[:2]))
    observer.compile(4)
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in X.split(4):  # the second one is smaller, so it runs uncompiled
            observer.update(batch)
    x = X
    for number, conv in enumerate(model.convs):
        (patches,) = window_patches(x, (3, 3), (1, 1), (1, 1), (1, 1))
        y = patches @ conv.weight.flatten(1).T
        g = model.factor(number, y + conv.bias)
        weights = (g / 1.7580993408473766 if SOME[number : number + 1] == SOME[2:] else g).T
        expected = {
            "n": weights.sum(1), "y": (weights * y.T).sum(1), "yy": (weights * y.T**2).sum(1),
            "x": weights @ patches, "xy": (weights * y.T) @ patches,
        }  # fmt: skip
        assert_sums(observer.moments()[f"convs.{number}"], expected)
        z = conv(x)
        x = z * model.factor(number, z)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_compiled_maps_are_those_of_hand_written_autograd() -> None:
    model = Gates()
    network = trace(model, X[:2])
    patterns = {name: normal(*op.weight.shape, seed=9) for name, op in network.operators.items()}
    explainer = Explainer(network, patterns, ["gradient-x-input", "patternattribution"])
    explainer.compile(7)
    found = explainer(X, 1)
    leaf = X.clone().requires_grad_()
    for method in found.maps:

        def apply(
            layer: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, name: str, method: str = method
        ) -> Tensor:
            if method == "gradient-x-input":
                return layer(x, weight)
            backward = layer(x, weight * patterns[name])
            return backward + (layer(x, weight) - backward).detach()

        x = leaf
        for number, conv in enumerate(model.convs):
            z = apply(lambda x, w: F.conv2d(x, w, padding=1), x, conv.weight, f"convs.{number}")
            z = z + conv.bias[:, None, None]
            x = z * model.factor(number, z).detach()
        mean = apply(lambda x, w: (x * w[:, 0]).sum((2, 3)), x, X.new_full((4, 1, 6, 6), 1 / 36), "average_pool.0")
        scores = (apply(F.linear, mean, model.out.weight, "out") + model.out.bias)[:, 1]
        start = torch.ones_like(scores) if method == "gradient-x-input" else scores.detach()
        (gradient,) = torch.autograd.grad(scores, leaf, start)
        expected = gradient * X if method == "gradient-x-input" else gradient
        assert relative(found.maps[method] * math.ldexp(1, found.exponents[method]), expected) < 1e-10, method


def test_solutions_of_halves_are_those_of_all_samples() -> None:
    for gate in SOME:
        case = gate_case("conv2d", gate)
        halves = [case.moments(inputs=batch) for batch in case.batches([3, 4])]
        found, expected = (solve(case.operator, m, "two-component").patterns for m in (sum_up(halves), case.moments()))
        for row, pattern in expected.items():
            assert relative(found[row], pattern) < 1e-10


def sum_up(parts: list[Moments]) -> Moments:
    first, second = parts
    return second + first
