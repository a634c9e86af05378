"""Compiled sums and explanations: the same numbers as uncompiled, and one clear error if compilation fails."""

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.compile_worker.subproc_pool import SubprocException
from torch._inductor.exc import CppCompileError
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from patterns import Explainer, Network, Observer, UserError, solve, trace
from patterns.compilation import extract_cause
from patterns.operators import winograd
from tests.patterns.networks import PASSES, relative
from tests.patterns.small import image, varied_model

pytestmark = [pytest.mark.full, pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")]


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    monkeypatch.setattr("patterns.operators.winograd.MIN_CHANNEL_COLUMNS", 0)
    return trace(varied_model(), image())


@pytest.fixture
def small_network() -> Network:
    return trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).double(), image())


@pytest.mark.parametrize("name", ["small_network", pytest.param("network", marks=pytest.mark.slow)])
def test_compiled_sums_are_those_of_the_uncompiled_network(name: str, request: pytest.FixtureRequest) -> None:
    network: Network = request.getfixturevalue(name)
    plain, compiled = Observer(network), Observer(network)
    compiled.compile(4)
    # The last batch is smaller, so it runs uncompiled.
    batches = image(4), image(4).contiguous(memory_format=torch.channels_last) + 3, image(3)
    with torch.compiler.set_stance("fail_on_recompile"):
        outputs = list(map(compiled.update, batches))
    for found, output in zip(outputs, map(plain.update, batches)):
        torch.testing.assert_close(found, output)
    expected = plain.moments()
    assert next(iter(expected.values())).total.n[0] == 11 * (64 if name == "network" else 36)
    for name, moments in compiled.moments().items():
        for field, sums in moments.tensors().items():
            torch.testing.assert_close(sums, expected[name].tensors()[field], rtol=1e-12, atol=1e-10)
    compiled.reset()
    assert not any(t.any() for t in compiled.tensors().values())


@pytest.mark.slow
def test_patterns_of_compiled_float32_sums_are_as_exact_as_uncompiled_patterns() -> None:
    model, images = varied_model(), F.interpolate(image(4), 64).repeat(2, 1, 1, 1) + 30
    wide = trace(model, images)
    truth = Observer(wide)
    truth.update(images)
    narrow = trace(model.float(), images.float())
    plain, compiled = Observer(narrow), Observer(narrow)
    compiled.compile(8)
    for observer in (plain, compiled):
        observer.update(images.float())
    solved = [
        {name: solve(operators[name], m, ["linear", "two-component"]).patterns for name, m in sums.moments().items()}
        for sums, operators in ((truth, wide.operators), (plain, narrow.operators), (compiled, narrow.operators))
    ]
    for name, expected in solved[0].items():
        for row, pattern in expected.items():
            error, compiled_error = (relative(patterns[name][row], pattern) for patterns in solved[1:])
            assert compiled_error <= max(1.5 * error, 1e-6), (name, row, compiled_error, error)


@pytest.mark.slow
def test_compiled_maps_of_every_method_and_of_several_targets_are_those_of_uncompiled_passes(network: Network) -> None:
    torch.manual_seed(1)
    patterns = {name: torch.randn_like(op.weight) for name, op in network.operators.items()}
    methods = [*PASSES, "random", "smoothgrad"]
    plain, compiled = (Explainer(network, patterns, methods) for _ in range(2))
    compiled.compile(4)
    targets: list[Tensor | Callable[[Tensor], Tensor] | None] = [
        None,
        lambda scores: scores.topk(2).indices,
        torch.randn(4, 5, dtype=torch.float64),
    ]
    for target in targets:
        for batch in (image(4), image(3)):
            if isinstance(target, Tensor):
                target = target[: len(batch)]
            expected = plain(batch, target)
            with torch.compiler.set_stance("fail_on_recompile"):
                found = compiled(batch, target)
            torch.testing.assert_close(found.scores, expected.scores)
            assert torch.equal(found.targets, expected.targets)
            for method in methods:
                assert not found.maps[method].requires_grad
                assert relative(found.maps[method], expected.maps[method]) < 1e-12, method


