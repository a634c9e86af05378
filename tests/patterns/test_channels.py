"""Relevance of channels against autograd with hooks, its conservation, and the same numbers if compiled or scaled."""

import shutil
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patterns import Explainer, UserError, trace
from patterns.attribution import backward_weights, list_last_of_resolutions
from patterns.attribution.channels import Channels
from tests.patterns.networks import relative

METHODS = ("patternattribution", "gradient-x-input")


class Branched(nn.Module):
    """A network with a residual branch, a layer that is called twice, a smooth gate, pooling and a dense end."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1, bias=bias)
        self.twice = nn.Conv2d(6, 6, 3, padding=1, bias=bias)
        self.down = nn.Conv2d(6, 4, 3, stride=2, bias=bias)
        self.hidden = nn.Linear(4 * 9, 7, bias=bias)
        self.last = nn.Linear(7, 5, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = self.twice(F.silu(self.twice(x)) if self.last.bias is not None else self.twice(x).relu()).relu()
        x = F.max_pool2d(self.down(x).relu(), 1)
        return self.last(self.hidden(x.flatten(1)).relu())


def draw_images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def make_model(bias: bool) -> Branched:
    torch.manual_seed(2)
    return Branched(bias).double()


class Hooked:
    """A model whose layers have backward weights by a detached difference; keeps each call's output and gradient."""

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self.outputs: dict[str, list[Tensor]] = {}
        self.inputs: dict[str, Tensor] = {}
        for name, layer in model.named_children():
            layer.forward = self.replace(name, layer, weights[name])  # type: ignore[assignment]

    def replace(self, name: str, layer: nn.Module, weight: Tensor):  # type: ignore[no-untyped-def]
        def apply(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
            if isinstance(layer, nn.Linear):
                return F.linear(x, w, bias)
            return F.conv2d(x, w, bias, layer.stride, layer.padding)  # type: ignore[arg-type]

        def forward(x: Tensor) -> Tensor:
            back = apply(x, weight, None)
            z = back + (apply(x, layer.weight, layer.bias) - back).detach()  # type: ignore[arg-type]
            z.retain_grad()
            self.outputs.setdefault(name, []).append(z)
            self.inputs[name] = x.detach()
            return z

        return forward


def draw_patterns(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {name: layer.weight for name, layer in model.named_children()}
    return {name: torch.randn(w.shape, generator=generator, dtype=w.dtype) for name, w in shapes.items()}  # type: ignore[union-attr, call-overload, arg-type]


def expected_channels(model: Branched, weights: Mapping[str, Tensor], from_value: bool) -> Hooked:
    hooked = Hooked(model, weights)
    scores = model(draw_images().requires_grad_())
    chosen = scores[:, 2]
    (chosen * (chosen.detach() if from_value else 1)).sum().backward()
    return hooked


@pytest.mark.parametrize("method", METHODS)
def test_channels_are_those_of_autograd_with_hooks(method: str) -> None:
    model, patterns = make_model(True), draw_patterns(make_model(True))
    network = trace(make_model(True), draw_images(2))
    found = Explainer(network, patterns, [method], channels=list(patterns))(draw_images(), 2).channels
    assert found is not None
    attribution = method == "patternattribution"
    weights = {name: layer.weight.detach() * (patterns[name] if attribution else 1.0)  # type: ignore[operator, union-attr]
               for name, layer in model.named_children()}  # fmt: skip
    model.forward = detached_silu(model)  # type: ignore[method-assign]
    hooked = expected_channels(model, weights, attribution)
    for name, outputs in hooked.outputs.items():
        sums = [z.grad * (1.0 if attribution else z.detach()) for z in outputs]  # type: ignore[operator]
        relevance = torch.stack([each.flatten(2).sum(2) if each.dim() > 2 else each for each in sums]).sum(0)
        assert relative(found.relevance[method][name], relevance) < 1e-10, name
    for name in ("first", "down", "hidden"):
        z = hooked.outputs[name][0].detach().relu()
        torch.testing.assert_close(found.activation[name], z.flatten(2).amax(2) if z.dim() > 2 else z)
    one, two = (z.detach() for z in hooked.outputs["twice"])
    largest = torch.maximum(one, two).flatten(2).amax(2)  # its calls have different gates, so it has none
    torch.testing.assert_close(found.activation["twice"], largest)
    torch.testing.assert_close(found.embedding, hooked.inputs["last"])


def detached_silu(model: Branched):  # type: ignore[no-untyped-def]
    """Return the forward pass in which the SiLU passes z times its detached factor, and relevance by that factor."""

    def forward(x: Tensor) -> Tensor:
        x = model.first(x).relu()
        z = model.twice(x)
        x = model.twice(z * torch.sigmoid(z).detach()).relu()
        return model.last(model.hidden(model.down(x).relu().flatten(1)).relu())

    return forward


@pytest.mark.parametrize("method", METHODS)
def test_sums_over_channels_are_the_score_down_the_network_without_biases(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backward_weights, "EPSILON", 0.0)
    network = trace(make_model(False), draw_images(2))
    one_call = [name for name in network.operators if name != "twice"]  # a sum over two calls counts relevance twice
    explainer = Explainer(network, dict.fromkeys(network.operators), [method], channels=one_call)
    explanation = explainer(draw_images(), torch.tensor([0, 1, 2, 3]))
    scores = explanation.scores[range(4), range(4)]
    assert explanation.channels is not None
    for name, relevance in explanation.channels.relevance[method].items():
        assert relative(relevance.sum(1), scores) < 1e-10, name
    assert relative(explanation.maps[method].flatten(1).sum(1), scores) < 1e-10


def test_maps_are_the_same_and_several_targets_are_stacked() -> None:
    network, patterns = trace(make_model(True), draw_images(2)), draw_patterns(make_model(True))
    plain = Explainer(network, patterns, METHODS)(draw_images(), torch.tensor([[0, 1]]).expand(4, -1))
    found = Explainer(network, patterns, METHODS, channels=["down"])(
        draw_images(), torch.tensor([[0, 1]]).expand(4, -1)
    )
    one = Explainer(network, patterns, METHODS, channels=["down"])(draw_images(), 1)
    assert plain.channels is None
    for method in METHODS:
        assert torch.equal(plain.maps[method], found.maps[method])
        of_both = found.channels.relevance[method]["down"]  # type: ignore[union-attr]
        assert of_both.shape == (4, 2, 4)
        torch.testing.assert_close(of_both[:, 1], one.channels.relevance[method]["down"])  # type: ignore[union-attr]


def test_scaled_passes_have_the_relevance_of_unscaled_ones() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (nn.Linear(8, 8), nn.ReLU())]
    network = trace(nn.Sequential(*layers, nn.Linear(8, 2)).double(), torch.zeros(2, 8, dtype=torch.float64))
    patterns = {name: op.weight * 1e6 for name, op in network.operators.items()}
    names = list(patterns)
    x = torch.ones(3, 8, dtype=torch.float64)
    explainer = Explainer(network, patterns, ["patternattribution"], channels=names)
    assert any(explainer.scales["patternattribution"])
    unscaled = Explainer(network, patterns, ["patternattribution"], {"patternattribution": []}, channels=names)
    found, expected = (each(x, 0).channels for each in (explainer, unscaled))
    assert isinstance(found, Channels)
    assert isinstance(expected, Channels)
    for name in names:
        one, other = (each.relevance["patternattribution"][name] for each in (found, expected))
        assert relative(one, other) < 1e-14, name


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_compiled_channels_are_those_of_uncompiled_passes() -> None:
    network, patterns = trace(make_model(True), draw_images(2)), draw_patterns(make_model(True))
    plain, compiled = (Explainer(network, patterns, METHODS, channels=["down", "hidden"]) for _ in range(2))
    compiled.compile(4)
    expected, found = plain(draw_images(), 2).channels, compiled(draw_images(), 2).channels
    assert isinstance(found, Channels)
    assert isinstance(expected, Channels)
    for method in METHODS:
        for name, relevance in expected.relevance[method].items():
            assert relative(found.relevance[method][name], relevance) < 1e-12
    for name, activation in expected.activation.items():
        assert relative(found.activation[name], activation) < 1e-12
    assert relative(found.embedding, expected.embedding) < 1e-12


def test_default_operators_are_the_last_of_each_resolution() -> None:
    assert list_last_of_resolutions(trace(make_model(True), draw_images(2))) == ("twice", "down", "hidden")


@pytest.mark.parametrize("method", ["patternnet", "guided-backprop", "lrp-z", "smoothgrad"])
def test_methods_without_relevance_at_hidden_units_are_an_error(method: str) -> None:
    network, patterns = trace(make_model(True), draw_images(2)), draw_patterns(make_model(True))
    with pytest.raises(UserError) as caught:
        Explainer(network, patterns, [method], channels=["down"])
    assert caught.value.parameter == "channels"
    with pytest.raises(UserError) as caught:
        Explainer(network, patterns, ["patternattribution"], channels=["nothing"])
    assert "'nothing'" in caught.value.what
