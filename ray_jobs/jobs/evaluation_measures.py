"""The measures of the evaluate job.

To add a measure, write its formula in `patterns.evaluation`, and a class with the methods of `Measure` and a row of
`MEASURES` here. Add its name to `MEASURES` in `ray_jobs/config/jobs.py`, which the command line reads.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from patterns import Explainer, Explanation, Network, contrast
from patterns.evaluation import (
    absorb_shift,
    compute_relevance,
    cosine,
    draw_quadruples,
    find_shift_obstacle,
    heat,
    make_grids,
    pointing_shares,
    shift_sensitivity,
    spearman,
)
from ray_jobs.config import EvaluateConfig
from ray_jobs.data.shard_reader import Batch
from ray_jobs.jobs.degrade import compute_curves
from ray_jobs.jobs.refitting import randomize_share
from ray_jobs.models.loading import TracedModel

MAX_POINTED = 64  # samples of a shard that are kept for its grids, as images of half the size
SHIFT = 1.0  # the constant that is added to the first channel, in standard deviations of the dataset


@dataclass(frozen=True)
class Result:
    """One value of a measure.

    Attributes:
        method: The method.
        key: The sample's key.
        value: The value.
    """

    method: str
    key: str
    value: float


@dataclass(frozen=True)
class Context:
    """The job, the model and the explainers that a measure uses.

    Attributes:
        config: The job.
        model: The model, on the worker's device.
        explainer: The explainer of its methods.
        make_explainer: Returns an explainer of the same methods for another network. If the second argument is true, it
            uses the patterns that were fitted to the network with random weights in all operators; otherwise it uses
            the patterns of the trained network.
        make_seeds: Returns the seeds of the samples with some keys.
    """

    config: EvaluateConfig
    model: TracedModel
    explainer: Explainer
    make_explainer: Callable[[Network, bool], Explainer]
    make_seeds: Callable[[Sequence[str]], list[int]]

    def explain(
        self, explainer: Explainer, images: Tensor, keys: Sequence[str], classes: Tensor | None = None
    ) -> Explanation:
        """Explain one class of each image, alone or against all other classes, as the config's `target` says.

        Args:
            explainer: The explainer.
            images: The images, shape (N, C, H, W).
            keys: Their keys, from which the seeds follow.
            classes: The classes, int64 (N,); None: the predicted classes.
        """
        if self.config.target == "contrast":
            return explainer(images, lambda scores: contrast(scores, classes), self.make_seeds(keys))
        return explainer(images, classes, self.make_seeds(keys))


@dataclass(frozen=True)
class Explained:
    """A batch with the maps of the predicted classes.

    Attributes:
        batch: The batch.
        images: Its images on the model's device.
        explanation: The maps.
    """

    batch: Batch
    images: Tensor
    explanation: Explanation

    @property
    def predictions(self) -> Tensor:
        """The predicted classes, int64 (N,)."""
        return self.explanation.scores.argmax(1)


class Measure(Protocol):
    """A measure of maps, for one worker. Its values depend on the shard only."""

    def add(self, explained: Explained) -> Iterator[Result | None]:
        """Yield the values of a batch. A slow measure also yields None, so that the worker can report its progress."""

    def finish(self) -> Iterator[Result]:
        """Yield the values that need the whole shard, and discard the values that were kept for them."""


def results(explained: Explained, method: str, values: Tensor) -> Iterator[Result]:
    """Yield the values of a batch for a method."""
    yield from (Result(method, key, value) for key, value in zip(explained.batch.keys, values.tolist()))


@dataclass
class PerBatch:
    """Base class of measures whose values need one batch only."""

    context: Context

    def finish(self) -> Iterator[Result]:
        """Yield nothing."""
        return iter(())


class Degradation(PerBatch):
    """The area over the degradation curve (Samek et al. 2016): how fast the prediction falls."""

    def add(self, explained: Explained) -> Iterator[Result | None]:
        """Yield the area of each sample."""
        context = self.context
        for found in compute_curves(context.model, context.config, explained.images, explained.explanation):
            if found is None:
                yield None
            else:
                yield from results(explained, found.method, found.areas)


class ClassSensitivity(PerBatch):
    """The cosine of the maps for the two classes with the highest scores: 1 if a map does not depend on the class.

    Two maps of zeros count as equal, and one map of zeros as not correlated with the other.
    """

    def add(self, explained: Explained) -> Iterator[Result | None]:
        """Yield the cosine of each sample."""
        second = explained.explanation.scores.topk(2).indices[:, 1]
        context, keys = self.context, explained.batch.keys
        others = context.explain(context.explainer, explained.images, keys, second)
        for method, maps in explained.explanation.maps.items():
            equal = (maps == others.maps[method]).flatten(1).all(1)
            values = cosine(maps, others.maps[method]).nan_to_num(0.0)
            yield from results(explained, method, torch.where(equal, 1.0, values))


class Randomization(PerBatch):
    """The rank correlation of maps with the maps of a network with random weights.

    As Adebayo et al. 2018: a share of the trained operators, counted from the last one, gets new random weights.
    """

    share: float
    refitted = False

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        network = randomize_share(context.model.network, self.share, context.config.seed)
        self.explainer = context.make_explainer(network, self.refitted)

    def add(self, explained: Explained) -> Iterator[Result | None]:
        """Yield the correlation of each sample; a constant map counts as not correlated."""
        keys, predictions = explained.batch.keys, explained.predictions
        others = self.context.explain(self.explainer, explained.images, keys, predictions)
        for method, maps in explained.explanation.maps.items():
            correlation = spearman(heat(maps), heat(others.maps[method]))
            yield from results(explained, method, correlation.nan_to_num(0.0))


class RandomizedTop(Randomization):
    """Randomization of the last trained operator."""

    share = 0.0


class RandomizedHalf(Randomization):
    """Randomization of the upper half of the trained operators."""

    share = 0.5


class RandomizedAll(Randomization):
    """Randomization of all trained operators."""

    share = 1.0


class Refitted(RandomizedAll):
    """Randomization of all trained operators, with patterns that were fitted to the random weights."""

    refitted = True


class ShiftSensitivity(PerBatch):
    """The relative change of maps if a constant is added to the input and the first bias absorbs it.

    The network's outputs stay the same (Kindermans et al. 2017, arXiv 1711.00867).
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        network = context.model.network
        self.shift = network.like.new_zeros((network.input_shape[0], *[1] * (len(network.input_shape) - 1)))
        self.shift[0] = SHIFT
        self.explainer = context.make_explainer(absorb_shift(network, self.shift), False)

    def add(self, explained: Explained) -> Iterator[Result | None]:
        """Yield the change of each sample's map."""
        keys, predictions = explained.batch.keys, explained.predictions
        others = self.context.explain(self.explainer, explained.images + self.shift, keys, predictions)
        for method, maps in explained.explanation.maps.items():
            yield from results(explained, method, shift_sensitivity(maps, others.maps[method]).nan_to_num(0.0))


