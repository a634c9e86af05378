"""The XAI-TRIS benchmark: its images, its measures and its models."""

import itertools

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.optimize import linear_sum_assignment, linprog
from scipy.stats import wasserstein_distance
from torch import Tensor

from benchmarks.xai_tris import data, models, study
from benchmarks.xai_tris.measures import earth_movers_accuracy, precision, transport_cost

CELLS = [(scenario, background) for scenario in data.ALPHAS for background in data.BACKGROUNDS]
FIXED = [scenario for scenario in data.ALPHAS if scenario != "translations-rotations"]
DIAGONAL = 128**0.5


def draw(scenario: str, background: str = "WHITE", count: int = 400, seed: int = 0) -> data.Samples:
    return data.draw_samples(scenario, background, torch.Generator().manual_seed(seed), count)


def mask_of(*pixels: tuple[int, int]) -> Tensor:
    mask = torch.zeros(data.SIDE, data.SIDE, dtype=torch.bool)
    for row, column in pixels:
        mask[row, column] = True
    return mask


T_PIXELS, L_PIXELS = mask_of((1, 1), (2, 1), (2, 2), (3, 1)), mask_of((4, 5), (5, 5), (6, 5), (6, 6))


# --- images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scenario", "background"), CELLS)
def test_samples_are_balanced_bounded_and_reproducible(scenario: str, background: str) -> None:
    samples = draw(scenario, background)
    assert samples.images.shape == (400, 1, 8, 8)
    assert samples.images.abs().max() == 1
    assert samples.labels.bincount().tolist() == [200, 200]
    again, other = draw(scenario, background), draw(scenario, background, seed=1)
    assert torch.equal(samples.images, again.images)
    assert torch.equal(samples.labels, again.labels)
    assert not torch.equal(samples.images, other.images)


@pytest.mark.parametrize("scenario", ["linear", "multiplicative"])
def test_mask_of_a_class_is_its_tetromino(scenario: str) -> None:
    samples = draw(scenario)
    assert (samples.own[samples.labels == 0] == T_PIXELS).all()
    assert (samples.own[samples.labels == 1] == L_PIXELS).all()
    assert (samples.both == (T_PIXELS | L_PIXELS)).all()


def test_tetrominoes_are_everywhere_and_in_all_rotations() -> None:
    samples = draw("translations-rotations", count=2000)
    assert torch.equal(samples.own, samples.both)
    assert (samples.own.sum((1, 2)) == 4).all()
    for label, tetromino in ((0, data.T), (1, data.L)):
        own = samples.own[samples.labels == label]
        assert own.any(0).all()
        found = {crop(mask) for mask in own}
        assert found == {crop(torch.rot90(tetromino, turns) > 0) for turns in range(4)}


def crop(mask: Tensor) -> tuple[tuple[bool, ...], ...]:
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return tuple(map(tuple, mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].tolist()))


def test_signs_of_xor_agree_in_class_0_and_differ_in_class_1() -> None:
    labels = draw("XOR").labels
    signals = data.draw_signals("XOR", labels, torch.Generator().manual_seed(0))
    t, l_ = signals[:, 2, 1], signals[:, 5, 5]
    assert torch.equal(t * l_, 1 - 2 * labels.double())
    counts = [int(((t == a) & (l_ == b)).sum()) for a, b in itertools.product((1, -1), repeat=2)]
    assert counts == [100, 100, 100, 100]
    assert (signals[:, T_PIXELS] == t[:, None]).all()
    assert (signals[:, ~(T_PIXELS | L_PIXELS)] == 0).all()


