"""Deep backward passes stay within the range of their dtype and equal passes without a limited range."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from patterns import Explainer, Network, UserError, trace
from patterns.attribution import gradient_scaling
from tests.patterns.networks import PASSES

pytestmark = pytest.mark.full

DEPTH = 24


class Deep(nn.Module):
    """Alternating residual, dense and plain layers, each with a rectifier; one layer is called twice."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.plain = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(depth))
        self.dense = nn.ModuleList(nn.Conv2d(4, 2, 1) for _ in range(depth))
        self.reduce = nn.ModuleList(nn.Conv2d(6, 4, 1) for _ in range(depth))
        self.twice = nn.Conv2d(4, 4, 1)
        self.last = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        for plain, dense, reduce in zip(self.plain, self.dense, self.reduce):
            x = (x + plain(x)).relu()
            x = reduce(torch.cat([x, dense(x).relu()], 1)).relu()
        x = self.twice(self.twice(x).relu()).relu()
        return self.last(x.view(x.shape[0], 4, -1).mean(2)[:, :, None, None].flatten(1))


def deep(depth: int = DEPTH) -> tuple[Network, Tensor]:
    torch.manual_seed(0)
    model = Deep(depth).double()
    inputs = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.Conv2d):
                part.weight.abs_()
                part.weight /= part.weight.flatten(1).sum(1).view(-1, 1, 1, 1)
    return trace(model, inputs), inputs


def patterns_of(network: Network, growth: float) -> dict[str, Tensor]:
    """Return positive patterns that multiply magnitudes by about `growth` in each layer."""
    return {name: op.weight.abs() * growth for name, op in network.operators.items()}


def explain_in(network: Network, patterns: dict[str, Tensor], inputs: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    explainer = Explainer(
        Network(network.module.to(dtype), network.input_shape, network.output_shape), patterns, ["patternnet"]
    )
    explanation = explainer(inputs.to(dtype), torch.tensor([0, 1, 2]))
    return explanation.maps["patternnet"].double(), explanation.exponents["patternnet"]


@pytest.mark.parametrize("growth", [30.0, 1 / 30])
def test_magnitudes_beyond_float32_equal_float64(growth: float) -> None:
    network, inputs = deep()
    patterns = patterns_of(network, growth)
    true, in_float64 = explain_in(network, patterns, inputs, torch.float64)
    found, exponent = explain_in(network, patterns, inputs, torch.float32)
    size = torch.frexp(true.abs().max()).exponent.item() + in_float64
    assert abs(size) > 150, "float32 would have held this without scaling"
    assert found.isfinite().all()
    assert (found * 2.0 ** (exponent - in_float64) - true).norm() <= 1e-4 * true.norm()


def test_scaling_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    network, inputs = deep()
    patterns = patterns_of(network, 30.0)
    monkeypatch.setattr(gradient_scaling, "SAFE_DIGITS", 10_000)
    true, unscaled = explain_in(network, patterns, inputs, torch.float64)
    monkeypatch.setattr(gradient_scaling, "SAFE_DIGITS", 1)
    found, exponent = explain_in(network, patterns, inputs, torch.float64)
    assert unscaled == 0
    assert exponent > 150
    assert torch.equal(found * 2.0**exponent, true)


def test_magnitudes_in_range_are_not_scaled() -> None:
    network, inputs = deep()
    explainer = Explainer(network, patterns_of(network, 1.0), PASSES)
    assert set(explainer(inputs).exponents.values()) == {0}


def test_scaling_one_method_does_not_change_the_others() -> None:
    network, inputs = deep()
    patterns = patterns_of(network, 1e6)
    explanation = Explainer(network, patterns, ["gradient", "patternnet"])(inputs)
    alone = Explainer(network, None, ["gradient"])(inputs)
    assert explanation.exponents["patternnet"] > 500
    assert explanation.exponents["gradient"] == 0
    assert torch.equal(explanation.maps["gradient"], alone.maps["gradient"])


def test_map_does_not_depend_on_the_rest_of_its_batch() -> None:
    network, inputs = deep()
    explainer = Explainer(network, patterns_of(network, 30.0), ["patternnet"])
    together = explainer(inputs, torch.tensor([0, 1, 2])).maps["patternnet"][1]
    alone = explainer(inputs[1:2], torch.tensor([1])).maps["patternnet"][0]
    assert (together - alone).norm() <= 1e-12 * alone.norm()


# --- recorded scales ----------------------------------------------------------------------------------

BEYOND = "patternnet", "patternattribution", "gradient"
SHALLOW = 6


def explain_in_float32(recorded: Mapping[str, Sequence[int]] | None) -> tuple[Explainer, str]:
    """Return an explainer of a network, and a digest of its maps and exponents."""
    network, inputs = deep(SHALLOW)
    network.module.float()
    explainer = Explainer(network, patterns_of(network, 1e6), BEYOND, recorded)
    found = explainer(inputs.float(), torch.tensor([0, 1, 2]))
    digest = hashlib.sha256(json.dumps(found.exponents).encode())
    for name in BEYOND:
        digest.update(found.maps[name].numpy().tobytes())
    return explainer, digest.hexdigest()


def test_recorded_scales_give_the_same_bits_and_exponents_in_another_process(tmp_path: Path) -> None:
    explainer, digest = explain_in_float32(None)
    # Scales as hardware with another rounding could calibrate them.
    other = {name: [phi + number % 3 for number, phi in enumerate(own)] for name, own in explainer.scales.items()}
    shifted, shifted_digest = explain_in_float32(other)
    assert shifted.scales == other
    assert shifted_digest != digest
    (tmp_path / "scales.json").write_text(json.dumps(other))
    code = f"""
import json, torch
from tests.patterns.test_scales import explain_in_float32
torch.set_num_threads({torch.get_num_threads()})
print(explain_in_float32(json.load(open({str(tmp_path / "scales.json")!r})))[1])
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == shifted_digest


def test_any_recorded_scales_give_the_map_of_calibrated_scales() -> None:
    network, inputs = deep(SHALLOW)
    patterns, targets = patterns_of(network, 1e6), torch.tensor([0, 1, 2])
    network.module.float()
    calibrated = Explainer(network, patterns, BEYOND)
    assert calibrated.scales["gradient"] == []
    assert len(set(calibrated.scales["patternnet"])) > 20
    moved = {"patternnet": [phi + 7 * (number > 0) for number, phi in enumerate(calibrated.scales["patternnet"])]}
    found, again = (e(inputs.float(), targets) for e in (calibrated, Explainer(network, patterns, BEYOND, moved)))
    assert again.exponents["patternnet"] == found.exponents["patternnet"] + 7
    assert torch.equal(again.maps["patternnet"] * 2.0**7, found.maps["patternnet"])
    for name in ("patternattribution", "gradient"):  # these were calibrated again
        assert again.exponents[name] == found.exponents[name]
        assert torch.equal(again.maps[name], found.maps[name])


def test_scales_of_another_network_are_rejected() -> None:
    network, _ = deep(SHALLOW)
    with pytest.raises(UserError, match="a network with 3 values") as caught:
        Explainer(network, patterns_of(network, 1e6), ["patternnet"], {"patternnet": [0, 1, 2]})
    assert caught.value.parameter == "scales"
