"""Looking at explanations: photographs and what each method makes of them, from a run's files."""

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
from torchvision.transforms.functional import to_pil_image

from patterns import UserError
from patterns.attribution import Shown, photograph, picture
from ray_jobs.config import Preprocessing
from ray_jobs.data.image_decoding import cropped, decode, formats_of, upright
from ray_jobs.data.image_folders import EXTENSIONS
from ray_jobs.data.samples import extension_of, image_in
from ray_jobs.data.shard_reader import read_shard
from ray_jobs.io.object_store import fetched, read_table
from ray_jobs.models.class_names import captions, class_names
from ray_jobs.runs.map_files import Outputs, beside, outputs
from ray_jobs.runs.run_folder import Run
from ray_jobs.units import printable

SHOWN = "Run `patternnet explain` with --output png, npy or parquet."
Row = dict[str, Any]  # of explanations.parquet


class Keys:
    """Finds samples by their keys, or by the names that the keys were made of (see `key_of`)."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = {row["key"]: row for row in reversed(rows)}
        self.names: dict[str, list[str]] = {}
        for key in self.rows:
            self.names.setdefault(unquote(key, errors="surrogateescape"), []).append(key)

    def find(self, word: str) -> list[str]:
        """The key that a word is; else the keys of this name, which may have its extension."""
        for exact in (word, word.strip()):
            if exact in self.rows:
                return [exact]
        word = word.strip()
        stem = word.rpartition(".")[0] if extension_of(word) in EXTENSIONS else word
        return self.names.get(word) or self.names.get(stem, [])


class Gallery:
    """The explanations of a finished run.

    Args:
        run: The run.
        names: The names of classes by number.

    Raises:
        UserError: If the run has no explanations, or none that can be shown.
    """

    def __init__(self, run: Run, names: Mapping[int, str]) -> None:
        section = run.job("explain", "Run `patternnet explain` to the end first.")
        options = dict(section["options"])
        self.run, self.methods = run, tuple(options["methods"])
        self.preprocessing = Preprocessing(**options["preprocessing"])
        self.kinds, self.out = options["outputs"], outputs(str(run.folder), tuple(options["shards"]))
        self.names = names
        if not {"png", "npy", "parquet"} & set(self.kinds):
            raise UserError(str(run.folder), f"holds explanations as {', '.join(self.kinds)} only", SHOWN)

    def rows(self) -> list[Row]:
        """What is said of every sample, in the order of shards."""
        columns = ["shard", "key", "label", "prediction", "probability"]
        rows = read_table(self.run.folder / "explanations.parquet").select(columns).to_pylist()
        shards = {printable(shard): shard for shard in self.out}
        return [{**row, "shard": shards[row["shard"]]} for row in rows]

    def named(self, key: str) -> Row:
        """The sample of a key, or of the name that the key was made of. UserError if there is none or several."""
        return self.choice(Keys(self.rows()), key)

    def listed(self, keys: str) -> list[Row]:
        """The samples of keys separated by commas, in this order. UserError for a key that was not explained.

        Keys of tars may hold commas themselves: as many words as possible are taken for one key.
        """
        known, words, chosen = Keys(self.rows()), keys.split(","), list[Row]()
        while words:
            count = next((n for n in range(len(words), 1, -1) if known.find(",".join(words[:n]))), 1)
            if (word := ",".join(words[:count])).strip():
                chosen.append(self.choice(known, word))
            words = words[count:]
        return chosen

    def choice(self, known: "Keys", word: str) -> Row:
        found = known.find(word)
        if not found:
            what = "no explanation of a sample with this key"
            raise UserError(word, what, f"explanations.parquet of {self.run.folder} lists the keys.")
        if len(found) > 1:
            raise UserError(word, f"names several samples: {', '.join(found)}", "Give one of these keys.")
        return known.rows[found[0]]

    def worst(self, count: int) -> list[Row]:
        """Wrong predictions, the surest first. UserError where no sample has a label."""
        labelled = [row for row in self.rows() if row["label"] is not None]
        if not labelled:
            raise UserError("--worst", "no sample has a label", "Choose by --keys or --random.")
        predicted = [row for row in labelled if row["prediction"] is not None]
        if not predicted:
            raise UserError("--worst", "the model predicts no class", "Choose by --keys or --random.")
        wrong = [row for row in predicted if row["label"] != row["prediction"]]
        return sorted(wrong, key=lambda row: -row["probability"])[:count]

    def drawn(self, count: int, seed: int) -> list[Row]:
        """Samples at random, the same ones for the same seed."""
        rows = self.rows()
        return random.Random(seed).sample(rows, min(count, len(rows)))

    def said(self, row: Row) -> dict[str, str]:
        """All that the table says of a sample, in words."""
        table = read_table(self.run.folder / "explanations.parquet")
        (all_,) = table.filter(
            (pc.field("shard") == printable(row["shard"])) & (pc.field("key") == row["key"])
        ).to_pylist()
        return {
            name: f"{value:.4g}" if isinstance(value, float) else str(value)
            for name, value in all_.items()
            if value is not None
        }

    def shown(self, rows: Sequence[Row]) -> list[Shown]:
        """Photographs and maps of some samples, in order; each shard is read once."""
        wanted: dict[str, set[str]] = {}
        for row in rows:
            wanted.setdefault(row["shard"], set()).add(row["key"])
        photographs: dict[tuple[str, str], Image.Image] = {}
        maps: dict[tuple[str, str], dict[str, Image.Image]] = {}
        for shard, keys in wanted.items():
            photographs |= {(shard, key): image for key, image in self.photographs(shard, keys)}
            maps |= {(shard, key): images for key, images in self.maps(self.out[shard], keys)}
        return [
            Shown(photographs[at], self.caption(row), maps[at]) for row in rows for at in [(row["shard"], row["key"])]
        ]

    def photographs(self, shard: str, keys: set[str]) -> Iterator[tuple[str, Image.Image]]:
        """Samples of a shard as the model sees them. UserError where the shard has them no more."""
        left = set(keys)
        with closing(read_shard(shard)) as samples:
            for sample in samples:
                if sample["__key__"] in left:
                    left.remove(sample["__key__"])
                    yield sample["__key__"], as_seen(sample, self.preprocessing)
                if not left:
                    return
        raise UserError(shard, f"has no sample {min(left)!r} any more", "Show samples that are still there.")

    def maps(self, out: Outputs, keys: set[str]) -> Iterator[tuple[str, dict[str, Image.Image]]]:
        """The pictures of some samples' maps, from the cheapest file that has them."""
        if not {"png", "npy"} & set(self.kinds):
            with fetched(out.folder / out.maps) as path:
                yield from pictures_of(path, self.methods, keys)
            return
        with closing(read_shard(str(out.folder / out.tar))) as samples:
            for sample in samples:
                if sample["__key__"] in keys:
                    yield sample["__key__"], {method: stored(sample, method) for method in self.methods}

    def caption(self, row: Row) -> str:
        """label → prediction and its probability."""
        if row["prediction"] is None:
            return "" if row["label"] is None else self.class_name(row["label"])
        said, label = self.class_name(row["prediction"]), row["label"]
        return f"{'' if label is None else self.class_name(label) + ' → '}{said} {row['probability']:.0%}"

    def class_name(self, number: int) -> str:
        return self.names.get(number, str(number))