def test_compiled_backward_pass_is_a_product_of_matrices_and_masks() -> None:
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]).double()
    network = trace(model, torch.zeros(2, 6, dtype=torch.float64))
    patterns = {name: torch.randn_like(op.weight) for name, op in network.operators.items()}
    explainer = Explainer(network, patterns, ["patternnet"])
    explainer.compile(1)
    x = torch.randn(1, 6, dtype=torch.float64)
    with torch.no_grad():
        one = layers[0](x).relu()
        two = layers[1](one).relu()
        value = layers[2](two)[0, 2]
        backward = value * patterns["4"][2] * (two[0] > 0) @ patterns["2"] * (one[0] > 0) @ patterns["0"]
    assert relative(explainer(x, torch.tensor([2])).maps["patternnet"][0], backward) < 1e-12


def test_compiled_passes_beyond_the_range_of_float32_are_scaled() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 2))
    network = trace(model, torch.zeros(2, 8))
    patterns = {name: op.weight * 1e6 for name, op in network.operators.items()}
    plain, compiled = (Explainer(network, patterns, ["patternnet"]) for _ in range(2))
    compiled.compile(3)
    expected, found = plain(torch.ones(3, 8)), compiled(torch.ones(3, 8))
    assert found.exponents == expected.exponents
    assert expected.exponents["patternnet"] > 100
    assert relative(found.maps["patternnet"], expected.maps["patternnet"]) < 1e-5


def test_winograd_operation_agrees_with_its_fake_version() -> None:
    x, grad = torch.randn(2, 3, 9, 8), torch.randn(2, 4, 9, 8)
    torch.library.opcheck(winograd.OPERATION.default, (x, grad, (3, 5), (1, 2)))


def compile_error(target: Observer | Explainer, mode: str = "default") -> UserError:
    """Return the error that compiling a target raises."""
    with pytest.raises(UserError) as caught:
        target.compile(2, mode)
    assert caught.value.parameter == "compile"
    return caught.value


def test_unknown_modes_and_missing_compilers_are_errors_of_one_line(small_network: Network) -> None:
    error = compile_error(Observer(small_network), "fast")
    assert "'fast'" in error.what
    assert "default, " in error.remedy
    assert ", cudagraphs" in error.remedy
    assert "sampled positions" in compile_error(Observer(small_network, positions=2)).what
    for target in (Observer(small_network), Explainer(small_network, None, ["gradient"])):
        assert "cudagraphs needs a GPU" in compile_error(target, "cudagraphs").what
    observer = Observer(small_network)
    for target in (observer, Explainer(small_network, None, ["gradient"])):
        with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}):
            error = compile_error(target)
        assert "compiler" in error.what
        assert "g++" in error.remedy
        assert "\n" not in str(error)
    assert not any(t.any() for t in observer.tensors().values())


def test_only_full_batches_run_compiled(small_network: Network) -> None:
    observer, explainer = Observer(small_network), Explainer(small_network, None, ["gradient"])
    observer.compile(4)
    explainer.compile(4)
    runs: list[tuple[Callable[[Tensor], object], int]] = [(observer.update, 1), (explainer, 2)]
    for run, graphs in runs:
        for size, expected in ((4, graphs), (3, 0)):
            with profile(activities=[ProfilerActivity.CPU]) as found:
                run(image(size))
            assert sum("CompiledFxGraph" in event.name for event in found.events() or ()) == expected


def test_error_of_a_compiler_is_its_line_that_names_the_cause() -> None:
    output = (
        "In file included from a.cpp:1:\n/tmp/a.cpp:3:10: fatal error: omp.h: No such file\ncompilation terminated."
    )
    assert extract_cause(CppCompileError(["g++"], output)) == "/tmp/a.cpp:3:10: fatal error: omp.h: No such file"
    assert (
        extract_cause(SubprocException("Traceback:\n  raise PTXASError(error)\nPTXASError: no ptxas\n"))
        == "PTXASError: no ptxas"
    )
    assert extract_cause(ValueError("out of range\nlater errors may follow")) == "out of range"
    assert extract_cause(ValueError()) == "ValueError"
