"""The study of VGG-16 on a small network and made-up photographs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.paper import convergence, maps, photographs, quality
from benchmarks.paper.__main__ import measure, tabulate_quality
from patterns import Network, accumulate_patches, solve, trace
from patterns import quality as patterns_quality
from ray_jobs.config import ModelConfig, Preprocessing
from ray_jobs.models.loading import LoadedModel

PREPROCESSING = Preprocessing(
    image_size=24, resize=24, interpolation="bilinear", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)
)
SIZES = quality.Sizes(crops=2, positions=8, regressed_positions=12)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    generator = np.random.default_rng(0)
    paths = [tmp_path / f"{number}.png" for number in range(14)]
    for path in paths:
        Image.fromarray(generator.integers(0, 256, (30, 40, 3), np.uint8)).save(path)
    return paths


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3, padding=1), nn.ReLU()
    return trace(nn.Sequential(*layers), torch.zeros(1, 3, 24, 24)).until("3")


def test_sets_are_disjoint_and_hold_every_photograph(files: list[Path]) -> None:
    sets = photographs.split_photographs(files)
    assert sorted([*sets.fitted, *sets.regressed, *sets.evaluated]) == sorted(files)
    assert [len(v) for v in (sets.fitted, sets.regressed, sets.evaluated)] == [4, 6, 4]


def test_crops_follow_from_the_photograph_and_the_seed_alone(files: list[Path]) -> None:
    torch.manual_seed(1)
    first, second = photographs.draw_crops(files[:2], 2, PREPROCESSING)
    torch.manual_seed(2)
    (again,) = photographs.draw_crops(files[1:2], 2, PREPROCESSING)
    (other,) = photographs.draw_crops(files[1:2], 2, PREPROCESSING, seed=1)
    assert first.shape == (2, 3, 24, 24)
    assert torch.equal(second, again)
    assert not torch.equal(second, other)


def test_large_photograph_is_reduced_in_proportion(tmp_path: Path) -> None:
    Image.new("RGB", (2000, 1024)).save(tmp_path / "large.png")
    assert photographs.load_image(tmp_path / "large.png").shape == (3, 512, 1000)


def test_denormalization_inverts_normalization(files: list[Path]) -> None:
    image = photographs.load_image(files[0])
    returned = photographs.denormalize(photographs.normalize(image, PREPROCESSING), PREPROCESSING)
    torch.testing.assert_close(returned, image)


@pytest.mark.full
def test_quality_is_that_of_the_library(files: list[Path], network: Network, tmp_path: Path) -> None:
    sets, names = photographs.split_photographs(files), list(network.operators)
    fitted = quality.fit_moments(network, sets.fitted, SIZES, PREPROCESSING)
    regressed = quality.gather_patches(network, sets.regressed, 12, SIZES, PREPROCESSING)
    evaluated = quality.gather_patches(network, sets.evaluated, 8, SIZES, PREPROCESSING)
    quality.save_patches(regressed, tmp_path / "b")
    quality.save_patches(evaluated, tmp_path / "c")
    judged = dict(quality.judge(network, fitted, tmp_path / "b", tmp_path / "c", 54))
    crops = {name: photographs.draw_crops(paths, 2, PREPROCESSING) for name, paths in vars(sets).items()}
    b = accumulate_patches(network, crops["regressed"], names, 12)
    c = accumulate_patches(network, crops["evaluated"], names, 8)
    for name, operator in network.operators.items():
        solution = solve(operator, fitted[name], quality.ESTIMATORS)
        expected = patterns_quality(solution.patterns, operator.weight, b[name], c[name])
        for estimator in quality.ESTIMATORS:
            torch.testing.assert_close(judged[name].rho[estimator], expected[estimator], equal_nan=True)
            assert torch.all(judged[name].same_set[estimator].nan_to_num(0) <= 1)
        assert judged[name].samples == 6 * 2 * 12


@pytest.mark.full
def test_layers_with_too_many_inputs_are_left_out(files: list[Path], network: Network) -> None:
    sizes = quality.Sizes(crops=1, inputs=27)
    assert list(quality.gather_patches(network, files[:1], 4, sizes, PREPROCESSING)) == ["0"]


def test_table_names_the_layers_of_vgg() -> None:
    rho = dict.fromkeys(quality.ESTIMATORS, torch.tensor([0.25, torch.nan, 0.75, 0.5]))
    (row,) = tabulate_quality({"28": quality.Judged(rho, rho, 9216, 4608)}).rows
    assert row == ["conv5_3", 4608, "2.0", *[0.5] * 4, [0.5, 0.5]]


@pytest.mark.full
def test_maps_are_of_the_strongest_channel(files: list[Path], network: Network) -> None:
    fitted = quality.fit_moments(network, files, SIZES, PREPROCESSING)
    patterns = maps.fit_patterns(network, fitted)
    (row,) = maps.explain_photographs(network, patterns, files[:1], PREPROCESSING, maps.METHODS)
    outputs = network.module(photographs.load_whole(files[0], PREPROCESSING)[None])
    assert row.caption == f"channel {int(outputs[0].sum((1, 2)).argmax())}"
    assert list(row.maps) == list(maps.METHODS)


@pytest.mark.full
def test_ratios_of_known_singular_values() -> None:
    torch.manual_seed(0)
    network = trace(nn.Conv2d(2, 2, 1, bias=False), torch.zeros(1, 2, 4, 4))
    (name, operator), *_ = network.operators.items()
    w, a = operator.weight.flatten(1), torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    patterns = {key: {name: a.view_as(operator.weight)} for key in convergence.ESTIMATORS}
    found = convergence.measure_singular_ratios(network, patterns)
    for label, matrix in (("w", w), ("a", a), ("w⊙a", w * a), ("w⊙a, center", w * a)):
        eigenvalues = np.linalg.eigvalsh((matrix.T @ matrix).double().numpy())
        assert found[label][name] == pytest.approx((eigenvalues[1] / eigenvalues[0]) ** 0.5, rel=1e-5)
    product = w * a
    share = float(product[product < 0].abs().sum() / product.abs().sum())
    assert convergence.measure_negative_shares(network, patterns["linear"])[name] == pytest.approx(share)


@pytest.mark.full
def test_study_writes_every_table_and_figure(files: list[Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1), nn.ReLU())
    config = ModelConfig(spec="made:up")
    loaded = LoadedModel(config, model.eval(), PREPROCESSING, "", torch.device("cpu"), torch.float32)
    docs = tmp_path / "docs"
    docs.mkdir()
    measure(loaded, "2", photographs.split_photographs(files), SIZES, docs)
    results = {"paper-quality", "paper-photographs", "paper-convergence", "paper-singular-ratios"}
    assert {path.stem for path in (docs / "results").iterdir()} == results
    pictures = {f"vgg16-{name}.png" for name in ("quality", "signals", "estimators", "convergence")}
    assert {path.name for path in docs.glob("*.png")} == pictures
