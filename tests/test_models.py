"""Models of torchvision and timm are traced, fitted and explained. The slow tests write docs/models.md."""

import gc
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from patterns import Explainer, Network, Observer, UserError, choose, solve
from patterns.estimation.estimators import required_sums
from patterns.moments.moments import RequiredSums, moments_bytes
from patterns.tracing.exporting import export
from patterns.tracing.network import build_network
from patterns.tracing.scales import SCALES
from tests.patterns.networks import relative

TABLE = Path(__file__).parents[1] / "docs" / "models.md"
LARGE = 30_000_000  # parameters
TOO_LARGE_FOR_FLOAT64 = 400_000_000  # parameters
MAX_MOMENTS = 2**30  # bytes of moments of one pass over the batches
NO_SUMS = RequiredSums(total=False, open=False)
SMALL = ["torchvision:squeezenet1_1", "timm:resnet10t", "timm:vit_tiny_patch16_224"]

# Sizes of images for models that cannot take 64×64, or 32×32 for large models.
SIZES = {"torchvision:inception_v3": 96, "timm:inception_v3": 96, "timm:inception_v4": 96,
         "timm:inception_resnet_v2": 96, "timm:nasnetalarge": 96, "timm:pnasnet5large": 96,
         "timm:xception41": 96, "timm:legacy_xception": 96,
         "torchvision:alexnet": 67, "torchvision:maxvit_t": 224, "timm:visformer_tiny": 224, "timm:levit_128s": 224,
         "timm:coat_lite_tiny": 224, "timm:crossvit_tiny_240": 240, "timm:efficientformer_l1": 224,
         "timm:tnt_s_legacy_patch16_224": 224, "timm:swin_tiny_patch4_window7_224": 224,
         "timm:maxvit_rmlp_pico_rw_256": 256, "timm:coatnet_pico_rw_224": 224,
         "timm:bat_resnext26ts": 256, "timm:halonet26t": 256, "timm:botnet26t_256": 256}  # fmt: skip
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
    "dpn68", "fasternet_s", "mobilenetv1_100", "mobilenet_edgetpu_v2_xs", "mnasnet_100",
    "tf_mobilenetv3_small_minimal_100", "resnext50_32x4d", "resnetblur18", "resnetaa34d", "densenetblur121d",
    "cspresnext50", "darknetaa53", "hgnetv2_b0",
]  # fmt: skip


def list_models() -> list[str]:
    return [f"torchvision:{name}" for name in torchvision.models.list_models(module=torchvision.models)] + [
        f"timm:{name}" for name in TIMM
    ]


def build(spec: str) -> tuple[nn.Module, int]:
    """Return a model with random weights and 10 classes, and the side of an image for it."""
    library, _, name = spec.partition(":")
    options, side = OPTIONS.get(spec, {}), SIZES.get(spec)
    torch.manual_seed(0)
    if library == "timm":
        model = timm.create_model(name, num_classes=10, **options)
    else:
        if name.startswith("vit_"):
            side = 2 * int(name.rpartition("_")[2])
            options = {"image_size": side}
        model = torchvision.models.get_model(name, weights=None, num_classes=10, **options)
    for parameter in model.parameters():
        if not parameter.any():  # heads and residual branches of zeros would have no gradient to compare
            nn.init.normal_(parameter, std=0.1)
    large = sum(p.numel() for p in model.parameters()) > LARGE
    return model, side or (32 if large else 64)


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        spec: The model.
        millions: Parameters in millions.
        operators: Number of linear operators.
        gated: Number of operators with a gate.
        needed: Operations that had to be passed through.
        detached: Number of detached values in the graph.
        result: Whether the model works.
    """

    spec: str
    millions: float
    operators: int
    gated: int
    needed: tuple[str, ...]
    detached: int
    result: str

    def __str__(self) -> str:
        cells = (self.spec, f"{self.millions:.1f}", str(self.operators), str(self.gated), ", ".join(self.needed),
                 str(self.detached or ""), self.result)  # fmt: skip
        return f"| {' | '.join(cells)} |"


def check(spec: str) -> Row:
    """Trace a model, explain it with its weights as patterns, fit it, and explain it with its patterns."""
    model, side = build(spec)
    parameters = sum(p.numel() for p in model.parameters())
    wide = parameters < TOO_LARGE_FOR_FLOAT64
    dtype, exact, close = (torch.float64, 1e-10, 1e-8) if wide else (torch.float32, 1e-4, 1e-3)
    model.to(dtype).eval().requires_grad_(False)
    batches = torch.randn(2, 2, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=dtype)
    network, needed = trace_model(model, batches[0], spec)
    operators = network.operators
    with torch.no_grad():
        for x in (*batches, batches[0, :1]):
            assert relative(network.module(x), model(x)) < exact, "outputs"
    found = Explainer(network, None, ["gradient"])(batches[0]).maps["gradient"]
    assert relative(found, gradient(model, batches[0])) < close, "the model's gradient"
    del model, found
    gc.collect()
    patterns = fit(network, batches)
    for name in ("patternnet", "patternattribution"):
        gc.collect()  # explainers are reference cycles, and the previous one may be large
        found = Explainer(network, patterns, [name])(batches[0]).maps[name]
        assert found.shape == batches[0].shape, name
        assert found.isfinite().all(), name
    gated = sum(operator.gate is not None for operator in operators.values())
    detached = sum(node.target in SCALES for node in network.module.graph.nodes)
    return Row(spec, parameters / 1e6, len(operators), gated, needed, detached, "works" if wide else "works in float32")


def trace_model(model: nn.Module, example: Tensor, spec: str) -> tuple[Network, tuple[str, ...]]:
    """Trace a model, and pass through the operations that the remedies of its errors name."""
    needed: list[str] = []
    exported = export(model, example, spec)
    while True:
        try:
            return build_network(exported.copy(), example, spec, needed), tuple(needed)
        except UserError as error:
            found = re.search(r"no pattern is defined for (\w+) in .*Pass `pass_through=(\S+)` to use", str(error))
            if found is None or set(found[2].split(",")) & set(needed):
                raise
            assert found[1] in found[2].split(",")
            needed += found[2].split(",")


def gradient(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(module(x).amax(1).sum(), x)[0]


def fit(network: Network, batches: Tensor) -> dict[str, Tensor]:
    """Return the patterns of every operator, from several passes over the batches that limit the moments' memory."""
    patterns: dict[str, dict[str, Tensor]] = {}
    for group in group_operators(network):
        observer = Observer(
            network, lambda op, group=group: required_sums(op, ["default"]) if op.name in group else NO_SUMS
        )
        for batch in batches:
            observer.update(batch)
        moments = observer.moments()
        del observer
        gc.collect()
        for name in group:
            patterns[name] = solve(network.operators[name], moments.pop(name)).patterns
            assert all(pattern.isfinite().all() for pattern in patterns[name].values()), name
    return choose(network, patterns)


