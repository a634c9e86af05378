"""Read a run's explanations as pictures: photographs with the map of each method."""

import io
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from patterns import UserError
from patterns.attribution import RenderedExplanation, render_map
from ray_jobs.config import Preprocessing
from ray_jobs.data.image_folders import EXTENSIONS
from ray_jobs.data.samples import Sample, extension_of
from ray_jobs.data.shard_reader import read_shard
from ray_jobs.io.object_store import fetch, read_table
from ray_jobs.models.class_names import load_class_names, map_numbers_to_names
from ray_jobs.runs.map_files import ShardFiles, list_shard_files, tile_targets
from ray_jobs.runs.run_folder import Run
from ray_jobs.units import make_printable
from ray_jobs.views.photographs import read_photographs

SHOWABLE = "Run `patternnet explain` with --output png, npy or parquet."
Row = dict[str, Any]  # a row of explanations.parquet


class Keys:
    """Index of samples by their keys and by the names that the keys were made from (see `make_key`).

    Args:
        rows: Rows of explanations.parquet. If several rows have the same key, the first is used.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = {row["key"]: row for row in reversed(rows)}
        self.names: dict[str, list[str]] = {}
        for key in self.rows:
            self.names.setdefault(unquote(key, errors="surrogateescape"), []).append(key)

    def find(self, word: str) -> list[str]:
        """Return the keys that a word names.

        Args:
            word: A key, or the original name of a sample, with or without its extension.

        Returns:
            The key itself if there is one, else all keys made from this name; empty if there is none.
        """
        for exact in (word, word.strip()):
            if exact in self.rows:
                return [exact]
        word = word.strip()
        stem = word.rpartition(".")[0] if extension_of(word) in EXTENSIONS else word
        return self.names.get(word) or self.names.get(stem, [])


class Gallery:
    """The explanations of a finished run as pictures.

    Args:
        run: The run.
        names: Class names by class number.

    Raises:
        UserError: If the run has no explanations, or none in a format that can be shown.
    """

    def __init__(self, run: Run, names: Mapping[int, str]) -> None:
        section = run.require_job("explain", "Run `patternnet explain` to the end first.")
        options = dict(section["options"])
        self.run, self.methods = run, tuple(options["methods"])
        self.preprocessing = Preprocessing(**options["preprocessing"])
        self.kinds, self.out = options["outputs"], list_shard_files(str(run.folder), tuple(options["shards"]))
        self.names, self.decoder = names, section["model"].get("decoder")
        if not {"png", "npy", "parquet"} & set(self.kinds):
            raise UserError(str(run.folder), f"holds explanations as {', '.join(self.kinds)} only", SHOWABLE)

    def rows(self) -> list[Row]:
        """Return shard, key, label, prediction and probability of every sample, in the order of the shards."""
        columns = ["shard", "key", "label", "prediction", "probability"]
        rows = read_table(self.run.folder / "explanations.parquet", columns).to_pylist()
        shards = {make_printable(shard): shard for shard in self.out}
        return [{**row, "shard": shards[row["shard"]]} for row in rows]

    def find(self, key: str) -> Row:
        """Return the sample with a key, or with the name that the key was made from.

        Raises:
            UserError: If no sample or several samples match.
        """
        return self.only_match(Keys(self.rows()), key)

    def find_all(self, keys: str) -> list[Row]:
        """Return the samples of a comma-separated list of keys, in this order.

        Keys from tar files may contain commas. The longest possible piece of the list is taken as one key.

        Raises:
            UserError: If a key was not explained, or is a name of several samples.
        """
        known, words, chosen = Keys(self.rows()), keys.split(","), list[Row]()
        while words:
            count = next((n for n in range(len(words), 1, -1) if known.find(",".join(words[:n]))), 1)
            if (word := ",".join(words[:count])).strip():
                chosen.append(self.only_match(known, word))
            words = words[count:]
        return chosen

    def only_match(self, known: "Keys", word: str) -> Row:
        """Return the only sample that a word names; raise UserError if it names no sample or several."""
        found = known.find(word)
        if not found:
            what = "no sample with this key was explained"
            raise UserError(word, what, f"The keys are listed in explanations.parquet of {self.run.folder}.")
        if len(found) > 1:
            raise UserError(word, f"several samples have this name: {', '.join(found)}", "Pass one of these keys.")
        return known.rows[found[0]]

    def worst(self, count: int) -> list[Row]:
        """Return the wrong predictions with the highest probabilities, at most `count`.

        Raises:
            UserError: If no sample has a label, or the model predicts no class.
        """
        labelled = [row for row in self.rows() if row["label"] is not None]
        if not labelled:
            raise UserError("--worst", "no sample has a label", "Choose samples by --keys or --random.")
        predicted = [row for row in labelled if row["prediction"] is not None]
        if not predicted:
            raise UserError("--worst", "the model predicts no class", "Choose samples by --keys or --random.")
        wrong = [row for row in predicted if row["label"] != row["prediction"]]
        return sorted(wrong, key=lambda row: -row["probability"])[:count]

    def draw(self, count: int, seed: int) -> list[Row]:
        """Return at most `count` samples at random; the same seed gives the same samples."""
        rows = self.rows()
        return random.Random(seed).sample(rows, min(count, len(rows)))

    def describe(self, row: Row) -> dict[str, str]:
        """Return all columns of a sample's row that have a value, formatted as text."""
        table = read_table(self.run.folder / "explanations.parquet")
        (all_,) = table.filter(
            (pc.field("shard") == make_printable(row["shard"])) & (pc.field("key") == row["key"])
        ).to_pylist()
        return {
            name: f"{value:.4g}" if isinstance(value, float) else str(value)
            for name, value in all_.items()
            if value is not None
        }

    def pictures(self, rows: Sequence[Row]) -> list[RenderedExplanation]:
        """Return the photographs and maps of some samples, in order. Each shard is read once."""
        wanted: dict[str, set[str]] = {}
        for row in rows:
            wanted.setdefault(row["shard"], set()).add(row["key"])
        photographs: dict[tuple[str, str], Image.Image] = {}
        maps: dict[tuple[str, str], dict[str, Image.Image]] = {}
        for shard, keys in wanted.items():
            found = dict(read_photographs(shard, keys, self.preprocessing, self.decoder))
            if missing := keys - found.keys():
                what = f"no longer contains sample {min(missing)!r}"
                raise UserError(shard, what, "Choose samples that are still there.")
            photographs |= {(shard, key): image for key, image in found.items()}
            maps |= {(shard, key): images for key, images in self.maps(self.out[shard], keys)}
        ids = [(row["shard"], row["key"]) for row in rows]
        return [RenderedExplanation(photographs[id_], self.caption(row), maps[id_]) for id_, row in zip(ids, rows)]

    def maps(self, out: ShardFiles, keys: set[str]) -> Iterator[tuple[str, dict[str, Image.Image]]]:
        """Yield the maps of some samples as pictures, from the smallest file that has them."""
        if not {"png", "npy"} & set(self.kinds):
            with fetch(out.folder / out.maps) as path:
                yield from pictures_of(path, self.methods, keys)
            return
        with closing(read_shard(str(out.folder / out.tar))) as samples:
            for sample in samples:
                if sample.key in keys:
                    yield sample.key, {method: stored_picture(sample, method) for method in self.methods}

    def caption(self, row: Row) -> str:
        """Return "label → prediction probability" with the names of the classes."""
        if row["prediction"] is None:
            return "" if row["label"] is None else self.class_name(row["label"])
        prediction, label = self.class_name(row["prediction"]), row["label"]
        return f"{'' if label is None else self.class_name(label) + ' → '}{prediction} {row['probability']:.0%}"

    def class_name(self, number: int) -> str:
        """Return the name of a class, or its number as text if it has no name."""
        return self.names.get(number, str(number))