def test_parts_of_a_mixture_have_frobenius_norms_alpha_and_one_minus_alpha() -> None:
    signals = data.draw_signals("linear", torch.arange(100) % 2, torch.Generator())
    noise = data.draw_backgrounds("WHITE", 100, torch.Generator().manual_seed(0))
    mixed = data.mix("linear", signals, noise, 0.18)
    background = 0.82 * noise / noise.norm()
    torch.testing.assert_close((mixed - background).norm(), torch.tensor(0.18, dtype=torch.float64))
    torch.testing.assert_close(background.norm(), torch.tensor(0.82, dtype=torch.float64))
    torch.testing.assert_close((mixed - background)[0][T_PIXELS], torch.full((4,), 0.18 / 20, dtype=torch.float64))


def test_multiplicative_signal_attenuates_the_background_on_its_pixels() -> None:
    signals = data.draw_signals("multiplicative", torch.arange(100) % 2, torch.Generator())
    noise = data.draw_backgrounds("WHITE", 100, torch.Generator().manual_seed(0))
    ratio = data.mix("multiplicative", signals, noise, 0.7) / noise
    ratio = ratio / ratio.max()
    torch.testing.assert_close(ratio, 1 - 0.7 * signals)


def test_correlated_background_is_each_image_smoothed() -> None:
    white, smooth = (data.draw_backgrounds(name, 3, torch.Generator().manual_seed(0)) for name in data.BACKGROUNDS)
    for noise, image in zip(white, smooth):
        np.testing.assert_allclose(image.numpy(), gaussian_filter(noise.numpy(), 3.0))


