"""Models of torchvision and timm as they are: each traces, fits and explains. The slow test writes docs/models.md."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from patterns import METHODS, Explainer, Network, Observer, UserError, choose, solve, trace
from patterns.estimators import wanted

TABLE = Path(__file__).parents[1] / "docs" / "models.md"
SEVERAL_GIGABYTES = 60_000_000  # parameters whose moments would take that: these get the estimator without moments
SMALL = ["torchvision:squeezenet1_1", "torchvision:shufflenet_v2_x0_5", "torchvision:mobilenet_v3_small",
         "timm:resnet10t", "timm:vit_tiny_patch16_224", "timm:convnext_atto"]  # fmt: skip

# Where 64×64 does not do.
SIZES = {"torchvision:inception_v3": 96, "timm:inception_v3": 96, "timm:inception_v4": 96,
         "timm:inception_resnet_v2": 96, "timm:nasnetalarge": 96, "timm:pnasnet5large": 96,
         "timm:xception41": 96, "timm:legacy_xception": 96,
         "torchvision:alexnet": 67, "torchvision:maxvit_t": 224, "timm:visformer_tiny": 224, "timm:levit_128s": 224,
         "timm:coat_lite_tiny": 224, "timm:crossvit_tiny_240": 240, "timm:efficientformer_l1": 224,
         "timm:tnt_s_legacy_patch16_224": 224, "timm:swin_tiny_patch4_window7_224": 224,
         "timm:maxvit_rmlp_pico_rw_256": 256, "timm:coatnet_pico_rw_224": 224}  # fmt: skip
OPTIONS: dict[str, dict[str, object]] = {
    "torchvision:googlenet": {"init_weights": False, "aux_logits": False},
    "torchvision:inception_v3": {"init_weights": False, "aux_logits": False},
    "timm:vit_tiny_patch16_224": {"img_size": 64},
    "timm:deit_tiny_patch16_224": {"img_size": 64},
    "timm:cait_xxs24_224": {"img_size": 64},
    "timm:xcit_nano_12_p16_224": {"img_size": 64},
    "timm:mixer_s32_224": {"img_size": 64},
    "timm:resmlp_12_224": {"img_size": 64},
    "timm:gmlp_ti16_224": {"img_size": 64},
}

TIMM = [
    "resnet10t", "resnet18", "resnext26ts", "wide_resnet50_2", "seresnet18", "legacy_seresnet18", "skresnet18",
    "ecaresnet26t", "resnetrs50", "resnetv2_50", "resnest14d", "res2net50_26w_4s", "dla34", "dla46_c",
    "hrnet_w18_small", "densenet121", "vgg11", "inception_v3", "inception_v4", "inception_resnet_v2", "xception41",
    "legacy_xception", "nasnetalarge", "pnasnet5large", "dpn48b", "selecsls42", "repvgg_a0", "rexnet_100",
    "regnetx_002", "regnety_002", "regnetz_005", "mobilenetv2_050", "mobilenetv3_small_050",
    "mobilenetv4_conv_small_035", "mnasnet_small", "ghostnet_050", "repghostnet_050", "hardcorenas_a", "tinynet_e",
    "tf_efficientnet_lite0", "efficientnet_b0", "efficientnetv2_rw_t", "fbnetc_100", "spnasnet_100", "mixnet_s",
    "ese_vovnet19b_dw", "cspresnet50", "cspdarknet53", "darknet53", "gernet_s", "tresnet_m", "lcnet_050",
    "mobileone_s0", "fasternet_t0", "starnet_s1", "repvit_m0_9", "hgnet_tiny", "vovnet39a", "semnasnet_075",
    "nf_regnet_b0", "nf_resnet50", "bat_resnext26ts", "halonet26t", "botnet26t_256", "convnext_atto",
    "convnextv2_atto", "edgenext_xx_small", "poolformer_s12", "convmixer_768_32", "visformer_tiny", "levit_128s",
    "efficientformer_l1", "vit_tiny_patch16_224", "deit_tiny_patch16_224", "cait_xxs24_224", "xcit_nano_12_p16_224",
    "mixer_s32_224", "resmlp_12_224", "gmlp_ti16_224", "swin_tiny_patch4_window7_224", "pvt_v2_b0", "twins_svt_small",
    "coat_lite_tiny", "crossvit_tiny_240", "mobilevit_xxs", "coatnet_pico_rw_224", "focalnet_tiny_srf",
]  # fmt: skip


def every_model() -> list[str]:
    return [f"torchvision:{name}" for name in torchvision.models.list_models(module=torchvision.models)] + [
        f"timm:{name}" for name in TIMM
    ]


def build(spec: str) -> tuple[nn.Module, int]:
    """A model with random weights and 10 classes, and the side of an image for it."""
    library, _, name = spec.partition(":")
    options = OPTIONS.get(spec, {})
    torch.manual_seed(0)
    if library == "timm":
        return timm.create_model(name, num_classes=10, **options), SIZES.get(spec, 64)
    if name.startswith("vit_"):
        side = 2 * int(name.rpartition("_")[2])
        return torchvision.models.get_model(name, weights=None, num_classes=10, image_size=side), side
    return torchvision.models.get_model(name, weights=None, num_classes=10, **options), SIZES.get(spec, 64)


@dataclass(frozen=True)
class Row:
    """What the table says of a model. `needed`: what had to be passed through."""

    spec: str
    operators: int
    gated: int
    needed: tuple[str, ...]
    result: str

    def __str__(self) -> str:
        cells = self.spec, str(self.operators), str(self.gated), ", ".join(self.needed), self.result
        return f"| {' | '.join(cells)} |"


def traced(model: nn.Module, example: Tensor, spec: str) -> tuple[Network, tuple[str, ...]]:
    """A network, and the operations that tracing it refused, by its own error's remedy."""
    needed: list[str] = []
    while True:
        try:
            return trace(model, example, name=spec, pass_through=needed), tuple(needed)
        except UserError as error:
            found = re.search(r"no pattern is defined for (\w+) in .*Pass --pass-through (\S+) to use", str(error))
            if found is None or set(found[2].split(",")) & set(needed):
                raise
            assert found[1] in found[2].split(",")
            needed += found[2].split(",")