@dataclass
class Pointing:
    """The grid pointing game (Rao et al. 2022): the share of positive relevance in the right quarter of a grid.

    Grids are composed of four images of one shard, at half the size, that the model classifies correctly.
    """

    context: Context
    kept: list[tuple[str, int, Tensor]] = field(default_factory=list)

    def add(self, explained: Explained) -> Iterator[Result | None]:
        """Keep the samples of a batch that are classified correctly."""
        small = F.interpolate(explained.images.float(), scale_factor=0.5, mode="bilinear", antialias=True)
        rows = zip(explained.batch.keys, explained.batch.labels, explained.predictions.tolist(), small)
        right = [(key, prediction, image) for key, label, prediction, image in rows if label == prediction]
        self.kept += right[: MAX_POINTED - len(self.kept)]
        return iter(())

    def finish(self) -> Iterator[Result]:
        """Yield the share of each quarter of each grid. There are as many grids as kept samples."""
        kept, self.kept = self.kept, []
        if len({label for _, label, _ in kept}) < 4:
            return
        context, classes = self.context, torch.tensor([label for _, label, _ in kept])
        for four in draw_quadruples(classes, len(kept), context.config.seed).tolist():
            grid = make_grids(torch.stack([kept[i][2] for i in four])[None]).to(context.model.network.like)
            keys, quarters = [kept[i][0] for i in four], torch.arange(4)
            targets = classes[four].to(grid.device)
            found = context.explain(context.explainer, grid.expand(4, -1, -1, -1), keys, targets)
            for method, maps in found.maps.items():
                shares = pointing_shares(compute_relevance(method, maps).cpu(), quarters).tolist()
                yield from (Result(method, key, share) for key, share in zip(keys, shares))


@dataclass(frozen=True)
class Row:
    """A row of `MEASURES`.

    Attributes:
        make: Makes the measure for a worker.
        title: The column's title.
        higher_is_better: Whether a higher value is better.
        obstacle: Returns the reason why a network cannot be measured; None if it can.
        missing: The reason that is reported if no sample has a value.
        refitted: Whether it needs patterns that were fitted to random weights.
    """

    make: Callable[[Context], Measure]
    title: str
    higher_is_better: bool
    obstacle: Callable[[Network], str | None] = lambda network: None
    missing: str = "no sample has a value"
    refitted: bool = False


def find_size_obstacle(network: Network) -> str | None:
    """Return why grids cannot be composed for a network; None if they can."""
    _, *sides = network.input_shape
    return None if len(sides) == 2 and not any(side % 2 for side in sides) else "its input has no even height and width"


NO_GRID = "no shard has samples of four classes that have a label and are classified correctly"
MEASURES: dict[str, Row] = {
    "degradation": Row(Degradation, "area over the degradation curve", True),
    "pointing": Row(Pointing, "grid pointing game", True, find_size_obstacle, NO_GRID),
    "class": Row(ClassSensitivity, "cosine of the maps of two classes", False),
    "random-top": Row(RandomizedTop, "rank correlation, last weights random", False),
    "random-half": Row(RandomizedHalf, "rank correlation, upper half random", False),
    "random-all": Row(RandomizedAll, "rank correlation, all weights random", False),
    "random-all-refit": Row(Refitted, "rank correlation, all weights random, patterns refitted", False, refitted=True),
    "shift": Row(ShiftSensitivity, "change by a constant shift of the input", False, find_shift_obstacle),
}
