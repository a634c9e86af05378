"""Write docs/critics.md and its figures: `python -m benchmarks.critics [--write docs]`."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.critics import figures, photographs, shapes
from benchmarks.critics.measures import cosine, heat, spearman, ssim
from benchmarks.critics.photographs import BACKWARD, CARRIED, REFITTED, VARIANTS
from ray_jobs.engine.shard_worker import keep_freed_memory

PARTS = "classifier", "blocks.6", "blocks.4", "blocks.2", "conv_stem"  # of the cascade, in the table
PICTURED = 7  # the photograph in the figure
STEPS = 7  # operators of the way back, in the table
SCORES = "earth mover's accuracy", "mass inside", "pointing game"
PICTURED_METHODS = tuple(
    name
    for name in (*shapes.JUDGED, *shapes.BASELINES)
    if name not in ("integrated-gradients", "smoothgrad", "random map")
)
QUANTUS = ("guided-backprop", "default"), ("patternattribution", "default"), ("patternattribution", "linear")


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def both(pair: tuple[Tensor, Tensor]) -> str:
    """The means of SSIM and rank correlation."""
    return " / ".join(f"{float(values.mean()):.2f}" for values in pair)


def named(method: str) -> str:
    """As the page has it; what is no method is no code, and a bar would end a table's cell."""
    return method.replace("|", "\\|") if method in shapes.BASELINES else f"`{method}`"


# --- the photographs ------------------------------------------------------------------------------


def randomisation(it: photographs.Setting, patterns: photographs.Patterns, folder: Path) -> dict[str, object]:
    before, stages = photographs.randomisation(it, patterns, [PICTURED])
    beside = photographs.baseline_likeness(before, it.photographs)
    by_part = {stage.part: stage.likeness for stage in stages}
    rows = [
        [
            variant, named(method), *(both(by_part[p][variant, method]) for p in PARTS),
            *(both(pair) for pair in beside[method].values()),
        ]
        for variant, methods in VARIANTS.items()
        for method in methods
    ]  # fmt: skip
    figures.draw_cascade(folder / "critics-cascade.png", stages, beside)
    shown = {method: heat(maps)[PICTURED] for method, maps in before.items()}
    figures.draw_maps(folder / "critics-maps.png", it.photographs[PICTURED], shown, stages)

    def rank(part: str, variant: str, method: str) -> float:
        return float(by_part[part][variant, method][1].mean())

    numbers = {
        f"rank_{short}_{where}_{key}": rank(part, variant, method)
        for short, variant in (("carried", CARRIED), ("backward", BACKWARD), ("refitted", REFITTED))
        for where, part in (("top", "classifier"), ("block", "blocks.6"), ("end", "conv_stem"))
        for key, method in KEYS.items()
        if method in VARIANTS[variant]
    }
    edges = {
        f"rank_{base}_{key}": float(beside[m][name][1].mean())
        for key, m in KEYS.items()
        for base, name in (("sobel", "Sobel edges"), ("photo", "another photograph's map"))
    }
    head = [
        "what is drawn anew",
        "method",
        *PARTS,
        *(f"against {name}".replace("|", "\\|") for name in next(iter(beside.values()))),
    ]
    return {"cascade_table": table(head, rows), **numbers, **edges}


KEYS = {
    "gradient": "gradient", "gxi": "gradient-x-input", "guided": "guided-backprop",
    "pn": "patternnet:default", "pnl": "patternnet:linear",
    "pa": "patternattribution:default", "pal": "patternattribution:linear",
}  # fmt: skip


