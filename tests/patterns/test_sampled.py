"""Moments from sampled positions: exactly those of the sampled positions, and in expectation those of all."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from patterns import Observer, PatchObserver, UserError, accumulate, solve, trace
from patterns.estimation.observer import to_channels_last
from patterns.moments import sampled
from patterns.moments.moments import RequiredSums
from patterns.moments.position_sampling import PositionSampler
from patterns.moments.sampled import SampledAccumulator
from patterns.operators.operator import Addition
from tests.oracles import Neuron
from tests.patterns.gram import CASES, SCALES, Case, drawn

TYPES = CASES | SCALES


def of_drawn(case: Case, inputs: tuple[Tensor, ...], positions: int) -> list[Neuron]:
    """Return the neurons' samples at the sampled positions."""
    z = case.operator(*inputs)
    available = z[0].numel() // case.operator.neurons
    taken = drawn(torch.arange(len(z)), "it", available, positions, seed=7)
    rows = [image * available + int(p) for image, own in enumerate(taken) for p in own]
    return [Neuron(n.x[rows], n.y[rows], n.open[rows]) for n in case.neurons(inputs)]


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(("block", "products"), [(1, 1), (5, 2**19), (10**6, 60)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_sums_are_those_of_the_sampled_positions(
    name: str, block: int, products: int, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampled, "BLOCK_LIMITS", ((block, 2**23),) * 2)
    monkeypatch.setattr(sampled, "PRODUCT_ELEMENTS", (products, products))
    case = TYPES[name]()
    inputs = tuple(x.contiguous(memory_format=layout) if x.dim() == 4 else x for x in case.inputs(5, 1))
    draw = PositionSampler(2, seed=7)
    accumulator = SampledAccumulator(case.operator, RequiredSums(), draw)
    for at in (slice(0, 3), slice(3, 5)):
        part = tuple(x[at] for x in inputs)
        draw.start_pass(torch.arange(5)[at])
        accumulator.update(part, case.operator(*part))
    found, truth = accumulator.moments(), of_drawn(case, inputs, 2)
    assert {name: t.dtype for name, t in found.tensors().items() if t.dtype != torch.float64}.keys() <= {
        "total.n",
        "open.n",
    }
    for which, sums in (("total", found.total), ("open", found.open)):
        assert sums is not None
        assert sums.x is not None
        assert sums.xy is not None
        x = sums.x.repeat_interleave(len(truth) // len(sums.x), 0)
        for k, neuron in enumerate(truth):
            expected = neuron.sums(which)
            assert sums.n[k] == expected["n"]
            for field, value in (("y", sums.y), ("yy", sums.yy), ("x", x), ("xy", sums.xy)):
                torch.testing.assert_close(value[k], expected[field], rtol=1e-9, atol=1e-9)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.next = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.next(F.relu(self.stem(x)))).mean((2, 3)))


def images(count: int) -> Tensor:
    """Smooth images, like photographs: neighboring positions have similar inputs."""
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return F.interpolate(coarse, size=(16, 16), mode="bilinear") + 0.3


def patterns_of(positions: int | None, x: Tensor, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(3)
    network = trace(Small().double(), x[:1])
    observer = Observer(network, positions=positions, seed=seed)
    for batch in x.split(16):
        observer.update(batch)
    moments = observer.moments()
    choices = ["linear", "two-component"]
    return {
        f"{name}/{row}": pattern.double()
        for name, op in network.operators.items()
        for row, pattern in solve(op, moments[name], choices).patterns.items()
        if name in {"stem", "next"}
    }


def of_neurons(found: Tensor, expected: Tensor) -> Tensor:
    """Return the relative error of each neuron; it is large if the denominator nearly vanishes."""
    return (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)


@pytest.mark.full
def test_errors_fall_like_those_of_an_unbiased_estimate() -> None:
    x = images(256)
    exact = patterns_of(None, x)
    errors: dict[int, dict[str, float]] = {}
    for positions in (4, 16, 64):
        found = [patterns_of(positions, x, seed) for seed in range(6)]
        errors[positions] = {
            name: float(torch.stack([of_neurons(f[name], pattern) for f in found]).median())
            for name, pattern in exact.items()
        }
        if positions == 16:  # the mean over draws has a smaller error than a draw, as for an unbiased estimate
            for name, pattern in exact.items():
                mean = torch.stack([f[name] for f in found]).mean(0)
                assert of_neurons(mean, pattern).median() < 0.7 * errors[positions][name], name
    for name in exact:
        few, some, many = (errors[p][name] for p in (4, 16, 64))
        # Four times the positions, half the error; drawing without replacement from 256 does better still.
        assert 0.3 * few < some < 0.75 * few, (name, errors)
        assert 0.2 * some < many < 0.6 * some, (name, errors)


@pytest.mark.full
def test_sampling_all_positions_equals_using_all_positions() -> None:
    x = images(8)
    exact, found = patterns_of(None, x), patterns_of(256, x)
    for name, pattern in exact.items():
        assert torch.equal(found[name], pattern)


@pytest.mark.full
def test_order_and_batches_change_only_the_last_digits() -> None:
    x = images(24)
    network = trace(Small().double(), x[:1])
    seeds, order = list(range(100, 124)), torch.randperm(24, generator=torch.Generator().manual_seed(0))
    whole, cut = Observer(network, positions=5), Observer(network, positions=5)
    whole.update(x, seeds)
    for part in order.split(7):
        cut.update(x[part], [seeds[i] for i in part])
    for name, moments in whole.moments().items():
        for field, value in moments.tensors().items():
            torch.testing.assert_close(cut.moments()[name].tensors()[field], value, rtol=1e-10, atol=1e-9)


@pytest.mark.full
def test_layers_with_few_positions_are_summed_exactly() -> None:
    x = images(8)
    network = trace(Small().double(), x[:1])
    exact = accumulate(network, [to_channels_last(x)])["head"]
    observer = Observer(network, positions=3)
    observer.update(x)
    for field, value in replace(exact).tensors().items():
        assert torch.equal(observer.moments()["head"].tensors()[field], value)


@pytest.mark.full
def test_a_reset_drops_gathered_samples() -> None:
    x = images(4)
    network = trace(Small().double(), x[:1])
    observer = Observer(network, positions=3)
    observer.update(x)
    observer.reset()
    assert int(observer.moments()["stem"].total.n.sum()) == 0


class Mixed(nn.Module):
    """A half precision model that adds in float32 values beyond the range of half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        return (z + z.float() * 1e5).mean((2, 3))


@pytest.mark.full
def test_terms_of_two_precisions_keep_the_wider_range() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 2, 6, 6, dtype=torch.float16)
    network = trace(Mixed().half(), x)
    (name,) = [name for name, op in network.operators.items() if isinstance(op.operator_type, Addition)]
    observer = Observer(network, operators=[name], positions=30)
    observer.update(x)
    total = observer.moments()[name].total
    assert total.x is not None
    narrow, wide = total.x.unbind(1)
    torch.testing.assert_close(wide, 1e5 * narrow, rtol=1e-5, atol=1.0)


@pytest.mark.parametrize("channels", [1, 3])
def test_outputs_of_convolutions_on_a_cpu_are_in_channels_last(channels: int) -> None:
    z = nn.Conv2d(channels, 8, 3)(to_channels_last(torch.randn(2, channels, 6, 6)))
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert not z.is_contiguous()


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_differ_from_float64_by_rounding_only(dtype: torch.dtype) -> None:
    x = images(16)
    torch.manual_seed(3)
    model = Small()
    found = {}
    for at in (dtype, torch.float64):  # narrower first, so that both have the same weights
        network = trace(model.to(at), x[:1].to(at))
        observer = Observer(network, positions=16)
        observer.update(x.to(dtype).to(at))
        found[at] = observer.moments()
    for name in ("stem", "next"):
        exact, half = (found[at][name].total for at in (torch.float64, dtype))
        for field in ("y", "yy", "x", "xy"):
            truth, value = getattr(exact, field), getattr(half, field)
            assert (value - truth).norm() < 0.02 * truth.norm(), (name, field)


class Windows(nn.Module):
    """Linear layers over rectified windows of 4 × 4 positions, and over tokens before images."""

    def __init__(self) -> None:
        super().__init__()
        self.of_windows, self.of_tokens, self.of_images = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        windows = x.unflatten(2, (2, 4)).unflatten(4, (2, 4)).permute(0, 2, 4, 3, 5, 1).flatten(0, 2).flatten(1, 2)
        tokens = self.of_windows(windows.relu()).relu().reshape(x.shape[0], 64, 5).transpose(0, 1)
        return self.of_images(self.of_tokens(tokens).relu().transpose(0, 1)).mean(1)


@pytest.mark.full
@pytest.mark.cases
@pytest.mark.parametrize("positions", [3, 20])
@pytest.mark.parametrize("images", [1, 4, 64])
def test_all_positions_are_used_if_images_are_not_the_first_dimension(positions: int, images: int) -> None:
    torch.manual_seed(0)
    network = trace(Windows().double(), torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    observer = Observer(network, positions=positions)
    x = torch.randn(images, 3, 8, 8, dtype=torch.float64)
    observer.update(x)
    exact, found = accumulate(network, [x]), observer.moments()
    for name in ("of_images", "of_tokens"):
        assert found[name].total.n[0] == positions * images
    for field, sums in exact["of_windows"].tensors().items():
        torch.testing.assert_close(found["of_windows"].tensors()[field], sums, msg=field)
    with pytest.raises(UserError, match="windows or tokens") as caught:
        PatchObserver(network, ["of_images", "of_windows"], positions)
    assert (caught.value.where, caught.value.parameter) == ("of_windows", "operators")


class TokensFirst(nn.Module):
    """The same linear layer on tokens before images, on both in one dimension, and on images before tokens."""

    def __init__(self, order: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.order, self.inner, self.out = order, nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        if self.order == "tokens first":
            found = self.inner(tokens.transpose(0, 1)).relu().transpose(0, 1)
        elif self.order == "one dimension, tokens first":
            found = self.inner(tokens.transpose(0, 1).reshape(-1, 6)).relu().view(16, -1, 5).transpose(0, 1)
        elif self.order == "one dimension, images first":
            found = self.inner(tokens.reshape(-1, 6)).relu().view(-1, 16, 5)
        elif self.order == "heads":
            heads = tokens.unflatten(2, (2, 3)).permute(2, 1, 0, 3).relu().permute(1, 2, 0, 3).contiguous()
            found = self.inner(heads.view(-1, 6)).relu().view(16, -1, 5).transpose(0, 1)
        else:
            found = self.inner(tokens).relu()
        return self.out(found.mean(1))


@pytest.mark.parametrize(
    "order", ["tokens first", "one dimension, tokens first", "one dimension, images first", "heads"]
)
def test_positions_of_tokens_before_images_are_those_of_tokens_after_them(order: str) -> None:
    x = torch.rand(5, 6, 4, 4, dtype=torch.float64)
    sums, outputs = [], []
    for each in (order, "images first"):
        network = trace(TokensFirst(each).double(), x)
        observer = Observer(network, positions=3, seed=2)
        observer.update(x, range(5))
        sums.append(observer.moments()["inner"])
        outputs.append(network.module(x))
    assert sums[0].total.n[0] == 15
    for field, value in sums[1].tensors().items():
        torch.testing.assert_close(sums[0].tensors()[field], value)
    torch.testing.assert_close(*outputs)


@pytest.mark.full
def test_attention_of_torch_has_the_moments_of_all_tokens() -> None:
    model = models.VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=5).double()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    network = trace(model, x)
    assert all(operator.per_image for operator in network.operators.values())
    observer = Observer(network, positions=16)  # of 17
    observer.update(x)
    exact, found = accumulate(network, [x]), observer.moments()
    attention = [name for name in exact if "self_attention" in name]
    assert len(attention) == 2
    for name in attention:
        assert (int(exact[name].total.n[0]), int(found[name].total.n[0])) == (51, 48)
    (projection,) = (name for name in attention if "in_proj" in name)
    tokens = normalized_tokens(model, x)
    torch.testing.assert_close(exact[projection].total.x, tokens.sum(0)[None], rtol=1e-9, atol=1e-9)


def normalized_tokens(model: nn.Module, x: Tensor) -> Tensor:
    """Return what the first attention of a VisionTransformer gets, (tokens of all images, channels)."""
    found: list[Tensor] = []
    hook = model.encoder.layers[0].ln_1.register_forward_hook(lambda module, inputs, output: found.append(output))
    model(x)
    hook.remove()
    return found[0].detach().flatten(0, 1)
