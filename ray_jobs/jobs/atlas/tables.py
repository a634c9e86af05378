"""The tables of an atlas; docs/formats.md describes their columns."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ray_jobs.jobs.atlas.class_statistics import NO_LABEL, ChannelTops, ClassState, GroupResult, Totals
from ray_jobs.jobs.atlas.rows import RowShape
from ray_jobs.jobs.atlas.statistics import NONE, RunningMoments, decode_numbers, decode_values
from ray_jobs.jobs.atlas.suspicion import compute_p_values, measure_surprise

Keys = dict[int, dict[str, str]]  # from the number of a sample to its shard and key
FLOATS = pa.list_(pa.float32())
SAMPLE = pa.struct([("shard", pa.string()), ("key", pa.string()), ("value", pa.float32())])
SAMPLE_LIST = pa.list_(SAMPLE)
SUSPICIOUS = 0.05  # corrected p-value of a suspicious cluster
UNTYPICAL = 3  # untypical samples of each class in the table of anomalies


def list_samples(ranks: np.ndarray, keys: Keys, sign: float = 1.0) -> list[dict[str, Any]]:
    """Return the samples of a list of ranks (N,) with their values times a sign."""
    ranks = ranks[ranks != NONE]
    pairs = zip(decode_numbers(ranks).tolist(), (sign * decode_values(ranks)).tolist())
    return [{**keys[number], "value": value} for number, value in pairs]


def moment_fields(shape: RowShape) -> list[tuple[str, pa.DataType]]:
    """Return the columns of the means and variances of maps and of the relevance of channels."""
    names = ["map", *(f"relevance/{name}" for name in shape.channels)]
    return [(f"{kind}_{name}", FLOATS) for name in names for kind in ("mean", "variance")]


def moment_columns(totals: Totals | None, shape: RowShape) -> dict[str, list[float] | None]:
    """Return the means and variances of totals; None for both if there are no totals."""
    if totals is None:
        return {name: None for name, _ in moment_fields(shape)}
    found: dict[str, list[float] | None] = {}
    moments = {"map": totals.maps} | {f"relevance/{name}": each for name, each in totals.channels.items()}
    for name, each in moments.items():
        found |= {f"mean_{name}": each.mean.tolist(), f"variance_{name}": each.variance.tolist()}
    return found


def make_class_schema(shape: RowShape) -> pa.Schema:
    """Return the columns of classes.parquet."""
    return pa.schema(
        [
            ("class", pa.int64()),
            ("samples", pa.int64()),
            ("labelled", pa.int64()),
            ("right", pa.int64()),
            ("mean_score", pa.float64()),
            ("mean_probability", pa.float64()),
            ("mean_loss", pa.float64()),
            ("clusters", pa.int32()),
            ("suspicion", pa.float64()),
            ("typical", SAMPLE_LIST),
            ("untypical", SAMPLE_LIST),
            *moment_fields(shape),
        ]
    )


def class_table(states: Sequence[ClassState], suspicion: Mapping[int, float], keys: Keys, shape: RowShape) -> pa.Table:
    """Return rows of classes.parquet."""
    rows = []
    for state in states:
        labels: dict[int, int] = {}
        for counts in state.labels:
            for label, count in counts.items():
                labels[label] = labels.get(label, 0) + count
        totals = state.totals
        rows.append(
            {
                "class": state.number,
                "samples": totals.maps.n,
                "labelled": totals.maps.n - labels.get(NO_LABEL, 0),
                "right": labels.get(state.number, 0),
                "mean_score": totals.mean("score"),
                "mean_probability": totals.mean("probability"),
                "mean_loss": totals.mean("loss"),
                "clusters": len(state.clusters),
                "suspicion": suspicion.get(state.number),
                "typical": list_samples(state.typical, keys, -1.0),
                "untypical": list_samples(state.untypical, keys),
                **moment_columns(totals, shape),
            }
        )
    return pa.Table.from_pylist(rows, make_class_schema(shape))


def make_confusion_schema(shape: RowShape) -> pa.Schema:
    """Return the columns of confusions.parquet."""
    numbers = [(name, pa.int64()) for name in ("class", "label", "prediction", "samples")]
    means = [(f"mean_{name}", pa.float64()) for name in ("score", "probability", "loss")]
    return pa.schema([*numbers, *means, *moment_fields(shape)])


def confusion_table(result: GroupResult, counts: Mapping[tuple[int, int, int], int], shape: RowShape) -> pa.Table:
    """Return the rows of confusions.parquet for a group's classes."""
    rows = []
    wanted = {state.number for state in result.classes}
    for (number, label, prediction), count in sorted(counts.items()):
        if number in wanted:
            totals = result.pairs[number].get((label, prediction))
            rows.append(
                {
                    "class": number,
                    "label": None if label == NO_LABEL else label,
                    "prediction": None if prediction == NO_LABEL else prediction,
                    "samples": count,
                    **{f"mean_{name}": totals and totals.mean(name) for name in ("score", "probability", "loss")},
                    **moment_columns(totals, shape),
                }
            )
    return pa.Table.from_pylist(rows, make_confusion_schema(shape))


