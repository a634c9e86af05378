"""Read the maps that `explain` has stored as arrays, in the order of the samples and in bounded memory."""

import io
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from patterns import UserError
from ray_jobs.config import Preprocessing
from ray_jobs.data.shard_reader import read_shard
from ray_jobs.io.object_store import fetch
from ray_jobs.runs.map_files import ShardFiles

BATCH = 256  # samples whose maps are read together
READABLE = ("npy", "parquet")  # outputs of `explain` that can be read here

# Key, map and exponent: the explanation is map · 2^exponent. With T targets, the map is (T, C, H, W) with T exponents.
StoredMap = tuple[str, np.ndarray, Any]


def require_arrays(where: str, outputs: Collection[str]) -> None:
    """Raise UserError if a run of `explain` has no maps that can be read as arrays.

    Args:
        where: The run's folder.
        outputs: Its outputs.
    """
    if not {*READABLE} & {*outputs}:
        remedy = "Run `patternnet explain` with --output npy or parquet."
        raise UserError(where, f"holds maps as {', '.join(outputs)} only", remedy)


def describe_other_maps(one: Mapping[str, Any], other: Mapping[str, Any], method: str) -> str | None:
    """Return what differs between the maps of a method in two jobs.

    Args:
        one: The section of the first job in its manifest, of `explain` or `atlas`.
        other: The section of the second job.
        method: The method. Estimators and patterns are compared if both sections record estimators of it.

    Returns:
        The difference: "weights 1a2b, not 3c4d"; None if there is none.
    """
    first, second = one["options"], other["options"]
    if first["weights"] != second["weights"]:
        return f"weights {first['weights']}, not {second['weights']}"
    sizes = [Preprocessing(**options["preprocessing"]) for options in (first, second)]
    if sizes[0] != sizes[1]:
        return f"preprocessing {first['preprocessing']}, not {second['preprocessing']}"
    estimators = [section.get("estimators", {}).get(method) for section in (one, other)]
    if None in estimators:
        return None
    if first["patterns"] != second["patterns"]:
        return f"patterns {first['patterns']}, not {second['patterns']}"
    for operator, name in estimators[0].items():
        if name != (wanted := estimators[1].get(operator)):
            return f"estimator {name} of {operator}, not {wanted}"
    return None


def read_maps(files: ShardFiles, method: str, outputs: Collection[str], keys: Collection[str]) -> Iterator[StoredMap]:
    """Yield the maps of some samples of a shard, in the order in which they were explained.

    Args:
        files: The files of the shard's explanations.
        method: The method.
        outputs: The outputs of the run, of which at least one is in READABLE.
        keys: The keys of the samples.
    """
    if "parquet" in outputs:
        with fetch(files.folder / files.maps) as path:
            yield from read_table_of_maps(pq.ParquetFile(path), method, keys)
        return
    with closing(read_shard(str(files.folder / files.tar))) as samples:
        for sample in samples:
            if sample.key in keys:
                array = np.load(io.BytesIO(sample.files[f"{method}.npy"]), allow_pickle=False)
                yield sample.key, array, json.loads(sample.files["json"])["exponents"][method]


def read_table_of_maps(file: pq.ParquetFile, method: str, keys: Collection[str]) -> Iterator[StoredMap]:
    """Yield the maps of some samples from a Parquet file of maps.

    Args:
        file: The file.
        method: The method.
        keys: The keys of the samples.
    """
    if method not in file.schema_arrow.names:  # all samples of the shard were rejected
        return
    shape = json.loads(file.schema_arrow.metadata[f"{method}_shape".encode()])
    for batch in file.iter_batches(BATCH, columns=["key", method, f"{method}_exponent"]):
        arrays = batch[method].flatten().to_numpy(zero_copy_only=False).reshape(-1, *shape)
        exponents = batch[f"{method}_exponent"].to_pylist()
        for key, array, exponent in zip(batch["key"].to_pylist(), arrays, exponents):
            if key in keys:
                yield key, array, exponent