def other_classes(it: photographs.Setting, patterns: photographs.Patterns) -> dict[str, object]:
    found = photographs.other_classes(it, patterns)
    one, other = (torch.randn(it.photographs.shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    chance = ssim(heat(one), heat(other)), spearman(heat(one), heat(other)), cosine(one, other).abs()
    rows = [[named(name), *(f"{float(v.mean()):.3f}" for v in scores.values())] for name, scores in found.items()]
    rows.append(["two random maps", *(f"{float(values.mean()):.3f}" for values in chance)])
    rows += [[f"{name}, which know no class", *["1.000"] * 3] for name in ("Sobel edges", "\\|x\\|")]
    measures = {"ssim": "SSIM", "rank": "rank correlation", "cosine": "absolute cosine"}
    numbers = {
        f"other_{short}_{key}": float(found[method][measure].mean())
        for key, method in KEYS.items()
        for short, measure in measures.items()
    }
    return {"others_table": table(["method", *measures.values()], rows), "others": photographs.OTHERS, **numbers}


def ways_back(it: photographs.Setting, patterns: photographs.Patterns, folder: Path) -> dict[str, object]:
    ways = photographs.ways_back(it, patterns)
    figures.draw_ways_back(folder / "critics-convergence.png", ways)
    operators = list(next(iter(ways.values())))
    some = [operators[round(k * (len(operators) - 1) / (STEPS - 1))] for k in range(STEPS)]
    rows = [[named(name), *(f"{float(way[op].mean()):.2f}" for op in some)] for name, way in ways.items()]
    chance = (2 / torch.pi / torch.tensor(float(it.photographs[0].numel()))) ** 0.5
    ratios = photographs.ratios(it.network, patterns)
    ratio_rows = [
        [name, f"{statistics.median(v.values()):.2f}", f"{max(v.values()):.2f}"] for name, v in ratios.items()
    ]
    end = {f"way_{key}": float(ways[m][operators[-1]].mean()) for key, m in KEYS.items() if m in ways}
    negative = {
        f"negative_{key}": f"{statistics.median(photographs.negative_shares(it.network, patterns[e])):.0%}"
        for key, e in (("pa", "default"), ("pal", "linear"))
    }
    return {
        "ways_table": table(["way back", *(f"`{name}`" for name in some)], rows),
        "ratios_table": table(["weight", "σ₁/σ₂, median", "largest"], ratio_rows),
        "ratio_w": statistics.median(ratios["w"].values()),
        "ratio_pa": statistics.median(ratios["w⊙a, default"].values()),
        "ratio_pal": statistics.median(ratios["w⊙a, linear"].values()),
        "ratio_operators": len(ratios["w"]),
        "way_normals": float(ways[photographs.NORMALS][operators[-1]].mean()),
        "way_deconvnet": float(ways["deconvnet"][operators[-1]].mean()),
        "way_chance": float(chance),
        "converged": photographs.CONVERGED,
        **end,
        **negative,
    }


# --- the shapes -----------------------------------------------------------------------------------


def suppressors(folder: Path) -> dict[str, object]:
    scores: dict[tuple[str, str], dict[str, list[Tensor]]] = {}  # by scenario and model, by method, stacked SCORES
    pictures: dict[str, tuple[Tensor, Mapping[str, Tensor]]] = {}
    accuracies: dict[tuple[str, str], list[float]] = {}
    first: dict[tuple[str, str], shapes.Trained] = {}
    for scenario in shapes.SCENARIOS:
        for kind in shapes.MODELS:
            for seed in range(shapes.SEEDS):
                trained = shapes.train(scenario, kind, seed)
                accuracies.setdefault((scenario, kind), []).append(trained.accuracy)
                images, labels = trained.images[: shapes.EXPLAINED], trained.labels[: shapes.EXPLAINED]
                maps = shapes.explained(trained, images, labels)
                for name, some in maps.items():
                    stacked = torch.stack([v.double() for v in shapes.judged(name, some).values()])
                    scores.setdefault((scenario, kind), {}).setdefault(name, []).append(stacked)
                if seed == 0:
                    first[scenario, kind] = trained
                    pictures[f"{scenario}, {kind}"] = images[0, 0], {n: heat(maps[n])[0] for n in PICTURED_METHODS}
                print(f"{scenario}, {kind}, seed {seed}: {trained.accuracy:.3f} right", flush=True)
    figures.draw_shapes(folder / "critics-shapes.png", pictures, shapes.MASK)
    means = {key: {name: torch.cat(v, 1).mean(1) for name, v in of.items()} for key, of in scores.items()}
    # A model's images are no independent draws of models, so the error is over the means of models.
    errors = [
        float(torch.stack([v[0].mean() for v in several]).std() / len(several) ** 0.5)
        for of in scores.values()
        for name, several in of.items()
        if name not in shapes.BASELINES
    ]
    methods = [*shapes.JUDGED, *shapes.BASELINES]
    columns = [f"{scenario}, {kind}" for scenario, kind in means]
    emd = [[named(name), *(f"{float(of[name][0]):.3f}" for of in means.values())] for name in methods]
    rest = [
        [named(name), *(f"{float(of[name][1]):.2f} / {float(of[name][2]):.2f}" for of in means.values())]
        for name in methods
    ]
    best = {key: max(shapes.JUDGED, key=lambda name, of=of: float(of[name][0])) for key, of in means.items()}  # type: ignore[misc]
    numbers = {
        f"{what}_{scenario}_{kind}_{key}".lower(): float(of[method][row])
        for (scenario, kind), of in means.items()
        for row, what in enumerate(("emd", "inside", "hit"))
        for key, method in {**KEYS, "random": "random map"}.items()
    }
    clear = 2 * max(errors)
    above = {
        f"above_{key}": sum(
            float(of[m][0]) - max(float(of[b][0]) for b in shapes.BASELINES) > clear for of in means.values()
        )
        for key, m in {**KEYS, "pao": "patternattribution:two-component-own-mean"}.items()
    }
    outside = 1 - statistics.mean(float(of["gradient"][1]) for of in means.values())
    average = {
        f"mean_{key}": statistics.mean(float(of[m][0]) for of in means.values())
        for key, m in {
            **KEYS,
            "sobel": "Sobel edges",
            "x": "|x|",
            "pao": "patternattribution:two-component-own-mean",
            "random": "random map",
            "pam": "patternattribution:multivariate",
            "pnm": "patternnet:multivariate",
        }.items()
    }
    return {
        "emd_table": table(["method", *columns], emd),
        "rest_table": table(["method", *columns], rest),
        "accuracies": ", ".join(f"{s} {k} {min(v):.3f}" for (s, k), v in accuracies.items()),
        "emd_error": max(errors),
        "outside_gradient": f"{outside:.0%}",
        "models": len(means),
        "best": ";\n".join(
            f"{s}, {k}: {named(name)} {float(means[s, k][name][0]):.3f}" for (s, k), name in best.items()
        ),
        **numbers,
        **above,
        **average,
        **shift(first["XOR", "MLP"]),
        **another_library(first["XOR", "CNN"]),
    }


def shift(trained: shapes.Trained) -> dict[str, object]:
    found = shapes.shift_errors(trained)
    rows = [[named(name), *(f"{v:.1g}" for v in pair)] for name, pair in found.items()]
    carried = max(pair[0] for name, pair in found.items() if ":" in name)
    exact = [pair[1] for n, pair in found.items() if n.endswith((":linear", ":two-component-own-mean"))]
    return {
        "shift_table": table(["method", "patterns carried over", "patterns fitted again"], rows),
        "shift_carried": f"{carried:.0e}",
        "shift_refitted": f"{max(exact):.0e}",
        "shift_multivariate": f"{found['patternattribution:multivariate'][1]:.0e}",
        "shift_default": found["patternattribution:default"][1],
        "shift_gxi": found["gradient-x-input"][0],
        "shift_ig": found["integrated-gradients"][0],
    }


def another_library(trained: shapes.Trained) -> dict[str, object]:
    rows = []
    for method, estimator in QUANTUS:
        theirs, ours = shapes.randomisation_twice(trained, method, estimator)
        rows.append([named(f"{method}:{estimator}" if method != "guided-backprop" else method),
                     f"{theirs:.2f}", f"{ours:.2f}"])  # fmt: skip
    return {"quantus_table": table(["method", "Quantus' MPRT", "`benchmarks.critics.measures.cascade`"], rows)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.critics", description=__doc__)
    parser.add_argument("--write", type=Path, help="the folder for the page and its figures")
    options = parser.parse_args()
    begun = time.monotonic()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.write or Path(temporary)
        it = photographs.setting(Path(temporary))
        patterns = it.patterns(it.network)
        measured: dict[str, object] = {
            **other_classes(it, patterns),
            **ways_back(it, patterns, folder),
            **randomisation(it, patterns, folder),
            **suppressors(folder),
            "carried": CARRIED,
            "backward": BACKWARD,
            "refitted": REFITTED,
            "photographs": len(it.photographs),
            "crops": photographs.CROPS,
            "size": photographs.SIZE,
            "minutes": f"{(time.monotonic() - begun) / 60:.0f}",
            "threads": torch.get_num_threads(),
            "trained": shapes.TRAINED,
            "explained": shapes.EXPLAINED,
            "seeds": shapes.SEEDS,
            "draws": shapes.DRAWS,
            "shift_size": shapes.SHIFT,
        }
        text = Path(__file__).with_name("page.md").read_text().format(**measured)
        print(text)
        if options.write:
            (folder / "critics.md").write_text(text)


if __name__ == "__main__":
    main()
