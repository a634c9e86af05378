"""What `--compile` makes of a fit and of explanations. On a CPU it needs g++."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from benchmarks.explaining import FIVE, patterns_for
from benchmarks.fitting import FITS, observer_of
from benchmarks.machine import peak
from benchmarks.timing import Bench, Row, Variant, infer
from patterns import Explainer, trace
from patterns.compilation import CUDA_GRAPHS

DEFAULT = next(iter(FITS))


def compiled(bench: Bench) -> Iterator[Row]:
    """The default fit, PatternAttribution, and five methods, against a plain forward and the same uncompiled."""
    done = f"compiled ({bench.mode})"
    for name, model, images in bench.models():
        network = trace(model, images[:2])
        patterns, size = patterns_for(network), len(images)
        variants: dict[str, Variant] = {"forward": partial(infer, model, images)}
        for what, methods in {FIVE[-1]: FIVE[-1:], f"{', '.join(FIVE)}, one forward pass": FIVE}.items():
            plain, made = (Explainer(network, patterns, methods) for _ in range(2))
            made.compile(size, bench.mode)
            variants |= {what: partial(plain, images), f"{what}, {done}": partial(made, images)}
        what = f"fit, {DEFAULT}"
        before, after = (observer_of(network, *FITS[DEFAULT]) for _ in range(2))
        after.compile(size, bench.mode)
        variants |= {what: partial(before.update, images), f"{what}, {done}": partial(after.update, images)}

        timed = bench.timed(variants, min(3, bench.rounds), measured=False)
        if bench.mode != CUDA_GRAPHS:  # whose memory was taken before
            timed = {key: replace(found, peak=peak(variants[key], bench.device)) for key, found in timed.items()}
        yield bench.row(f"{name}: {what}, {done}", timed[f"{what}, {done}"], "forward", timed["forward"])
        for key in list(timed)[1::2]:
            yield bench.row(f"{name}: {key}, {done}", timed[f"{key}, {done}"], "the same, uncompiled", timed[key])
