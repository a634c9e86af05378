"""Make the examples of docs/atlas.md: `python -m benchmarks.atlas_examples [--write docs]`.

They are an atlas of MNIST's test images and one of crops of photographs, with EfficientNet-Lite0.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.atlas_examples.figures import (
    Pictures,
    Row,
    draw_classes,
    draw_clusters,
    draw_samples,
)
from benchmarks.atlas_examples.jobs import count_photographs, describe_digits, describe_photographs
from benchmarks.pages import Cell, Table, make_parser, save_results
from ray_jobs.engine.shard_worker import keep_freed_memory
from ray_jobs.models.class_names import load_class_names, map_numbers_to_names
from ray_jobs.studies.datasets import NAMES

Rows = list[list[Cell]]


def measure_digits(pictures: Pictures, docs: Path | None, folder: Path) -> None:
    """Draw and tabulate the atlas of MNIST's test images."""
    draw_classes(folder / "atlas-mnist-classes.png", pictures)
    draw_clusters(folder / "atlas-mnist-clusters.png", pictures, pictures.list_classes(4), prototypes=6, cell=0.62)
    samples = list_unusual(pictures, 18)
    draw_samples(folder / "atlas-mnist-unusual.png", pictures, samples, describe_digit, columns=6, cell=0.72)
    rows: Rows = [
        [
            pictures.names[row["class"]], row["cluster"], row["samples"], row["share"], row["label_purity"],
            row["separation"], row["surprise"], row["suspicion"],
        ]
        for row in pictures.table("clusters")
        if row["cluster"] > 0
    ]  # fmt: skip
    columns = {
        "class": "", "cluster": "{}", "images": "{}", "share of the class": "{:.1%}", "same label": "{:.1%}",
        "separation": "{:.1f}", "surprise": "{:.1f}", "suspicion": "{:.1f}",
    }  # fmt: skip
    right = sum(row["right"] for row in pictures.table("classes"))
    found = {"accuracy": right / pictures.section["samples"], "border": pictures.section["border"]}
    save(docs, "atlas-mnist", Table(columns, rows), **found)


def list_unusual(pictures: Pictures, count: int) -> list[Row]:
    """Return the samples that are farthest from the mean map of their class, with label and prediction."""
    rows = {(row["shard"], row["key"]): row for row in pictures.table("samples")}
    found = [row for row in pictures.table("anomalies") if row["kind"] == "sample"][:count]
    return [row | rows[row["shard"], row["key"]] | {"value": row["value"]} for row in found]


def describe_digit(sample: Row) -> str:
    """Return the text above an unusual digit."""
    wrong = "" if sample["label"] == sample["prediction"] else f", predicted {sample['prediction']}"
    return f"{sample['label']}{wrong}: {sample['value']:.1f}×"


def measure_photographs(pictures: Pictures, docs: Path | None, folder: Path) -> None:
    """Draw and tabulate the atlas of crops of photographs."""
    classes = pictures.list_classes(3)
    draw_clusters(folder / "atlas-photographs-clusters.jpg", pictures, classes, prototypes=4, cell=0.8)
    draw_samples(
        folder / "atlas-photographs-unusual.jpg", pictures, list_unusual(pictures, 12),
        lambda row: f"{pictures.names[row['class']]}: {row['value']:.1f}×", columns=4, cell=1.1,
    )  # fmt: skip
    keys: dict[tuple[int, int], list[str]] = {}
    for sample in pictures.table("samples", ["class", "cluster", "key"]):
        keys.setdefault((sample["class"], sample["cluster"]), []).append(sample["key"])
    rows: Rows = []
    for row in pictures.table("clusters"):
        if row["suspicion"] > 0:
            counts = count_photographs(keys[row["class"], row["cluster"]])
            listed = ", ".join(f"{name} {count}" for name, count in counts.items())
            rows.append([pictures.names[row["class"]], row["cluster"], row["samples"], listed, row["separation"]])
    columns = {"class": "", "cluster": "{}", "crops": "{}", "crops of each photograph": "", "separation": "{:.1f}"}
    several = [row for row in pictures.table("classes", ["class", "samples"]) if row["samples"] >= 16]
    found = {"samples": pictures.section["samples"], "classes": len(pictures.table("classes", ["class"])),
             "classes_of_16": len(several), "border": pictures.section["border"]}  # fmt: skip
    save(docs, "atlas-photographs", Table(columns, rows), **found)


def save(docs: Path | None, name: str, table: Table, **values: Any) -> None:
    """Print a result, and write it if there is a folder of docs."""
    print(f"\n{name}\n{table.render()}\n{values}", flush=True)
    if docs:
        save_results(docs, name, table, **values)


def name_classes(names: Mapping[int, str]) -> dict[int, str]:
    """Return the names of classes without the synonyms after a comma."""
    return {number: name.partition(",")[0] for number, name in names.items()}


def main() -> None:
    """Describe both datasets, and write pictures and tables."""
    parser = make_parser("benchmarks.atlas_examples", __doc__)
    parser.add_argument("--mnist", type=Path, default=Path("mnist-data/data"), help="folder of MNIST's idx files")
    parser.add_argument("--out", type=Path, help="folder of the runs; finished ones are used again")
    options = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        folder = options.write or out
        digits = describe_digits(options.mnist, out / "mnist")
        measure_digits(Pictures(digits, dict(enumerate(NAMES["mnist"]))), options.write, folder)
        names = name_classes(map_numbers_to_names(load_class_names("torchvision:resnet18", None)))
        measure_photographs(Pictures(describe_photographs(out / "photographs"), names), options.write, folder)


if __name__ == "__main__":
    main()
