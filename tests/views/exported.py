"""What exports are compared with: the files of the run, read without the code of exports."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from ray_jobs.data.shard_reader import read_shard
from tests.views.reported import HOSTILE

NAMES = ["crane", "crane", *HOSTILE[2:]]
Folders = tuple[Path, Path, list[str]]  # explanations, atlas, shards


def read_rows(folders: Folders) -> list[dict[str, Any]]:
    """Return the rows of explanations.parquet with those of samples.parquet, which have the same samples."""
    rows = pq.read_table(folders[0] / "explanations.parquet").to_pylist()
    places = {(row["shard"], row["key"]): row for row in pq.read_table(folders[1] / "samples.parquet").to_pylist()}
    clusters = {(c["class"], c["cluster"]): c for c in pq.read_table(folders[1] / "clusters.parquet").to_pylist()}
    found = []
    for row in rows:
        place = places[row["shard"], row["key"]]
        cluster = clusters[place["class"], place["cluster"]]
        found.append(place | row | {name: cluster[name] for name in ("suspicion", "p")})
    return found


def read_relevance(folders: Folders, method: str = "patternattribution") -> list[np.ndarray]:
    """Return the relevance of all samples, from the files of `explain`."""
    found = []
    for shard in folders[2]:
        for sample in read_shard(str(folders[0] / "explanations" / Path(shard).name)):
            array = np.load(io.BytesIO(sample.files[f"{method}.npy"])).astype(np.float64)
            relevance = np.abs(array).sum(0) if method == "gradient" else array.sum(0)
            found.append(relevance * 2.0 ** json.loads(sample.files["json"])["exponents"][method])
    return found


def read_photographs(folders: Folders) -> list[np.ndarray]:
    """Return the photographs of all samples; they have the size of the model's input."""
    samples = [sample for shard in folders[2] for sample in read_shard(shard) if sample.key != "broken"]
    return [np.asarray(Image.open(io.BytesIO(sample.files["jpg"])).convert("RGB")) for sample in samples]


def name_of(number: int | None) -> str | None:
    """Return the name of a class in exports: two classes have the same name in `NAMES`."""
    return None if number is None else f"crane ({number})" if number < 2 else NAMES[number]
