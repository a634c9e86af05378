"""From the rows of all shards to the tables. Each process holds only some rows of a few classes at a time.

Tasks count the samples of each class, then each summarizes a range of classes over all shards in their order. The
ranges depend on the counts only, so that any number of workers gives the same tables.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from patterns.io import temporary_path, write_table
from ray_jobs.config import AtlasConfig
from ray_jobs.engine.ray_tasks import Tasks
from ray_jobs.io.object_store import Location, locate, publish
from ray_jobs.jobs.atlas.class_statistics import (
    NO_LABEL,
    SAMPLES,
    ChannelTops,
    ClassState,
    Group,
    GroupResult,
    Settings,
    summarize_group,
)
from ray_jobs.jobs.atlas.rows import RowShape
from ray_jobs.jobs.atlas.statistics import RunningMoments, decode_numbers
from ray_jobs.jobs.atlas.tables import (
    SUSPICIOUS,
    Keys,
    anomaly_table,
    channel_table,
    class_table,
    cluster_rows,
    cluster_table,
    confusion_table,
    make_class_schema,
    make_confusion_schema,
)
from ray_jobs.runs.atlas_files import ANOMALIES, CHANNELS, CLASSES, CLUSTERS, CONFUSIONS, SAMPLES_FILE

COUNTED_FILES = 32  # files of one task that counts
MIN_GROUP = 4096  # samples of a group, unless a single class has more
MAX_GROUPS = 64  # each group reads the footers of all files
GROUP_BYTES = 256 << 20  # of the sums of a group

Counts = dict[tuple[int, int, int], int]  # samples by class, label and prediction


def reduce_rows(
    files: Sequence[str], shape: RowShape, config: AtlasConfig, folder: Location, tasks: Tasks
) -> dict[str, Any]:
    """Write the tables of an atlas, and return the entries of the manifest.

    Args:
        files: The files of rows, in the order of the shards.
        shape: The sizes of the rows.
        config: The job.
        folder: The folder of the tables.
        tasks: Runs functions on the cluster.
    """
    offsets, counts = count_rows(files, tasks)
    operators = tuple(shape.channels)
    clustered = (config.cluster_operator or operators[-1]) if config.cluster_by == "channels" else None
    settings = Settings(config.top, config.seed, config.neighbors, config.max_clusters, clustered)
    groups = make_groups(counts, shape)
    results = tasks.map(summarize_group, ((files, offsets, group, shape, settings) for group in groups))
    states: list[ClassState] = []
    tops: dict[str, ChannelTops] = {}
    total, means = RunningMoments.zero(shape.side**2), dict[str, RunningMoments]()
    with publish(folder) as local:
        with (
            temporary_path(local / SAMPLES_FILE) as samples_path,
            pq.ParquetWriter(samples_path, SAMPLES) as samples,
            temporary_path(local / CONFUSIONS) as confusions_path,
            pq.ParquetWriter(confusions_path, make_confusion_schema(shape)) as confusions,
        ):
            for result in results:
                samples.write_table(result.samples)
                confusions.write_table(confusion_table(result, counts, shape))
                tops = merge_tops(tops, result, config.top)
                for state in result.classes:
                    total.merge(state.totals.maps)
                    add_channels(means, state)
                    states.append(state)
            samples.close()
            keys = find_keys(str(samples_path), states, tops)
        rows = cluster_rows(states, shape)
        write_table(local / CLUSTERS, *one(cluster_table(rows, keys, shape)))
        write_table(local / ANOMALIES, *one(anomaly_table(rows, states, keys)))
        suspicion: dict[int, float] = {}
        for row in rows:  # the most suspicious one first
            suspicion.setdefault(row["class"], row["suspicion"])
        chunks = (class_table(states[k : k + 64], suspicion, keys, shape) for k in range(0, len(states), 64))
        write_table(local / CLASSES, make_class_schema(shape), chunks)
        if operators:
            write_table(local / CHANNELS, *one(channel_table(tops, states, means, keys)))
    return {
        "samples": sum(counts.values()),
        "side": shape.side,
        "channels": dict(shape.channels),
        "clusters": sum(len(state.clusters) for state in states),
        "suspicious": sum(row["p"] is not None and row["p"] <= SUSPICIOUS for row in rows),
        "mean_map": total.mean.tolist(),
        **describe_borders(total.mean, shape.side),
    }


def one(table: pa.Table) -> tuple[pa.Schema, list[pa.Table]]:
    """Return the arguments of `write_table` for one table."""
    return table.schema, [table]


def count_rows(files: Sequence[str], tasks: Tasks) -> tuple[list[int], Counts]:
    """Return the number in the dataset of the first sample of each file, and the number of samples by kind."""
    parts = [files[k : k + COUNTED_FILES] for k in range(0, len(files), COUNTED_FILES)]
    offsets, counts = [0], Counts()
    for sizes, found in tasks.map(count_files, ((part,) for part in parts)):
        for size in sizes:
            offsets.append(offsets[-1] + size)
        for kind, count in found.items():
            counts[kind] = counts.get(kind, 0) + count
    return offsets[:-1], counts


def count_files(files: Sequence[str]) -> tuple[list[int], Counts]:
    """Return the number of samples of some files, and their number by class, label and prediction; runs in a task."""
    sizes, counts = [], Counts()
    for file in files:
        with locate(file).open("rb") as opened:
            table = pq.read_table(opened, columns=["class", "label", "prediction"])
        sizes.append(len(table))
        filled = {name: pc.fill_null(table[name], NO_LABEL) for name in table.column_names}
        grouped = pa.table(filled).group_by(list(filled), use_threads=False).aggregate([([], "count_all")])
        for row in grouped.to_pylist():
            kind = row["class"], row["label"], row["prediction"]
            counts[kind] = counts.get(kind, 0) + row["count_all"]
    return sizes, counts


def make_groups(counts: Counts, shape: RowShape) -> Iterator[Group]:
    """Yield ranges of classes with about equally many samples, and sums of bounded size."""
    by_class: dict[int, dict[tuple[int, int], int]] = {}
    for (number, label, prediction), count in sorted(counts.items()):
        by_class.setdefault(number, {})[label, prediction] = count
    limit = max(MIN_GROUP, sum(counts.values()) // MAX_GROUPS)
    each = 16 * (shape.side**2 + sum(shape.channels.values()))  # the bytes of a mean and a variance
    group, size, bytes_ = Group({}, {}), 0, 0
    for number, pairs in by_class.items():
        more, more_bytes = sum(pairs.values()), each * (1 + sum(count > 1 for count in pairs.values()))
        if group.classes and (size + more > limit or bytes_ + more_bytes > GROUP_BYTES):
            yield group
            group, size, bytes_ = Group({}, {}), 0, 0
        group.classes[number], group.pairs[number] = more, pairs
        size, bytes_ = size + more, bytes_ + more_bytes
    if group.classes:
        yield group


def merge_tops(tops: dict[str, ChannelTops], result: GroupResult, count: int) -> dict[str, ChannelTops]:
    """Return the top samples of the channels, merged with the top samples of a group."""
    return {name: found.merge(tops[name], count) if name in tops else found for name, found in result.tops.items()}


def add_channels(means: dict[str, RunningMoments], state: ClassState) -> None:
    """Add the channel relevance of a class to the channel relevance of the dataset."""
    for name, moments in state.totals.channels.items():
        means.setdefault(name, RunningMoments.zero(len(moments.mean))).merge(moments)


def find_keys(path: str, states: Sequence[ClassState], tops: Mapping[str, ChannelTops]) -> Keys:
    """Return the shard and the key of every sample that some list names, from the table of samples."""
    lists = [each for state in states for each in (state.typical, state.untypical, *state.prototypes)]
    lists += [each.reshape(-1) for top in tops.values() for each in (top.relevance, top.activation)]
    wanted = np.unique(np.concatenate([np.zeros(0, np.int64), *(decode_numbers(ranks) for ranks in lists)]))
    keys: Keys = {}
    for batch in pq.ParquetFile(path).iter_batches(columns=["number", "shard", "key"]):
        chosen = np.flatnonzero(np.isin(batch["number"].to_numpy(), wanted))
        if len(chosen):
            for row in batch.take(pa.array(chosen)).to_pylist():
                keys[row["number"]] = {"shard": row["shard"], "key": row["key"]}
    return keys


def describe_borders(mean_map: np.ndarray, side: int) -> dict[str, Any]:
    """Return the share of the relevance in the outermost cells and in the corners, and that of a uniform map."""
    mass = np.abs(mean_map.reshape(side, side))
    total = max(float(mass.sum()), 1e-30)
    border = np.ones((side, side), bool)
    border[1:-1, 1:-1] = False
    corner = np.zeros((side, side), bool)
    quarter = max(1, side // 7)
    for rows in (slice(None, quarter), slice(-quarter, None)):
        for columns in (slice(None, quarter), slice(-quarter, None)):
            corner[rows, columns] = True
    return {
        name: {"share": float(mass[mask].sum()) / total, "uniform": float(mask.mean())}
        for name, mask in (("border", border), ("corners", corner))
    }
