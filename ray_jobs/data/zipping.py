"""Input samples beside their explanations, for those who train on or look at both."""

from collections.abc import Iterable, Iterator
from typing import Any

from patterns import UserError

Sample = dict[str, Any]


def zipped(inputs: Iterable[Sample], explanations: Iterable[Sample]) -> Iterator[tuple[Sample, Sample]]:
    """Each explained sample of a shard and its explanation, as WebDataset reads the two shards, unshuffled.

    An input that was refused has no explanation and is left out. UserError where an explanation's input is not there.
    """
    left = iter(explanations)
    explained = next(left, None)
    for sample in inputs:
        if explained is None:
            return
        if sample["__key__"] == explained["__key__"]:
            yield sample, explained
            explained = next(left, None)
    if explained is not None:
        key = explained["__key__"]
        raise UserError(key, "explained, but not among the inputs", "Zip a shard with its own explanations, in order.")
