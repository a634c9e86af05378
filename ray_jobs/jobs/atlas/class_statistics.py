"""The statistics of some classes, from two passes over the rows of all shards in their order.

The first pass takes means, variances and top samples, and keeps a bounded part of each class for clustering. The second
one measures the distance of each sample to the center of its class and of its cluster. Memory depends on the number of
classes, not on the number of samples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_jobs.io.object_store import locate
from ray_jobs.jobs.atlas.clustering import Clustering, cluster_class, single_thread
from ray_jobs.jobs.atlas.rows import (
    SCALARS,
    RowShape,
    activation_column,
    list_values,
    mass_column,
    read_classes,
    relevance_column,
)
from ray_jobs.jobs.atlas.statistics import RunningMoments, encode_ranks, merge_top

MAX_CLUSTERED = 5000  # samples of a class that are clustered by the spectrum; discriminants assign the others
Pair = tuple[int, int]  # label (NO_LABEL: none) and prediction (likewise)
NO_LABEL = -1
MAX_READ, READ_BYTES = 4096, 64 << 20  # rows that are worked on together


@dataclass(frozen=True)
class Settings:
    """How classes are summarized.

    Attributes:
        top: Samples of each list.
        seed: The seed; that of a class is derived from it and the class.
        neighbors: See `cluster_class`.
        max_clusters: See `cluster_class`.
        clustered: The operator whose channels are clustered; None: the maps are.
    """

    top: int
    seed: int
    neighbors: int
    max_clusters: int
    clustered: str | None = None


@dataclass(frozen=True)
class Group:
    """A range of classes that one task summarizes.

    Attributes:
        classes: The number of samples of each class.
        pairs: The number of samples of each pair of label and prediction, by class.
    """

    classes: dict[int, int]
    pairs: dict[int, dict[Pair, int]]


@dataclass
class Totals:
    """Sums over the samples of a class or a pair.

    Attributes:
        maps: Moments of the pooled maps.
        channels: Moments of the channel relevance, by operator.
        numbers: By column, the number of values that are not null and their sum.
    """

    maps: RunningMoments
    channels: dict[str, RunningMoments]
    numbers: dict[str, tuple[int, float]] = field(default_factory=dict)

    @classmethod
    def zero(cls, shape: RowShape) -> "Totals":
        """Return the totals of no sample."""
        channels = {name: RunningMoments.zero(size) for name, size in shape.channels.items()}
        return cls(RunningMoments.zero(shape.side**2), channels)

    def update(self, rows: "Rows", chosen: np.ndarray) -> None:
        """Add some rows of a table."""
        self.maps.update(rows.maps[chosen])
        for name, moments in self.channels.items():
            moments.update(rows.relevance(name)[chosen])
        for name in ("score", "loss", "probability"):
            values = rows.numbers(name)[chosen]
            values = values[~np.isnan(values)]
            count, total = self.numbers.get(name, (0, 0.0))
            self.numbers[name] = count + len(values), total + float(values.astype(np.float64).sum())

    def mean(self, name: str) -> float | None:
        """Return the mean of a column; None without values."""
        count, total = self.numbers.get(name, (0, 0.0))
        return total / count if count else None


class Rows:
    """Rows of a table as arrays, made when they are needed.

    Args:
        table: The rows, with the number of each sample in the dataset.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table, self.classes = table, table["class"].to_numpy()
        self.samples = table["number"].to_numpy()
        self.maps = list_values(table, "map")
        self._relevance: dict[str, np.ndarray] = {}

    def relevance(self, operator: str) -> np.ndarray:
        """Return the relevance of the channels of an operator as shares, float16 (N, K)."""
        if operator not in self._relevance:
            self._relevance[operator] = list_values(self.table, relevance_column(operator))
        return self._relevance[operator]

    def numbers(self, column: str) -> np.ndarray:
        """Return a column of numbers as float32; NaN for null."""
        return self.table[column].to_numpy(zero_copy_only=False).astype(np.float32)

    def classes_or_none(self, column: str) -> np.ndarray:
        """Return a column of classes as int64; `NO_LABEL` for null."""
        return self.table[column].fill_null(NO_LABEL).to_numpy()


@dataclass
class ChannelTops:
    """The ranks of the top samples of the channels of an operator, int64 (top, K); see `encode_ranks`."""

    relevance: np.ndarray
    activation: np.ndarray

    @classmethod
    def empty(cls, channels: int) -> "ChannelTops":
        """Return the tops of no sample."""
        return cls(np.zeros((0, channels), np.int64), np.zeros((0, channels), np.int64))

    def merge(self, other: "ChannelTops", count: int) -> "ChannelTops":
        """Return the tops of both."""
        return ChannelTops(
            merge_top(self.relevance, other.relevance, count), merge_top(self.activation, other.activation, count)
        )


