"""The rules of LRP that docs/smooth.md compares with, and the networks of its study."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zennit.composites import LayerMapComposite
from zennit.rules import Gamma

from benchmarks.smooth import __main__ as study_module
from benchmarks.smooth.__main__ import MEASURES, name_methods, share_equally, summarize
from benchmarks.smooth.attnlrp import Conv2d, LayerNorm, Linear, constant, half, rules
from benchmarks.smooth.networks import NETWORKS, VisionTransformer
from patterns import Explainer, trace

IMAGES = torch.randn(3, 1, 28, 28, dtype=torch.float64)


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[name]().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def relevance(model: nn.Module, x: Tensor, **chosen: object) -> Tensor:
    with rules(**chosen):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    return x * gradient


@pytest.mark.full
@pytest.mark.parametrize("name", NETWORKS)
def test_cp_lrp_of_the_modules_is_that_of_the_traced_network(name: str) -> None:
    model = make(name)
    expected = relevance(model, IMAGES, constant_factors=True)
    found = Explainer(trace(model, IMAGES), None, ["gradient-x-input"])(IMAGES, 1).maps["gradient-x-input"]
    assert float((found - expected).norm()) <= 1e-9 * float(expected.norm())


@pytest.mark.parametrize("name", NETWORKS)
def test_rules_change_no_output(name: str) -> None:
    model = make(name)
    with torch.no_grad():
        expected = model(IMAGES)
        with rules(constant_factors=True, attention=True, convolution=0.25, linear=0.1):
            torch.testing.assert_close(model(IMAGES), expected)


def test_gamma_rule_is_zennits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        Conv2d(1, 4, 3, stride=2), nn.ReLU(), Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), Linear(484, 5)
    ).double()
    plain = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(484, 5),
    ).double()
    plain.load_state_dict(model.state_dict())
    leaf = IMAGES.clone().requires_grad_()
    with LayerMapComposite([(nn.Conv2d, Gamma(0.25)), (nn.Linear, Gamma(0.1))]).context(plain) as modified:
        scores = modified(leaf)
        start = torch.zeros_like(scores)
        start[:, 1] = scores[:, 1].detach()
        (expected,) = torch.autograd.grad(scores, leaf, start)
    found = relevance(model, IMAGES, convolution=0.25, linear=0.1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_relevance_of_attention_sums_to_the_score_without_biases() -> None:
    torch.manual_seed(0)
    q, k, v = (Linear(6, 6, bias=False).double() for _ in range(3))
    norm, out = LayerNorm(6).double(), Linear(6, 1, bias=False).double()
    x = torch.randn(2, 7, 6, dtype=torch.float64)

    def forward(x: Tensor) -> Tensor:
        x = norm(x)
        weights = half(q(x)) @ half(k(x)).transpose(1, 2)
        weights = weights * constant(weights.abs() / (1 + weights.square()))  # any gate
        return out(half(weights) @ half(v(x))).sum((1, 2))

    for gammas in ((0.0, 0.0), (0.0, 0.5)):
        with rules(constant_factors=True, attention=True, convolution=gammas[0], linear=gammas[1]):
            leaf = x.clone().requires_grad_()
            score = forward(leaf)
            (gradient,) = torch.autograd.grad(score.sum(), leaf)
        torch.testing.assert_close((x * gradient).sum((1, 2)), score.detach(), rtol=1e-6, atol=1e-9)


def test_patches_cover_the_image() -> None:
    assert VisionTransformer().position.shape == (1, 50, 64)


def test_parts_of_additions_are_equal_and_another_constant_changes_no_map() -> None:
    """The reason why the study has no row for the pattern (1, 1)."""
    network = trace(make("ConvNeXt"), IMAGES)
    additions = share_equally(network)
    assert len(additions) == 4
    assert all(torch.equal(pattern, torch.full_like(pattern, 0.5)) for pattern in additions.values())
    torch.manual_seed(1)
    others = {name: torch.randn_like(op.weight) for name, op in network.operators.items()}
    maps = []
    for factor in (1, 2):
        patterns = others | {name: factor * pattern for name, pattern in additions.items()}
        found = Explainer(network, patterns, ["patternattribution"])(IMAGES, 1)
        maps.append(found.maps["patternattribution"] * 2.0 ** found.exponents["patternattribution"])
    torch.testing.assert_close(maps[1], 2**4 * maps[0], rtol=1e-12, atol=0)


@pytest.mark.full
def test_values_of_an_earlier_call_are_kept_and_missing_methods_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Sequence[str]] = []

    def prepare(*args: Any) -> SimpleNamespace:
        called.append(args[-1])
        return SimpleNamespace(accuracy=1.0, model=None, top_shares={}, methods=args[-1])

    monkeypatch.setattr(study_module, "prepare", prepare)
    monkeypatch.setattr(study_module, "share_of_negative_scores", lambda *_: 0.5)
    monkeypatch.setattr(
        study_module, "measure", lambda subject, *_: {m: {key: [2.0] for key in subject.methods} for m in MEASURES}
    )
    kept = {"measured": {measure: {"gradient-x-input": [1.0]} for measure in MEASURES}}
    (tmp_path / "ViT-0.json").write_text(json.dumps(kept))
    data = {"test": (np.zeros((3, 28, 28)), np.zeros(3))}
    for _ in range(2):
        found = study_module.study("ViT", 0, data, tmp_path)
        assert found["measured"]["pointing"] == {
            "gradient-x-input": [1.0], **{key: [2.0] for key in name_methods("ViT")[1:]}
        }  # fmt: skip
    assert called == [name_methods("ViT")[1:]]


def test_the_best_gamma_is_chosen_for_each_measure() -> None:
    runs = [
        {
            "degradation": {"ours": [0.2, 0.4], "AttnLRP 1 1": [0.1, 0.1], "AttnLRP 2 2": [value, 0.5]},
            "pointing": {"ours": [0.5, 0.5], "AttnLRP 1 1": [0.9, 0.9], "AttnLRP 2 2": [0.0, 0.0]},
        }
        for value in (0.1, 0.3)
    ]
    found = summarize(runs)
    assert found["degradation"]["ours"] == (pytest.approx(0.3), 0.0)
    assert found["degradation"]["AttnLRP, best γ"] == (pytest.approx(0.35), pytest.approx(0.05))
    assert found["pointing"]["AttnLRP, best γ"] == (pytest.approx(0.9), 0.0)
    assert found["pointing"]["AttnLRP, worst γ"] == (0.0, 0.0)
