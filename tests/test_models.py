"""Models of torchvision and timm as they are: each traces, fits and explains. The slow tests write docs/models.md."""

import gc
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from patterns import Explainer, Network, Observer, UserError, choose, solve
from patterns.estimation.estimators import required_sums
from patterns.moments.moments import RequiredSums, moments_bytes
from patterns.tracing.aten_graph import export
from patterns.tracing.linearize import DETACHED_NORMS
from patterns.tracing.network import build_network
from tests.patterns.networks import relative

TABLE = Path(__file__).parents[1] / "docs" / "models.md"
LARGE = 30_000_000  # parameters
TOO_LARGE_FOR_FLOAT64 = 400_000_000  # parameters
MOMENTS = 2**30  # bytes of moments taken in one pass over the batches
NOTHING = RequiredSums(total=False, open=False)
SMALL = ["torchvision:squeezenet1_1", "timm:resnet10t", "timm:vit_tiny_patch16_224", "timm:convnext_atto"]

# Where 64×64, or 32×32 for large models, does not do.
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


def every_model() -> list[str]:
    return [f"torchvision:{name}" for name in torchvision.models.list_models(module=torchvision.models)] + [
        f"timm:{name}" for name in TIMM
    ]


def build(spec: str) -> tuple[nn.Module, int]:
    """A model with random weights and 10 classes, and the side of an image for it."""
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
        if not parameter.any():  # heads and residual branches that start from zero: without a gradient to compare
            nn.init.normal_(parameter, std=0.1)
    large = sum(p.numel() for p in model.parameters()) > LARGE
    return model, side or (32 if large else 64)


@dataclass(frozen=True)
class Row:
    """What the table says of a model. `needed`: what had to be passed through. `held`: nodes that hold something."""

    spec: str
    millions: float
    operators: int
    gated: int
    needed: tuple[str, ...]
    held: int
    result: str

    def __str__(self) -> str:
        cells = (self.spec, f"{self.millions:.1f}", str(self.operators), str(self.gated), ", ".join(self.needed),
                 str(self.held or ""), self.result)  # fmt: skip
        return f"| {' | '.join(cells)} |"


def check(spec: str) -> Row:
    """Trace a model, explain it with its weights for patterns, fit it, explain it with its patterns."""
    model, side = build(spec)
    parameters = sum(p.numel() for p in model.parameters())
    wide = parameters < TOO_LARGE_FOR_FLOAT64
    dtype, exact, near = (torch.float64, 1e-10, 1e-8) if wide else (torch.float32, 1e-4, 1e-3)
    model.to(dtype).eval().requires_grad_(False)
    batches = torch.randn(2, 2, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=dtype)
    network, needed = traced(model, batches[0], spec)
    operators = network.operators
    with torch.no_grad():
        for x in (*batches, batches[0, :1]):
            assert relative(network.module(x), model(x)) < exact, "outputs"
    free, held = released(network)
    assert relative(with_weights(free, batches[0]), gradient(model, batches[0])) < near, "the model's gradient"
    if held:
        assert relative(with_weights(network, batches[0]), gradient(network.module, batches[0])) < near, "gradient"
    del model, free
    gc.collect()
    patterns = fit(network, batches)
    for name in ("patternnet", "patternattribution"):
        gc.collect()  # an explainer refers to itself, and the last one's weights may be large
        found = Explainer(network, patterns, [name])(batches[0]).maps[name]
        assert found.shape == batches[0].shape, name
        assert found.isfinite().all(), name
    gated = sum(operator.gate is not None for operator in operators.values())
    return Row(spec, parameters / 1e6, len(operators), gated, needed, held, "works" if wide else "works in float32")


def traced(model: nn.Module, example: Tensor, spec: str) -> tuple[Network, tuple[str, ...]]:
    """A network, and the operations that tracing it refused, by its own error's remedy."""
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


def released(network: Network) -> tuple[Network, int]:
    """The network with its usual gradient wherever it holds something still, and in how many places that is."""
    norms = {held: norm for norm, held in DETACHED_NORMS.items()}
    module, held = network.rewrite(lambda operator: operator), 0
    for node in module.graph.nodes:
        if node.target in norms:
            node.target = norms[node.target]
        elif node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
        else:
            continue
        held += 1
    module.recompile()
    return replace(network, module=module), held