CLUSTER_FIELDS = [
    ("class", pa.int64()),
    ("cluster", pa.int32()),
    ("samples", pa.int64()),
    ("share", pa.float64()),
    ("label", pa.int64()),
    ("label_purity", pa.float64()),
    ("prediction", pa.int64()),
    ("prediction_purity", pa.float64()),
    ("mean_score", pa.float64()),
    ("mean_loss", pa.float64()),
    ("mean_probability", pa.float64()),
    ("separation", pa.float64()),
    ("surprise", pa.float64()),
    ("suspicion", pa.float64()),
    ("p", pa.float64()),
    ("place_y", pa.float64()),
    ("place_x", pa.float64()),
    ("prototypes", SAMPLE_LIST),
    ("mean_map", FLOATS),
    ("variance_map", FLOATS),
    ("gain", FLOATS),
]


def cluster_rows(states: Sequence[ClassState], shape: RowShape) -> list[dict[str, Any]]:
    """Return a row for each cluster, without its prototypes: the most suspicious one first."""
    rows = []
    for state in states:
        assert state.clustering is not None
        for number, totals in enumerate(state.clusters):
            n, all_ = totals.maps.n, state.totals.maps
            rest = (all_.mean * all_.n - totals.maps.mean * n) / max(all_.n - n, 1)
            single = len(state.clusters) == 1 or n in (0, all_.n)
            gain = np.zeros_like(rest) if single else np.maximum(totals.maps.mean - rest, 0.0)
            label, purity = find_purity(state.labels[number])
            prediction, prediction_purity = find_purity(state.predictions[number])
            y, x = np.unravel_index(int(gain.argmax()), (shape.side, shape.side))
            separation = float(state.clustering.separations[number])
            surprise = 0.0 if single else measure_surprise(totals.maps.mean, rest)
            rows.append(
                {
                    "class": state.number,
                    "cluster": number,
                    "samples": n,
                    "share": n / all_.n,
                    "label": label,
                    "label_purity": purity,
                    "prediction": prediction,
                    "prediction_purity": prediction_purity,
                    **{f"mean_{name}": totals.mean(name) for name in ("score", "loss", "probability")},
                    "separation": separation,
                    "surprise": surprise,
                    "suspicion": separation * surprise,
                    "p": None,
                    "place_y": None if single else (int(y) + 0.5) / shape.side,
                    "place_x": None if single else (int(x) + 0.5) / shape.side,
                    "ranks": state.prototypes[number],
                    "mean_map": totals.maps.mean.tolist(),
                    "variance_map": totals.maps.variance.tolist(),
                    "gain": gain.tolist(),
                }
            )
    tested = [row for row in rows if row["suspicion"] > 0]
    for row, p in zip(tested, compute_p_values(np.array([row["suspicion"] for row in tested])).tolist()):
        row["p"] = p
    return sorted(rows, key=lambda row: (-row["suspicion"], row["class"], row["cluster"]))