@dataclass
class ClassState:
    """State of a class during the two passes.

    Attributes:
        number: The class.
        totals: Its totals.
        chosen: Which of its samples are clustered, bool, in the order of the rows.
        kept: The features of these samples.
        clustering: Its clusters, after the first pass.
        seen: Samples that the current pass has seen.
    """

    number: int
    totals: Totals
    chosen: np.ndarray
    kept: list[np.ndarray] = field(default_factory=list)
    clustering: Clustering | None = None
    seen: int = 0
    typical: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    untypical: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    clusters: list[Totals] = field(default_factory=list)
    prototypes: list[np.ndarray] = field(default_factory=list)
    labels: list[dict[int, int]] = field(default_factory=list)
    predictions: list[dict[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class GroupResult:
    """The statistics of a group.

    Attributes:
        classes: The states of its classes, in ascending order, without the features of samples.
        pairs: The totals of each pair with at least two samples, by class.
        samples: A row for each sample, by class; the columns of `SAMPLES`.
        tops: The tops of the channels, by operator.
    """

    classes: list[ClassState]
    pairs: dict[int, dict[Pair, Totals]]
    samples: pa.Table
    tops: dict[str, ChannelTops]


COPIED = ("shard", "key", "class", "label", "prediction", "probability", "score", "loss")
SAMPLES = pa.schema(
    [
        ("number", pa.int64()),
        *(SCALARS.field(name) for name in COPIED),
        ("cluster", pa.int32()),
        ("distance", pa.float32()),
        ("x", pa.float32()),
        ("y", pa.float32()),
    ]
)


def read_group(files: Sequence[str], offsets: Sequence[int], group: Group, columns: Sequence[str]) -> Iterator[Rows]:
    """Yield the rows of a group's classes in the order of the files, many at a time and sorted by class."""
    first, last = min(group.classes), max(group.classes)
    waiting: list[pa.Table] = []
    for file, offset in zip(files, offsets):
        with locate(file).open("rb") as opened:
            for table in read_classes(opened, first, last, columns):
                waiting.append(table.append_column("number", pc.add(table["position"], offset)))
        if sum(map(len, waiting)) >= MAX_READ or sum(each.nbytes for each in waiting) >= READ_BYTES:
            yield join(waiting)
            waiting = []
    if waiting:
        yield join(waiting)


def join(tables: list[pa.Table]) -> Rows:
    """Return the rows of some tables, sorted by class and number."""
    table = pa.concat_tables(tables)
    return Rows(table.take(pc.sort_indices(table, [("class", "ascending"), ("number", "ascending")])))


@single_thread()
def summarize_group(
    files: Sequence[str], offsets: Sequence[int], group: Group, shape: RowShape, settings: Settings
) -> GroupResult:
    """Return the statistics of the classes of a group; runs in a task.

    Args:
        files: The files of rows, in the order of the shards.
        offsets: The number in the dataset of each file's first sample.
        group: The classes.
        shape: The sizes of the rows.
        settings: How they are summarized.
    """
    states = {number: make_state(number, count, shape, settings) for number, count in group.classes.items()}
    pairs = {
        number: {pair: Totals.zero(shape) for pair, count in found.items() if count > 1}
        for number, found in group.pairs.items()
    }
    tops = {
        name: ChannelTops(*(np.zeros((0, size), np.int64) for _ in range(2))) for name, size in shape.channels.items()
    }
    scalars = [name for name in SCALARS.names if name != "map_mass"]
    lists = [each(name) for name in shape.channels for each in (relevance_column, activation_column, mass_column)]
    for rows in read_group(files, offsets, group, [*scalars, "map", *lists]):
        for number in np.unique(rows.classes).tolist():
            where = np.flatnonzero(rows.classes == number)
            states[number].totals.update(rows, where)
            keep(states[number], features_of(rows, where, settings))
            update_pairs(pairs[number], rows, where)
        tops = {name: tops[name].merge(rank_channels(rows, name), settings.top) for name in tops}
    for state in states.values():
        finish_first_pass(state, shape, settings)
    needed = [] if settings.clustered is None else [relevance_column(settings.clustered)]
    tables = {number: [] for number in states}  # type: dict[int, list[pa.Table]]
    for rows in read_group(files, offsets, group, [*scalars, "map", *needed]):
        for number in np.unique(rows.classes).tolist():
            where = np.flatnonzero(rows.classes == number)
            tables[number].append(place_samples(states[number], rows, where, shape, settings))
    listed = [table for number in sorted(states) for table in tables[number]]
    return GroupResult([states[number] for number in sorted(states)], pairs, pa.concat_tables(listed), tops)


def make_state(number: int, count: int, shape: RowShape, settings: Settings) -> ClassState:
    """Return the state of a class before the first pass."""
    chosen = np.ones(count, bool)
    if count > MAX_CLUSTERED:
        order = np.random.default_rng([settings.seed, number]).permutation(count)
        chosen[order[MAX_CLUSTERED:]] = False
    return ClassState(number, Totals.zero(shape), chosen)


def features_of(rows: Rows, where: np.ndarray, settings: Settings) -> np.ndarray:
    """Return the vectors by which samples are clustered, float16 (N, D)."""
    return rows.maps[where] if settings.clustered is None else rows.relevance(settings.clustered)[where]


def keep(state: ClassState, features: np.ndarray) -> None:
    """Keep the features of the samples that are to be clustered."""
    chosen = state.chosen[state.seen : state.seen + len(features)]
    state.kept.append(features[chosen])
    state.seen += len(features)


def update_pairs(pairs: dict[Pair, Totals], rows: Rows, where: np.ndarray) -> None:
    """Add rows to the totals of their pairs."""
    both = np.stack([rows.classes_or_none("label")[where], rows.classes_or_none("prediction")[where]], 1)
    for label, prediction in np.unique(both, axis=0).tolist():
        if (label, prediction) in pairs:
            pairs[label, prediction].update(rows, where[(both == (label, prediction)).all(1)])


def rank_channels(rows: Rows, operator: str) -> ChannelTops:
    """Return the ranks of the channels of all rows."""
    mass = rows.numbers(mass_column(operator))
    relevance = rows.relevance(operator).astype(np.float32) * mass[:, None]
    activation = list_values(rows.table, activation_column(operator)).astype(np.float32)
    return ChannelTops(encode_ranks(relevance, rows.samples), encode_ranks(activation, rows.samples))


def finish_first_pass(state: ClassState, shape: RowShape, settings: Settings) -> None:
    """Cluster a class, and prepare its second pass."""
    features = np.concatenate(state.kept)
    seed = int(np.random.default_rng([settings.seed, state.number]).integers(2**31))
    state.clustering = cluster_class(features, seed, settings.neighbors, settings.max_clusters)
    count = state.clustering.count
    state.kept, state.seen = [], 0
    state.clusters = [Totals.zero(RowShape(shape.side, {})) for _ in range(count)]
    state.prototypes = [np.zeros(0, np.int64) for _ in range(count)]
    state.labels, state.predictions = [{} for _ in range(count)], [{} for _ in range(count)]


def place_samples(state: ClassState, rows: Rows, where: np.ndarray, shape: RowShape, settings: Settings) -> pa.Table:
    """Add rows to the statistics of their class's clusters, and return their rows of the table of samples."""
    clustering = state.clustering
    assert clustering is not None
    chosen = state.chosen[state.seen : state.seen + len(where)]
    before = int(state.chosen[: state.seen].sum())
    state.seen += len(where)
    placed = clustering.place(features_of(rows, where, settings))
    clusters = placed.clusters
    clusters[chosen] = clustering.labels[before : before + int(chosen.sum())]
    distances = np.linalg.norm(rows.maps[where].astype(np.float64) - state.totals.maps.mean, axis=1)
    samples = rows.samples[where]
    state.untypical = merge_top(state.untypical, encode_ranks(distances, samples), settings.top)
    state.typical = merge_top(state.typical, encode_ranks(-distances, samples), settings.top)
    from_center = np.take_along_axis(placed.distances, clusters[:, None], 1)[:, 0]
    labels, predictions = rows.classes_or_none("label")[where], rows.classes_or_none("prediction")[where]
    for cluster in np.unique(clusters).tolist():
        inside = clusters == cluster
        state.clusters[cluster].update(rows, where[inside])
        ranks = encode_ranks(-from_center[inside], samples[inside])
        state.prototypes[cluster] = merge_top(state.prototypes[cluster], ranks, settings.top)
        count_into(state.labels[cluster], labels[inside])
        count_into(state.predictions[cluster], predictions[inside])
    columns: dict[str, Any] = {name: rows.table[name].take(pa.array(where)) for name in COPIED}
    columns |= {"number": samples, "cluster": clusters.astype(np.int32), "distance": distances.astype(np.float32)}
    columns |= {"x": placed.plane[:, 0].astype(np.float32), "y": placed.plane[:, 1].astype(np.float32)}
    return pa.table([columns[name] for name in SAMPLES.names], schema=SAMPLES)


def count_into(counts: dict[int, int], values: np.ndarray) -> None:
    """Add the number of each value to counts."""
    for value, count in zip(*np.unique(values, return_counts=True)):
        counts[int(value)] = counts.get(int(value), 0) + int(count)