def gradient(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(module(x).gather(1, torch.tensor([[3], [7]])).sum(), x)[0]


def check(spec: str) -> Row:
    """Trace a model, take its moments over one batch, solve, explain; and its own gradient with its weights."""
    model, side = build(spec)
    large = sum(p.numel() for p in model.parameters()) > SEVERAL_GIGABYTES
    model.double().eval().requires_grad_(False)
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    network, needed = traced(model, x, spec)
    operators = network.operators
    with torch.no_grad():
        torch.testing.assert_close(network.module(x), model(x), rtol=1e-8, atol=1e-10)
    if not needed:
        weights = {name: operator.weight for name, operator in operators.items()}
        scores = model(x).gather(1, torch.tensor([[3], [7]]))[..., None, None]
        explained = Explainer(network, weights, ["patternnet"])(x, torch.tensor([3, 7]))
        found = torch.ldexp(explained.maps["patternnet"], torch.tensor(explained.exponents["patternnet"]))
        expected = gradient(model, x) * scores
        assert (found - expected).norm() <= 1e-8 * expected.norm()
    choice = "filter" if large else "default"
    observer = Observer(network, lambda operator: wanted(operator, [choice]))
    observer.update(x)
    moments = observer.moments()
    solved = {name: solve(operator, moments.pop(name), [choice]).patterns for name, operator in operators.items()}
    explained = Explainer(network, choose(network, solved, choice), tuple(METHODS))(x)
    for name, found in explained.maps.items():
        assert found.shape == x.shape, name
        assert found.isfinite().all(), name
    gated = sum(operator.gate is not None for operator in operators.values())
    return Row(spec, len(operators), gated, needed, "filter patterns" if large else "works")


HEADER = """# Models

Written by `tests/test_models.py` (`make soak`). Each model has random weights and sees one batch of two small images
in float64. It *works* if its graph gives the model's own outputs, and its moments, patterns and explanations are
finite; for those that need nothing passed through, also if the explanation pass with the weights for patterns equals
autograd. *Filter patterns*: too large to fit in this test.

| model | operators | gated | needs `--pass-through` of | result |
| --- | --- | --- | --- | --- |
"""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("spec", SMALL)
def test_a_model_traces_fits_and_explains(spec: str) -> None:
    assert check(spec).result == "works"


@pytest.mark.slow
def test_every_model_of_the_table_traces_fits_and_explains() -> None:
    rows = []
    for spec in every_model():
        try:
            rows.append(check(spec))
        except Exception as error:  # whatever fails is named in the table, and below
            rows.append(Row(spec, 0, 0, (), f"fails: {type(error).__name__}: {str(error).splitlines()[0][:150]}"))
    TABLE.write_text(HEADER + "".join(f"{row}\n" for row in rows))
    assert [str(row) for row in rows if row.result.startswith("fails")] == []
