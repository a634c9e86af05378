"""Explainers as programs of `torch.export`, run in a process that cannot import this package."""

import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from patterns import Explainer, Network, UserError, accumulate, choose, contrast, export_program, solve, trace
from patterns.attribution import BACKWARD_PASSES
from tests.patterns.networks import relative
from tests.patterns.small import varied_model

# Batches of one sample and of several are explained by the file alone.
ELSEWHERE = """
import sys
for name in ("patterns", "ray_jobs", "torchvision", "timm"):
    sys.modules[name] = None  # importing it fails
import numpy, torch
program = torch.export.load(sys.argv[1]).module()
batch = torch.from_numpy(numpy.load(sys.argv[2]))
outputs = [[x.numpy() for x in program(part)] for part in (batch, batch[:1])]
numpy.savez(sys.argv[3], **{f"{i}-{j}": x for i, row in enumerate(outputs) for j, x in enumerate(row)})
"""


def attention_model() -> nn.Module:
    torch.manual_seed(3)
    model = torchvision.models.VisionTransformer(16, 8, 1, 2, 16, 24, num_classes=4)
    nn.init.normal_(model.heads.head.weight)  # torchvision begins with zeros
    return model.double().eval()


def shifted_windows_model() -> nn.Module:
    """Swin: padded and shifted windows, a mask, and a bias for each pair of positions."""
    torch.manual_seed(4)
    return torchvision.models.SwinTransformer([4, 4], 8, [2], [2], [3, 3], num_classes=4).double().eval()


def fit(network: Network, batch: Tensor) -> dict[str, Tensor | None]:
    moments = accumulate(network, [batch])
    return choose(network, {name: solve(op, moments[name]).patterns for name, op in network.operators.items()})


def run_elsewhere(file: Path, batch: Tensor) -> list[list[Tensor]]:
    """Return the outputs of an exported program for a batch and for its first sample."""
    np.save(file.with_suffix(".npy"), batch.numpy())
    results = file.with_suffix(".npz")
    arguments = [str(file), str(file.with_suffix(".npy")), str(results)]
    subprocess.run([sys.executable, "-c", ELSEWHERE, *arguments], check=True, cwd=file.parent)
    found: list[list[Tensor]] = [[], []]
    with np.load(results) as arrays:
        for name in arrays:
            found[int(name[0])].append(torch.from_numpy(arrays[name]))
    return found


@pytest.mark.full
@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (varied_model, torch.float32),
        pytest.param(attention_model, torch.float64, marks=pytest.mark.slow),
        pytest.param(shifted_windows_model, torch.float64, marks=pytest.mark.slow),
    ],
)
def test_program_computes_the_explainers_maps_without_the_package(
    make: Callable[[], nn.Module], dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    size = 8 if make is varied_model else 16
    batch = torch.randn(9, 3, size, size, dtype=dtype)
    network = trace(make().to(dtype), batch[:2])
    explainer = Explainer(network, fit(network, batch), BACKWARD_PASSES)
    torch.export.save(export_program(explainer, BACKWARD_PASSES), tmp_path / "explainer.pt2")
    bound = 1e-5 if dtype is torch.float32 else 1e-12  # attention may be fused in one of both
    for found, inputs in zip(run_elsewhere(tmp_path / "explainer.pt2", batch), (batch, batch[:1])):
        expected = explainer(inputs)
        assert relative(found[0], expected.scores) < bound
        for method, maps in zip(BACKWARD_PASSES, found[1:], strict=True):
            assert relative(maps, expected.maps[method]) < bound, method


def small_explainer() -> tuple[Explainer, Tensor]:
    torch.manual_seed(1)
    batch = torch.randn(8, 6)
    network = trace(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), batch[:2])
    return Explainer(network, fit(network, batch), ["patternattribution"]), batch


@pytest.mark.parametrize(
    "targets",
    [
        contrast,
        lambda scores: scores.topk(3).indices,
        lambda scores: torch.full(scores.shape[:1], 4),
        lambda scores: scores.softmax(1),
    ],
    ids=["contrast", "several", "class", "weights"],
)
def test_targets_are_part_of_the_graph(targets: Callable[[Tensor], Tensor]) -> None:
    explainer, batch = small_explainer()
    scores, maps = export_program(explainer, ["patternattribution"], targets).module()(batch)
    expected = explainer(batch, targets)
    torch.testing.assert_close(scores, expected.scores)
    torch.testing.assert_close(maps, expected.maps["patternattribution"])


def test_graph_holds_each_weight_once_and_nothing_of_this_machine() -> None:
    torch.manual_seed(1)
    batch = torch.randn(8, 300)
    network = trace(nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 300)), batch[:2])
    weights: dict[str, Tensor | None] = {name: op.weight for name, op in network.operators.items()}
    sizes = []
    for patterns in (weights, dict.fromkeys(weights)):  # the identity has no weights of its own for the backward pass
        file = BytesIO()
        program = export_program(Explainer(network, patterns, ["patternattribution"]), ["patternattribution"])
        torch.export.save(program, file)
        assert str(Path.cwd()).encode() not in file.getvalue()
        sizes.append(len(file.getvalue()))
    model = 4 * sum(p.numel() for op in network.operators.values() for p in (op.weight, op.bias) if p is not None)
    assert sizes[0] < 2.1 * model
    assert sizes[1] < 1.1 * model


@pytest.mark.full
def test_pass_of_a_scaled_network_is_exported_with_its_scales() -> None:
    torch.manual_seed(2)
    layers = [layer for _ in range(30) for layer in (nn.Linear(8, 8), nn.ReLU())]
    batch = torch.randn(8, 8)
    network = trace(nn.Sequential(*layers), batch[:2])
    patterns = {name: op.weight * 1e4 for name, op in network.operators.items()}
    explainer = Explainer(network, patterns, ["patternnet"])
    expected = explainer(batch)
    assert explainer.exponents["patternnet"] != 0
    _, maps = export_program(explainer, ["patternnet"]).module()(batch)
    assert maps.abs().max() > 0
    torch.testing.assert_close(maps, expected.maps["patternnet"])


def test_method_that_is_no_backward_pass_is_an_error() -> None:
    explainer, _ = small_explainer()
    with pytest.raises(UserError, match="smoothgrad is not a backward pass"):
        export_program(explainer, ["smoothgrad"])
