"""Compiled fits and explanations. On a CPU, compiling needs g++."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from benchmarks.explaining import FIVE, random_patterns
from benchmarks.fitting import FITS, make_observer
from benchmarks.machine import peak
from benchmarks.timing import Bench, Row, Variant, infer
from patterns import Explainer, trace
from patterns.compilation import CUDA_GRAPHS

DEFAULT = next(iter(FITS))


def measure_compiled(bench: Bench) -> Iterator[Row]:
    """Compare the default fit, PatternAttribution and five methods with a forward pass and the same uncompiled."""
    suffix = f"compiled ({bench.mode})"
    for name, model, images in bench.models():
        network = trace(model, images[:2])
        patterns, size = random_patterns(network), len(images)
        variants: dict[str, Variant] = {"forward": partial(infer, model, images)}
        for what, methods in {FIVE[-1]: FIVE[-1:], f"{', '.join(FIVE)}, one forward pass": FIVE}.items():
            plain, made = (Explainer(network, patterns, methods) for _ in range(2))
            made.compile(size, bench.mode)
            variants |= {what: partial(plain, images), f"{what}, {suffix}": partial(made, images)}
        what = f"fit, {DEFAULT}"
        before, after = (make_observer(network, *FITS[DEFAULT]) for _ in range(2))
        after.compile(size, bench.mode)
        variants |= {what: partial(before.update, images), f"{what}, {suffix}": partial(after.update, images)}

        timed = bench.timed(variants, min(3, bench.rounds), measured=False)
        if bench.mode != CUDA_GRAPHS:  # CUDA graphs allocate their memory before
            timed = {key: replace(found, peak=peak(variants[key], bench.device)) for key, found in timed.items()}
        yield bench.row(f"{name}: {what}, {suffix}", timed[f"{what}, {suffix}"], "forward", timed["forward"])
        for key in list(timed)[1::2]:
            yield bench.row(f"{name}: {key}, {suffix}", timed[f"{key}, {suffix}"], "the same, uncompiled", timed[key])
