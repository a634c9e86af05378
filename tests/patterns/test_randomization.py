"""Networks with random weights: what is drawn, what is kept, and the maps against those of Quantus."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from patterns import Explainer, Network, trace
from patterns.evaluation import cascade, cosine, heat, randomize, spearman, trained_operators, with_weights
from tests.patterns.chains import chain, normal, relu_network, seeded
from tests.patterns.test_explain import small

pytestmark = pytest.mark.full


def test_only_named_operators_are_randomized_and_the_network_is_unchanged() -> None:
    it = small("residual")
    before = {name: op.weight.clone() for name, op in it.network.operators.items()}
    other = randomize(it.network, ["head", "one"], seeded(0))
    for name, op in other.operators.items():
        old = it.network.operators[name]
        assert torch.equal(old.weight, before[name])
        assert torch.equal(op.weight, old.weight) == (name not in ("head", "one"))
        assert (op.operator_type, op.gate, op.input_shapes, op.output_shape) == (
            old.operator_type, old.gate, old.input_shapes, old.output_shape
        )  # fmt: skip
    assert not torch.equal(other.operators["one"].bias, it.network.operators["one"].bias)  # type: ignore[arg-type]
    assert not torch.equal(other.module(it.inputs), it.network.module(it.inputs))


def test_randomized_weight_keeps_only_mean_and_standard_deviation() -> None:
    network = chain(2 + 3 * normal(200, 200))
    old, new = network.operators["0"].weight, randomize(network, ["0"], seeded(1)).operators["0"].weight
    assert float(new.mean()) == pytest.approx(float(old.mean()), abs=4 * 3 / 200)
    assert float(new.std()) == pytest.approx(float(old.std()), rel=4 / 200 / 2**0.5)
    assert abs(np.corrcoef(old.flatten(), new.flatten())[0, 1]) < 4 / 200


def test_seed_determines_the_weights() -> None:
    network = relu_network()
    one, same, other = (randomize(network, ["0"], seeded(s)).operators["0"].weight for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_cascade_goes_down_and_keeps_its_earlier_draws() -> None:
    it = small("residual")
    assert trained_operators(it.network) == ["stem", "one", "two", "head"]  # not the addition, nor the pooling
    steps = list(cascade(it.network, seeded(0)))
    assert [name for name, _ in steps] == ["head", "two", "one", "stem"]
    randomized: dict[str, Tensor] = {}
    for name, network in steps:
        weights = {n: op.weight for n, op in network.operators.items()}
        randomized[name] = weights[name]
        for n, weight in weights.items():
            assert torch.equal(weight, randomized.get(n, it.network.operators[n].weight))
    assert not any(torch.equal(w, it.network.operators[n].weight) for n, w in randomized.items())


def test_map_of_a_hidden_neuron_does_not_depend_on_the_cascade_above_it() -> None:
    it = small("residual")
    target = torch.tensor([2, 0, 1, 3])

    def maps(network: Network) -> Tensor:
        return Explainer(network.until("stem"), it.patterns, ["patternattribution"])(it.inputs, target).maps[
            "patternattribution"
        ]

    truth = maps(it.network)
    for name, network in cascade(it.network, seeded(0)):
        assert torch.equal(maps(network), truth) == (name != "stem")


def test_gradient_of_a_linear_model_is_the_product_of_the_randomized_weights() -> None:
    network, x = chain(normal(4, 5), normal(3, 4, seed=1)), normal(2, 5, seed=2)
    first, second = (network.operators[name].weight for name in ("0", "1"))
    for name, other in cascade(network, seeded(3)):
        found = Explainer(other, None, ["gradient"])(x, torch.tensor([1, 2])).maps["gradient"]
        below, above = other.operators["0"].weight, other.operators["1"].weight
        torch.testing.assert_close(found, (above @ below)[[1, 2]], rtol=1e-12, atol=1e-12)
        assert torch.equal(below, first) == (name == "1")
        assert not torch.equal(above, second)


def test_cascade_changes_only_the_size_of_signals_without_gates() -> None:
    network, x = chain(normal(4, 5), normal(3, 4, seed=1)), normal(2, 5, seed=2)
    patterns = {"0": normal(4, 5, seed=3), "1": normal(3, 4, seed=4)}
    targets = torch.tensor([0, 2])
    before = Explainer(network, patterns, ["patternnet"])(x, targets).maps["patternnet"]
    for _, other in cascade(network, seeded(5)):
        after = Explainer(other, patterns, ["patternnet"])(x, targets).maps["patternnet"]
        torch.testing.assert_close(cosine(before, after).abs(), torch.ones(2, dtype=torch.float64))
        assert not torch.allclose(before, after)


def test_copy_of_an_operator_keeps_all_other_attributes() -> None:
    operator = relu_network().operators["2"]
    operator.calls, operator.mixed_gates, operator.per_image = 3, True, False
    other = with_weights(operator, 2 * operator.weight, None)
    kept = set(vars(operator)) - {"_buffers"}
    assert {name: vars(other)[name] for name in kept} == {name: vars(operator)[name] for name in kept}
    assert torch.equal(other.weight, 2 * operator.weight)
    assert other.bias is None


def test_drawn_weights_do_not_depend_on_the_networks_dtype() -> None:
    network = relu_network()
    narrow = replace(network, module=network.rewrite(lambda op: with_weights(op, op.weight.float(), op.bias)))
    wide, found = (randomize(it, ["2"], seeded(0)).operators["2"].weight for it in (network, narrow))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wide, rtol=1e-5, atol=1e-6)


# --- Quantus ----------------------------------------------------------------------------------------


class Redrawable:
    """A layer whose `reset_parameters`, which Quantus calls to randomize it, loads given weights."""

    later: tuple[Tensor, Tensor] | None = None

    def reset_parameters(self) -> None:
        if self.later is None:
            super().reset_parameters()  # type: ignore[misc]
            return
        with torch.no_grad():
            for parameter, value in zip((self.weight, self.bias), self.later):  # type: ignore[attr-defined]
                parameter.copy_(value)


class RedrawableConvolution(Redrawable, nn.Conv2d):
    pass


class RedrawableLinear(Redrawable, nn.Linear):
    pass


@pytest.mark.parametrize("method", ["gradient", "guided-backprop", "patternnet", "patternattribution"])
def test_cascade_and_rank_correlation_equal_quantus_parameter_randomization(method: str) -> None:
    """Quantus randomizes the layers in its own order with the same draws, and compares the maps by its own measure."""
    from quantus.metrics.randomisation.mprt import MPRT

    torch.manual_seed(3)
    features = RedrawableConvolution(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), RedrawableConvolution(8, 12, 3)
    head = nn.Flatten(), nn.ReLU(), RedrawableLinear(48, 32), nn.ReLU(), RedrawableLinear(32, 4)
    model = nn.Sequential(*features, *head).eval()
    x, targets = normal(6, 1, 8, 8).float(), torch.tensor([0, 1, 2, 3, 0, 1])
    network = trace(model, x[:2])
    patterns = {n: normal(*op.weight.shape, seed=k).float() for k, (n, op) in enumerate(network.operators.items())}

    def explain(of: Network) -> Tensor:
        return Explainer(of, patterns, [method])(x, targets).maps[method]

    before, expected = heat(explain(network)), {}
    for name, other in cascade(network, seeded(4)):
        expected[name] = spearman(before, heat(explain(other))).tolist()
        drawn = other.operators[name]
        assert drawn.bias is not None
        model.get_submodule(name).later = drawn.weight, drawn.bias  # type: ignore[assignment]

    def explain_func(model: nn.Module, inputs: object, targets: object, **_: object) -> object:
        return explain(trace(model, x[:2])).numpy()

    metric = MPRT(disable_warnings=True)
    arrays = {"x_batch": x.numpy(), "y_batch": targets.numpy()}
    found = metric(model=model, **arrays, explain_func=explain_func, channel_first=True, device="cpu")
    assert list(found) == ["original", *expected]
    assert min(found["original"]) == pytest.approx(1)
    for name, values in expected.items():
        # A rank may change by rounding where two values of a map are almost equal.
        np.testing.assert_allclose(found[name], values, atol=1e-4)
    assert max(map(abs, expected["0"])) < 0.99  # at the end of the cascade
