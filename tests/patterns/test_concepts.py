"""Directions of concepts against means, numpy, concept-erasure and repeated draws."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from patterns import Observer, UserError, trace
from patterns.estimation import solve_concepts
from patterns.moments import ConceptSums, has_concepts, zero_concept_sums
from tests.patterns.networks import relative
from tests.patterns.small import FunctionModel

COUNT = 60
SEEDS = list(range(1000, 1000 + COUNT))


def small_model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 5, 3), nn.GELU(), nn.Conv2d(5, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    return nn.Sequential(*layers).double().eval()


def draw() -> tuple[Tensor, Tensor]:
    """Return images, and two concepts: a number, and one that is present or absent."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(COUNT, 3, 8, 8, dtype=torch.float64, generator=generator)
    number = images[:, 0].mean((1, 2)) + 0.1 * torch.randn(COUNT, dtype=torch.float64, generator=generator)
    return images, torch.stack([number, (images[:, 1].mean((1, 2)) > 0).double()], 1)


def mean_outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the mean over positions of the output of each convolution and linear layer, (N, K), by hooks."""
    found: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, z, name=name: found.update({name: z.flatten(2).mean(2)}))
        if isinstance(module, nn.Conv2d)
        else module.register_forward_hook(lambda _, __, z, name=name: found.update({name: z}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return found


def observe(model: nn.Module, images: Tensor, concepts: Tensor, order: list[int], batch: int) -> dict[str, ConceptSums]:
    observer = Observer(trace(model, images[:2]), concepts=concepts.shape[1])
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        observer.update(images[chosen], [SEEDS[i] for i in chosen], concepts[chosen])
    return observer.concepts()


def test_direction_of_a_binary_concept_is_the_difference_of_means() -> None:
    model, (images, concepts) = small_model(), draw()
    found = observe(model, images, concepts, list(range(COUNT)), 7)
    present = concepts[:, 1] > 0
    for name, h in mean_outputs(model, images).items():
        expected = h[present].mean(0) - h[~present].mean(0)
        assert relative(solve_concepts(found[name]).directions[1], expected) < 1e-12, name


def test_direction_is_the_covariance_over_the_variance() -> None:
    model, (images, concepts) = small_model(), draw()
    found = observe(model, images, concepts, list(range(COUNT)), COUNT)
    for name, h in mean_outputs(model, images).items():
        solved = solve_concepts(found[name])
        for number, t in enumerate(concepts.T.numpy()):
            joint = np.cov(np.vstack([t, h.T.numpy()]))
            assert relative(solved.directions[number], torch.from_numpy(joint[0, 1:] / joint[0, 0])) < 1e-12
        assert solved.n == COUNT
        torch.testing.assert_close(solved.mean, concepts.mean(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(solved.variance, concepts.var(0, correction=0), rtol=1e-12, atol=0)


def test_direction_is_leaces_cross_covariance_over_the_variance() -> None:
    leace = pytest.importorskip("concept_erasure.leace", reason="needs concept-erasure: pip install concept-erasure")
    model, (images, concepts) = small_model(), draw()
    found = observe(model, images, concepts, list(range(COUNT)), 11)
    for name, h in mean_outputs(model, images).items():
        fitter = leace.LeaceFitter.fit(h, concepts)
        expected = fitter.sigma_xz.T / concepts.var(0)[:, None]
        assert relative(solve_concepts(found[name]).directions, expected) < 1e-12, name


def test_sums_depend_neither_on_the_order_nor_on_the_batches_and_add_up() -> None:
    model, (images, concepts) = small_model(), draw()
    whole = observe(model, images, concepts, list(range(COUNT)), COUNT)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(2)).tolist()
    parts = [observe(model, images, concepts, part, 4) for part in (order[:25], order[25:])]
    for name, sums in whole.items():
        total = parts[0][name] + parts[1][name]
        for field, expected in sums.tensors().items():
            torch.testing.assert_close(total.tensors()[field], expected, rtol=1e-12, atol=1e-13, msg=field)


def test_images_without_labels_count_for_moments_only() -> None:
    model, (images, concepts) = small_model(), draw()
    partly = concepts.clone()
    partly[10:20] = torch.nan
    observer = Observer(trace(model, images[:2]), concepts=2)
    observer.update(images, SEEDS, partly)
    kept = [i for i in range(COUNT) if not 10 <= i < 20]
    expected = observe(model, images, concepts, kept, COUNT)
    for name, sums in observer.concepts().items():
        torch.testing.assert_close(solve_concepts(sums).directions, solve_concepts(expected[name]).directions)
        assert solve_concepts(sums).n == 50
    assert int(observer.moments()["5"].total.n[0]) == COUNT


@pytest.mark.full
def test_planted_concept_is_found_among_larger_changes_that_do_not_depend_on_it() -> None:
    """A fifth of the images get faint stripes; the images differ much more in color, which reaches the same neurons."""
    generator = torch.Generator().manual_seed(3)
    count, model = 20_000, small_model()
    t = (torch.rand(count, 1, generator=generator) < 0.2).double()
    stripes = (
        0.5
        * torch.tensor([1.0, 1.0, 0.0, 0.0]).double().repeat(2).expand(3, 8, 8)
        * torch.rand(3, 1, 1, generator=generator, dtype=torch.float64)
    )
    color = torch.randn(count, 3, 1, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64)
    images = color + 0.5 * noise + t[:, :, None, None] * stripes
    observer = Observer(trace(model, images[:2]), concepts=1)
    for part in range(0, count, 500):
        observer.update(images[part : part + 500], list(range(part, part + 500)), t[part : part + 500])
    found = solve_concepts(observer.concepts()["0"]).directions[0]
    planted = nn.functional.conv2d(stripes, model[0].weight).mean((1, 2)).detach()
    cosine = nn.functional.cosine_similarity
    assert cosine(found, planted, 0) >= 0.99
    # The weights that tell the images apart best, the usual concept activation vector, turn away from the color.
    h = mean_outputs(model, images)["0"].numpy()
    weights = np.linalg.lstsq(h - h.mean(0), (t - t.mean()).numpy(), rcond=None)[0][:, 0]
    assert cosine(torch.from_numpy(weights), planted, 0) < 0.9


@pytest.mark.full
def test_standard_errors_are_those_of_repeated_draws() -> None:
    directions, errors = [], []
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        t = torch.rand(320, 1, generator=generator, dtype=torch.float64)
        h = t * torch.tensor([1.0, -2.0, 0.0]) + torch.randn(320, 3, generator=generator, dtype=torch.float64)
        sums = zero_concept_sums(1, 3)
        sums.add(t, h, torch.randint(16, (320,), generator=generator))
        solved = solve_concepts(sums)
        directions.append(solved.directions[0])
        errors.append(solved.errors[0])
    spread = torch.stack(directions).std(0)
    estimated = torch.stack(errors).square().mean(0).sqrt()
    assert ((estimated / spread - 1).abs() < 0.15).all(), (estimated, spread)


def test_few_groups_have_no_errors_and_a_constant_concept_no_direction() -> None:
    sums = zero_concept_sums(2, 3)
    t = torch.tensor([[1.0, 5.0], [0.0, 5.0], [1.0, 5.0]])
    sums.add(t, torch.randn(3, 3), torch.arange(3))
    solved = solve_concepts(sums)
    assert solved.errors.isnan().all()
    assert solved.variance.tolist() == [pytest.approx(2 / 9), 0]
    assert solved.directions[1].tolist() == [0, 0, 0]
    assert solve_concepts(zero_concept_sums(1, 2)).n == 0


def test_operators_without_one_output_per_image_have_no_concepts() -> None:
    layer = nn.Linear(4, 4)
    model = FunctionModel(
        lambda m, x: m.last(torch.relu(m.twice(torch.relu(m.twice(x))))), twice=layer, last=nn.Linear(4, 2)
    )
    network = trace(model.double(), torch.randn(2, 4, dtype=torch.float64))
    assert {name: has_concepts(op) for name, op in network.operators.items()} == {"twice": False, "last": True}
    observer = Observer(network, concepts=1)
    observer.update(torch.randn(5, 4, dtype=torch.float64))  # without labels
    assert observer.concepts().keys() == {"last"}
    assert solve_concepts(observer.concepts()["last"]).n == 0


def test_sums_of_concepts_are_not_compiled() -> None:
    model, (images, _) = small_model(), draw()
    with pytest.raises(UserError, match="cannot be compiled"):
        Observer(trace(model, images[:2]), concepts=1).compile(4)