def gallery(run: str, classes: str | None) -> Gallery:
    """The explanations of a run; classes: a file of the classes' names, else as the model's library has them."""
    found = Run(run)
    model = found.job("explain", "Run `patternnet explain` to the end first.")["model"]
    return Gallery(found, captions(class_names(model["spec"], classes)))


def stored(sample: dict[str, Any], method: str) -> Image.Image:
    """A method's picture in a sample of explanations."""
    if f"{method}.png" in sample:
        return Image.open(io.BytesIO(sample[f"{method}.png"])).convert("RGB")
    return picture(method, beside(np.load(io.BytesIO(sample[f"{method}.npy"]), allow_pickle=False)))


def pictures_of(path: Any, methods: Sequence[str], keys: set[str]) -> Iterator[tuple[str, dict[str, Image.Image]]]:
    """The same from a table of maps."""
    file = pq.ParquetFile(path)
    shapes = {m: json.loads(file.schema_arrow.metadata[f"{m}_shape".encode()]) for m in methods}
    for number in range(file.num_row_groups):
        found = file.read_row_group(number, ["key"])["key"].to_pylist()
        if not keys.isdisjoint(found):
            table = file.read_row_group(number)
            for place, key in enumerate(found):
                if key in keys:
                    yield key, {m: picture(m, beside(value(table, m, place).reshape(shapes[m]))) for m in methods}


def value(table: pa.Table, column: str, row: int) -> np.ndarray:
    return table[column][row].values.to_numpy(zero_copy_only=False)


def as_seen(sample: dict[str, Any], preprocessing: Preprocessing) -> Image.Image:
    """A sample as a picture: the part of its image that the model sees, or its ready tensor."""
    if image := image_in(sample):
        return to_pil_image(cropped(upright(sample[image], "RGB", formats=formats_of(image)), preprocessing))
    return photograph(decode(sample, preprocessing).numpy())