def group_operators(network: Network) -> list[set[str]]:
    """Return the operators in groups whose moments fit into memory together."""
    found: list[set[str]] = []
    room = 0
    for name, operator in network.operators.items():
        size = moments_bytes(operator, required_sums(operator, ["default"]))
        if size > room:
            found.append(set())
            room = MAX_MOMENTS
        found[-1].add(name)
        room -= size
    return found


HEADER = """# Models

`tests/test_models.py` (`make soak`) writes this page. Each model has random weights and sees two batches of two small
images in float64. It *works* if its graph gives the model's own outputs, if its moments, patterns and explanations are
finite, and if its method `gradient` gives the model's own gradient (to 1e-8). *Constant factors* counts the norms,
smooth gates, attention weights and factors of products, which all other methods take as constants (see
[smooth.md](smooth.md)). *In float32*: the model is too large for float64 on this machine, and is compared to 1e-3.

A family of timm's models is the letters at the beginning of an architecture's name and its version, such as `v2`,
without `tf_` and `legacy_`. {families} families have a model that needs no
`--pass-through`: {names}.

| model | million parameters | operators | gated | needs `--pass-through` of | constant factors | result |
| --- | --- | --- | --- | --- | --- | --- |
"""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


@pytest.mark.full
@pytest.mark.parametrize("spec", SMALL)
def test_model_is_traced_fitted_and_explained(spec: str) -> None:
    assert check(spec).result == "works"


@pytest.mark.slow
@pytest.mark.parametrize("spec", list_models())
def test_model_of_the_table_is_traced_fitted_and_explained(spec: str) -> None:
    try:
        record(check(spec))
    except Exception as error:  # failures are rows of the table
        record(Row(spec, 0, 0, 0, (), 0, f"fails: {' '.join(repr(error).split())[:150]}"))
        raise


def record(row: Row) -> None:
    """Write a row of the table; it replaces the model's earlier row."""
    rows = read_rows()
    rows[row.spec] = str(row)
    ordered = {spec: rows[spec] for spec in list_models() if spec in rows}
    pure = list_pure_families(ordered)
    header = HEADER.format(families=len(pure), names=", ".join(pure))
    TABLE.write_text(header + "".join(f"{line}\n" for line in ordered.values()))


def read_rows() -> dict[str, str]:
    """Return the lines of the table by model."""
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.startswith(("| torch", "| timm"))}


def list_pure_families(rows: Mapping[str, str]) -> list[str]:
    """Return the families of timm with a model that works and needs nothing passed through."""
    names = [spec.removeprefix("timm:") for spec, line in rows.items() if spec.startswith("timm:") and is_pure(line)]
    return sorted({re.match(r"(?:tf_|legacy_)?([a-z]+?(?:v\d)?)(?![a-z])", name)[1] for name in names})  # type: ignore[index]


def is_pure(line: str) -> bool:
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    return cells[4] == "" and cells[6].startswith("works")


def test_table_has_every_model_working_and_forty_families_without_pass_through() -> None:
    rows = read_rows()
    assert list(rows) == list_models()
    assert not [line for line in rows.values() if not line.split(" | ")[6].startswith("works")]
    families = list_pure_families(rows)
    assert len(families) >= 40
    assert f"{len(families)} families have a model" in TABLE.read_text()
