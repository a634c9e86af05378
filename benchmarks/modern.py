"""Networks with smooth gates, norms and attention: a fit of sampled positions, and explanations."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from benchmarks.explaining import plain_gradient, random_patterns
from benchmarks.fitting import measure_sampling
from benchmarks.timing import MODERN, Bench, Row
from patterns import Explainer, trace

METHODS = "patternattribution", "gradient"


def measure_modern(bench: Bench) -> Iterator[Row]:
    """Measure the modern networks, whatever the models of the benchmark are."""
    for name, model, images in replace(bench, names=[*MODERN]).models():
        network = trace(model, images[:2])
        yield from measure_sampling(bench, name, model, network, images)
        targets = model(images).argmax(1)
        ours = {m: partial(Explainer(network, random_patterns(network), [m]), images, targets) for m in METHODS}
        t = bench.timed({"plain": plain_gradient(model, images), **ours}, measured=False)
        for method, target in zip(METHODS, ("≤ 1.05", "")):
            yield bench.row(f"{name}: {method}", t[method], "plain input gradient", t["plain"], target)