def with_weights(network: Network, x: Tensor) -> Tensor:
    """The explanation pass's gradient of the best scores with the weights for patterns."""
    weights = {name: operator.weight for name, operator in network.operators.items()}
    explained = Explainer(network, weights, ["patternnet"])(x)
    scores = explained.scores.amax(1)[:, None, None, None]
    return torch.ldexp(explained.maps["patternnet"], torch.tensor(explained.exponents["patternnet"])) / scores


def gradient(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(module(x).amax(1).sum(), x)[0]


def fit(network: Network, batches: Tensor) -> dict[str, Tensor]:
    """Patterns of every operator, in as many passes over the batches as keep the moments small."""
    patterns: dict[str, dict[str, Tensor]] = {}
    for group in groups(network):
        observer = Observer(
            network, lambda op, group=group: required_sums(op, ["default"]) if op.name in group else NOTHING
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


def groups(network: Network) -> list[set[str]]:
    """The operators in their order, in groups whose moments fit into memory together."""
    found: list[set[str]] = []
    room = 0
    for name, operator in network.operators.items():
        size = moments_bytes(operator, required_sums(operator, ["default"]))
        if size > room:
            found.append(set())
            room = MOMENTS
        found[-1].add(name)
        room -= size
    return found


HEADER = """# Models

Written by `tests/test_models.py` (`make soak`). Each model has random weights and sees two batches of two small images
in float64. It *works* if its graph gives the model's own outputs, its moments, patterns and explanations are finite,
and its explanation pass with the weights for patterns is its own gradient (to 1e-8). A norm, gate or attention passed
through is held still on purpose; the table counts them, the pass is compared with autograd through the held graph
also, and with the model's once they are released. *In float32*: too large for float64 here; compared to 1e-3.

Models of timm come from families: the letters that timm's name of an architecture starts with, its version (`v2`)
among them and `tf_` and `legacy_` not. {families} of them, in a model or more, are made of linear operators and
rectifiers alone, and need no `--pass-through`: {names}.

| model | million parameters | operators | gated | needs `--pass-through` of | held | result |
| --- | --- | --- | --- | --- | --- | --- |
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
@pytest.mark.parametrize("spec", every_model())
def test_a_model_of_the_table_traces_fits_and_explains(spec: str) -> None:
    try:
        record(check(spec))
    except Exception as error:  # the table names it too
        record(Row(spec, 0, 0, 0, (), 0, f"fails: {' '.join(repr(error).split())[:150]}"))
        raise


def record(row: Row) -> None:
    """Put a row into the table, in the place of the model's last."""
    rows = rows_of_table()
    rows[row.spec] = str(row)
    listed = {spec: rows[spec] for spec in every_model() if spec in rows}
    pure = pure_families(listed)
    header = HEADER.format(families=len(pure), names=", ".join(pure))
    TABLE.write_text(header + "".join(f"{line}\n" for line in listed.values()))


def rows_of_table() -> dict[str, str]:
    """The lines of the table by model."""
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.startswith(("| torch", "| timm"))}


def pure_families(rows: Mapping[str, str]) -> list[str]:
    """The families of timm with a model that works and needs nothing passed through."""
    names = [spec.removeprefix("timm:") for spec, line in rows.items() if spec.startswith("timm:") and pure(line)]
    return sorted({re.match(r"(?:tf_|legacy_)?([a-z]+?(?:v\d)?)(?![a-z])", name)[1] for name in names})  # type: ignore[index]


def pure(line: str) -> bool:
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    return cells[4] == "" and cells[6].startswith("works")


def test_the_table_has_every_model_at_work_and_forty_families_of_linear_operators_and_rectifiers() -> None:
    rows = rows_of_table()
    assert list(rows) == every_model()
    assert not [line for line in rows.values() if not line.split(" | ")[6].startswith("works")]
    families = pure_families(rows)
    assert len(families) >= 40
    assert f"{len(families)} of them, in a model or more," in TABLE.read_text()
