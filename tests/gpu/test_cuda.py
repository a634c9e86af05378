"""Moments, samples, patterns and maps on a GPU equal those on the CPU, in the library and in the jobs.

`make test-gpu` runs these tests; without a GPU they are skipped.
"""

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import torch
from torch import nn
from torchvision.models import mobilenet_v2, resnet18

from benchmarks.machine import peak
from patterns import METHODS, Explainer, Network, Observer, PatchObserver, choose, solve, trace
from ray_jobs.config import ExplainConfig, Resources
from ray_jobs.jobs.explain.explain import explain
from ray_jobs.jobs.fit.fit import fit
from tests.patterns.networks import relative
from tests.patterns.small import varied_model
from tests.ray_jobs.runs import assert_same_patterns, make_fit_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

PASSES = [name for name, method in METHODS.items() if method.backward is not None]
MODELS = {"resnet18": resnet18, "mobilenet_v2": mobilenet_v2}
CHOICES = ("linear", "two-component", "filter")


@pytest.fixture(autouse=True)
def exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[request.param](num_classes=10).double().eval().requires_grad_(False)


def trace_on(device: str, model: nn.Module) -> Network:
    model = model.to(device)
    return trace(model, torch.zeros(2, 3, 64, 64, device=device, dtype=torch.float64))


def images(count: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("positions", [None, 4])
def test_moments_equal_the_cpus(model: nn.Module, positions: int | None) -> None:
    found = []
    for device in ("cpu", "cuda"):
        observer = Observer(trace_on(device, model), positions=positions)
        observer.update(images().to(device), range(8))
        observer.flush()
        found.append(observer.moments())
    for name, expected in found[0].items():
        for field, sums in expected.tensors().items():
            torch.testing.assert_close(found[1][name].tensors()[field], sums, rtol=1e-7, atol=1e-7)


def test_gram_moments_equal_the_cpus(model: nn.Module) -> None:
    found = []
    for device in ("cpu", "cuda"):
        network = trace_on(device, model)
        observer = PatchObserver(network, list(network.operators)[:3], 4)
        observer.update(images().to(device), range(8))
        found.append(observer.moments())
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name].xx, expected.xx, rtol=1e-7, atol=1e-7)


def test_maps_equal_the_cpus(model: nn.Module) -> None:
    network = trace_on("cpu", model)
    observer = Observer(network)
    observer.update(images())
    moments = observer.moments()
    solved = {name: solve(op, moments[name], CHOICES).patterns for name, op in network.operators.items()}
    patterns = choose(network, solved, "linear")
    expected = Explainer(network, patterns, PASSES)(images())
    on_gpu = {name: pattern.cuda() for name, pattern in patterns.items()}
    found = Explainer(trace_on("cuda", model), on_gpu, PASSES)(images().cuda())
    for method in PASSES:
        assert relative(found.maps[method].cpu(), expected.maps[method]) < 1e-6, method


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "cudagraphs"])
def test_compiled_sums_and_maps_equal_the_uncompiled(mode: str) -> None:
    network = trace_on("cuda", varied_model())
    patterns = {name: torch.randn_like(op.weight) for name, op in network.operators.items()}
    plain, compiled = (Observer(network) for _ in range(2))
    compiled.compile(8, mode)
    one, other = (Explainer(network, patterns, PASSES) for _ in range(2))
    other.compile(8, mode)
    batches = [
        *(images().cuda() + shift for shift in (0, 1, 2)),
        images(3).cuda(),
    ]  # the last one is not compiled
    outputs = [compiled.update(batch) for batch in batches]
    maps = [other(batch, lambda scores: scores.topk(2).indices).maps for batch in batches]
    for batch, output, found in zip(batches, outputs, maps):  # later batches must not overwrite earlier results
        torch.testing.assert_close(output, plain.update(batch))
        expected = one(batch, lambda scores: scores.topk(2).indices).maps
        for method in PASSES:
            assert relative(found[method], expected[method]) < 1e-9, method
    before = plain.moments()
    for name, moments in compiled.moments().items():
        for field, sums in moments.tensors().items():
            torch.testing.assert_close(sums, before[name].tensors()[field], rtol=1e-9, atol=1e-9)


def test_float32_sums_keep_their_precision() -> None:
    """Blocks are summed in float32 and added in float64, so the error does not grow with the number of blocks."""
    torch.manual_seed(0)
    model = resnet18(num_classes=10).eval().requires_grad_(False)
    truth = Observer(trace_on("cuda", model.double()))
    observer = Observer(trace(model.float().cuda(), torch.zeros(2, 3, 64, 64, device="cuda")))
    for batch in images(512).cuda().split(64):
        truth.update(batch)
        observer.update(batch.float())
    expected = truth.moments()
    for name, moments in observer.moments().items():
        assert relative(moments.total.mean_xy(), expected[name].total.mean_xy()) < 1e-4, name


def test_sampled_moments_need_little_more_memory_than_a_forward_pass() -> None:
    torch.manual_seed(0)
    model = resnet18().eval().requires_grad_(False).cuda()
    batch = torch.randn(64, 3, 224, 224, device="cuda")
    observer = Observer(trace(model, batch[:2]), positions=16)
    observer.update(batch)
    with torch.inference_mode():
        forward = peak(lambda: model(batch), "cuda")
    assert peak(lambda: observer.update(batch), "cuda") < 1.5 * forward


def test_jobs_with_and_without_a_gpu_agree(model_spec: str, shards: list[str], tmp_path: Path) -> None:
    torch.backends.cudnn.deterministic = True
    here = fit(make_fit_config(model_spec, shards, tmp_path / "here", positions=3), Resources(workers=0))
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    try:
        resources = Resources(workers=1, gpus_per_worker=1, cpus_per_worker=4)
        there = fit(make_fit_config(model_spec, shards, tmp_path / "there", positions=3), resources)
        again = fit(make_fit_config(model_spec, shards, tmp_path / "again", positions=3), resources)
        assert_same_patterns(there.folder, again.folder)
        plain = make_fit_config(model_spec, shards, tmp_path / "plain")
        recorded = replace(plain, out=str(tmp_path / "recorded"), compile="cudagraphs")
        assert_same_patterns(*(fit(config, resources).folder for config in (plain, recorded)))
        config = ExplainConfig(
            model=make_fit_config(model_spec, shards, "").model,
            patterns=str(here.folder),
            shards=tuple(shards),
            out=str(tmp_path),
        )
        explain(config, resources)
        explain(replace(config, out=str(tmp_path / "cpu")), Resources(workers=0))
    finally:
        ray.shutdown()
    one, other = (pq.read_table(tmp_path / name / "explanations.parquet") for name in ("", "cpu"))
    assert one["key"].equals(other["key"])
    assert one["prediction"].equals(other["prediction"])