def open_gallery(run: str, classes: str | None) -> Gallery:
    """Open the explanations of a run.

    Args:
        run: The folder of the run.
        classes: A file of class names; None for the names of the model's library.
    """
    found = Run(run)
    model = found.require_job("explain", "Run `patternnet explain` to the end first.")["model"]
    return Gallery(found, map_numbers_to_names(load_class_names(model["spec"], classes)))


def stored_picture(sample: Sample, method: str) -> Image.Image:
    """Return a method's map in a sample of an explanation shard as a picture."""
    if f"{method}.png" in sample.files:
        return Image.open(io.BytesIO(sample.files[f"{method}.png"])).convert("RGB")
    return render_map(method, tile_targets(np.load(io.BytesIO(sample.files[f"{method}.npy"]), allow_pickle=False)))


def pictures_of(path: Any, methods: Sequence[str], keys: set[str]) -> Iterator[tuple[str, dict[str, Image.Image]]]:
    """Yield the maps of some samples in a Parquet file of maps as pictures."""
    file = pq.ParquetFile(path)
    shapes = {m: json.loads(file.schema_arrow.metadata[f"{m}_shape".encode()]) for m in methods}
    for number in range(file.num_row_groups):
        found = file.read_row_group(number, ["key"])["key"].to_pylist()
        if not keys.isdisjoint(found):
            table = file.read_row_group(number)
            for row, key in enumerate(found):
                if key in keys:
                    yield (
                        key,
                        {m: render_map(m, tile_targets(read_list(table, m, row).reshape(shapes[m]))) for m in methods},
                    )


def read_list(table: pa.Table, column: str, row: int) -> np.ndarray:
    """Return one list of a table's column as a flat array, without a copy through Python."""
    return table[column][row].values.to_numpy(zero_copy_only=False)