def test_split_is_disjoint_and_balanced() -> None:
    samples = draw("linear", count=1000)
    split = data.split_samples(samples)
    parts = [split.training, split.validation, split.test]
    assert [len(part) for part in parts] == [900, 50, 50]
    assert all(part.labels.bincount().tolist() == [len(part) // 2] * 2 for part in parts)
    assert len(torch.cat([part.images for part in parts]).unique(dim=0)) == 1000


# --- measures -------------------------------------------------------------------------------------


def test_precision_counts_the_largest_pixels_on_the_mask() -> None:
    heat = torch.zeros(1, 8, 8)
    heat[0, 1, 1], heat[0, 2, 1], heat[0, 7, 7], heat[0, 0, 0] = 4.0, 3.0, 2.0, 1.0
    assert precision(heat, T_PIXELS[None]).item() == 0.5
    assert precision(heat, (T_PIXELS | L_PIXELS)[None]).item() == 0.25  # pixels of heat 0 are not marked
    assert precision(T_PIXELS[None].double(), T_PIXELS[None]).item() == 1


def test_accuracy_is_1_on_the_mask_and_the_distance_of_a_single_pixel_by_hand() -> None:
    heats = torch.stack([T_PIXELS.double(), torch.zeros(8, 8).double()])
    heats[1, 0, 0] = 5.0
    found = earth_movers_accuracy(heats, T_PIXELS.expand(2, 8, 8))
    by_hand = (2**0.5 + 5**0.5 + 8**0.5 + 10**0.5) / 4
    torch.testing.assert_close(found, torch.tensor([1, 1 - by_hand / DIAGONAL], dtype=torch.float64))


def test_heat_of_zeros_counts_as_uniform() -> None:
    heats = torch.stack([torch.zeros(8, 8), torch.ones(8, 8)])
    one, other = earth_movers_accuracy(heats, T_PIXELS.expand(2, 8, 8))
    assert one == other < 1


def test_distance_on_a_line_is_that_of_scipy() -> None:
    positions = np.array([0, 2, 3, 7])
    line = torch.rand(20, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    mask = torch.zeros(20, 1, 8, dtype=torch.bool)
    mask[:, 0, positions] = True
    found = earth_movers_accuracy(line[:, None], mask)
    expected = [1 - wasserstein_distance(np.arange(8), positions, row.numpy()) / 65**0.5 for row in line]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_transport_of_equal_masses_is_the_best_assignment() -> None:
    generator = torch.Generator().manual_seed(0)
    points, goals = (torch.rand(30, 6, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    distances = torch.cdist(points, goals)
    found = transport_cost(torch.full((30, 6), 1 / 6, dtype=torch.float64), distances)
    expected = [d.numpy()[linear_sum_assignment(d.numpy())].mean() for d in distances]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("mask", [T_PIXELS, T_PIXELS | L_PIXELS])
def test_earth_movers_accuracy_equals_the_optimum_of_a_linear_program(mask: Tensor) -> None:
    heats = torch.rand(5, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 4
    heats[:, ::3] = 0
    pixels = np.stack(np.meshgrid(range(8), range(8), indexing="ij"), -1).reshape(64, 2)
    goals = pixels[mask.flatten().numpy()]
    distances = np.linalg.norm(pixels[:, None] - goals[None], axis=2)
    count = len(goals)
    flows = np.concatenate([np.kron(np.eye(64), np.ones(count)), np.kron(np.ones(64), np.eye(count))])
    for heat, found in zip(heats, earth_movers_accuracy(heats.view(5, 8, 8), mask.expand(5, 8, 8))):
        amounts = np.concatenate([(heat / heat.sum()).numpy(), np.full(count, 1 / count)])
        expected = linprog(distances.flatten(), A_eq=flows[:-1], b_eq=amounts[:-1])
        assert abs(1 - expected.fun / DIAGONAL - found) < 1e-6


# --- models ---------------------------------------------------------------------------------------


def test_models_have_the_layers_of_the_paper() -> None:
    weights = {
        name: [tuple(p.shape) for p in make().parameters() if p.dim() > 1] for name, make in models.MODELS.items()
    }
    assert weights["MLP"] == [(32, 64), (16, 32), (8, 16), (2, 8)]
    assert weights["CNN"] == [(4, 1, 2, 2), (4, 4, 2, 2), (4, 4, 2, 2), (4, 4, 2, 2), (2, 4)]
    assert weights["MLP-GELU"] == weights["MLP"]
    assert all(make()(torch.zeros(3, 1, 8, 8)).shape == (3, 2) for make in models.MODELS.values())


@pytest.mark.full
@pytest.mark.parametrize(
    "architecture", [pytest.param(n, marks=() if n == "MLP" else pytest.mark.slow) for n in models.MODELS]
)
def test_trained_models_are_scored(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "EPOCHS", 3)
    splits = [data.split_samples(draw("linear", count=1000, seed=seed)) for seed in range(2)]
    trained = models.train(architecture, splits, 0)
    again = models.train(architecture, splits, 0)
    for one, other, split in zip(trained, again, splits):
        assert torch.equal(one.model(split.test.images), other.model(split.test.images))
        assert 1 <= one.epoch <= 3
    assert not torch.equal(*(one.model(splits[0].test.images) for one in trained))
    fitted, few = study.fit(trained[0].model, splits[0]), splits[0].test.select(torch.arange(6))
    maps = study.explain(fitted, few, [*study.METHODS, *study.BASELINES, "lrp-z"])
    torch.testing.assert_close(maps["lrp-z"], maps["gradient-x-input"], rtol=0, atol=1e-2)
    torch.testing.assert_close(maps["signal:identity"], few.images[:, 0].abs())
    for heat in maps.values():
        scores = study.score(heat, few)
        assert heat.shape == (6, 8, 8)
        assert scores.shape == (len(study.MEASURES),)
        assert ((scores >= 0) & (scores <= 1)).all()


@pytest.mark.full
def test_difference_of_scores_is_explained_as_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "EPOCHS", 2)
    split = data.split_samples(draw("linear", count=1000))
    (trained,) = models.train("MLP", [split], 0)
    fitted, few = study.fit(trained.model, split), split.test.select(torch.arange(4))
    found = study.explain(fitted, few, ["gradient"], difference=True)["gradient"]
    x = few.images.clone().requires_grad_()
    scores = trained.model(x)
    picked = scores.gather(1, few.labels[:, None])[:, 0]
    (expected,) = torch.autograd.grad((2 * picked - scores.sum(1)).sum(), x)
    torch.testing.assert_close(found, expected[:, 0].abs())