def find_purity(counts: Mapping[int, int]) -> tuple[int | None, float | None]:
    """Return the most frequent value except `NO_LABEL`, the lowest one of equals, and its share."""
    known = {value: count for value, count in counts.items() if value != NO_LABEL}
    if not known:
        return None, None
    value = min(known, key=lambda value: (-known[value], value))
    return value, known[value] / sum(known.values())


def cluster_table(rows: Sequence[Mapping[str, Any]], keys: Keys, shape: RowShape) -> pa.Table:
    """Return clusters.parquet."""
    named = [{**row, "prototypes": list_samples(row["ranks"], keys, -1.0)} for row in rows]
    schema = pa.schema(CLUSTER_FIELDS, {"side": str(shape.side)})
    return pa.Table.from_pylist([{k: v for k, v in row.items() if k != "ranks"} for row in named], schema)


ANOMALY_SCHEMA = pa.schema(
    [
        ("kind", pa.string()),
        ("class", pa.int64()),
        ("cluster", pa.int32()),
        ("shard", pa.string()),
        ("key", pa.string()),
        ("samples", pa.int64()),
        ("value", pa.float64()),
        ("p", pa.float64()),
        ("reason", pa.string()),
    ]
)


def anomaly_table(rows: Sequence[Mapping[str, Any]], states: Sequence[ClassState], keys: Keys) -> pa.Table:
    """Return anomalies.parquet: clusters by their suspicion, then samples by their distance from their class."""
    found: list[dict[str, Any]] = [
        {
            "kind": "cluster",
            "class": row["class"],
            "cluster": row["cluster"],
            "samples": row["samples"],
            "value": row["suspicion"],
            "p": row["p"],
            "reason": describe_cluster(row),
        }
        for row in rows
        if row["suspicion"] > 0
    ]
    samples = []
    for state in states:
        typical_distance = max(float(np.sqrt(state.totals.maps.variance.sum())), 1e-12)
        for sample in list_samples(state.untypical[:UNTYPICAL], keys):
            ratio = sample["value"] / typical_distance
            reason = f"{ratio:.1f} times as far from the mean map of its class as usual"
            row = {"kind": "sample", "class": state.number, "samples": 1, "value": ratio, "reason": reason}
            samples.append({**row, "shard": sample["shard"], "key": sample["key"]})
    samples.sort(key=lambda row: (-row["value"], row["shard"], row["key"]))
    return pa.Table.from_pylist(found + samples, ANOMALY_SCHEMA)


def describe_cluster(row: Mapping[str, Any]) -> str:
    """Return in words what is unusual about a cluster."""
    place = f"near {row['place_y']:.0%} of the height and {row['place_x']:.0%} of the width"
    excess = f"its relevance exceeds that of the rest of the class by {row['surprise']:.1f} times the latter"
    return f"{row['share']:.1%} of the class; {place}, {excess}"


def channel_table(
    tops: Mapping[str, ChannelTops], states: Sequence[ClassState], means: Mapping[str, RunningMoments], keys: Keys
) -> pa.Table:
    """Return channels.parquet."""
    rows = []
    for operator, top in tops.items():
        best, of_best = np.full(len(means[operator].mean), -np.inf), np.zeros(len(means[operator].mean), np.int64)
        for state in states:
            mean = state.totals.channels[operator].mean
            better = mean > best
            best[better], of_best[better] = mean[better], state.number
        for channel, mean in enumerate(means[operator].mean.tolist()):
            rows.append(
                {
                    "operator": operator,
                    "channel": channel,
                    "mean_relevance": mean,
                    "class": int(of_best[channel]),
                    "class_relevance": float(best[channel]),
                    "by_relevance": list_samples(top.relevance[:, channel], keys),
                    "by_activation": list_samples(top.activation[:, channel], keys),
                }
            )
    schema = pa.schema(
        [
            ("operator", pa.string()),
            ("channel", pa.int64()),
            ("mean_relevance", pa.float64()),
            ("class", pa.int64()),
            ("class_relevance", pa.float64()),
            ("by_relevance", SAMPLE_LIST),
            ("by_activation", SAMPLE_LIST),
        ]
    )
    return pa.Table.from_pylist(rows, schema)
