"""FiftyOne: a dataset in the format `fiftyone.types.FiftyOneDataset`, with heat maps over the photographs.

The heat map is two fields, because FiftyOne shows the value 0 as transparent and has no negative values in files:
`relevance` is the evidence for what is explained, and `relevance_against` the evidence against it.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patterns.attribution import encode_png
from ray_jobs.views.export.files import JsonList, finite, write_file, write_json_file, write_picture
from ray_jobs.views.export.samples import Description, ExportedSample, Writer

# The oldest version of FiftyOne that reads the dataset; newer versions migrate it.
VERSION = "1.0.0"
HEATMAPS = {"relevance": ("#d62728", 1), "relevance_against": ("#1f77b4", -1)}  # color in FiftyOne, and sign
CORE, LABELS = "fiftyone.core.fields", "fiftyone.core.labels"
# By name: the type of a field, and the items of a list or the class of a document.
Fields = dict[str, tuple[str, str | None]]
BASE: Fields = {
    "id": ("ObjectIdField", None),
    "filepath": ("StringField", None),
    "tags": ("ListField", "StringField"),
    "metadata": ("EmbeddedDocumentField", "fiftyone.core.metadata.ImageMetadata"),
    "_media_type": ("StringField", None),
    "_rand": ("FloatField", None),
    "_dataset_id": ("ObjectIdField", None),
    "created_at": ("DateTimeField", None),
    "last_modified_at": ("DateTimeField", None),
    "key": ("StringField", None),
    "shard": ("StringField", None),
    "label": ("EmbeddedDocumentField", f"{LABELS}.Classification"),
    "prediction": ("EmbeddedDocumentField", f"{LABELS}.Classification"),
    "explained": ("EmbeddedDocumentField", f"{LABELS}.Classification"),
    "score": ("FloatField", None),
    **dict.fromkeys(HEATMAPS, ("EmbeddedDocumentField", f"{LABELS}.Heatmap")),
}
PLACES: Fields = {
    "cluster": ("IntField", None),
    **dict.fromkeys(("suspicion", "p", "distance", "loss", "x", "y"), ("FloatField", None)),
}
# Fields of the documents by the last word of their class.
DOCUMENTS: dict[str, Fields] = {
    "ImageMetadata": {
        "size_bytes": ("IntField", None),
        "mime_type": ("StringField", None),
        "width": ("IntField", None),
        "height": ("IntField", None),
        "num_channels": ("IntField", None),
    },
    "Classification": {
        "id": ("ObjectIdField", None),
        "tags": ("ListField", "StringField"),
        "label": ("StringField", None),
        "confidence": ("FloatField", None),
        "logits": ("VectorField", None),
    },
    "Heatmap": {
        "id": ("ObjectIdField", None),
        "tags": ("ListField", "StringField"),
        "map": ("ArrayField", None),
        "map_path": ("StringField", None),
        "range": ("HeatmapRangeField", None),
    },
}
READ_ONLY = ("created_at", "last_modified_at")


def make_fields(fields: Fields) -> list[dict[str, Any]]:
    """Return the descriptions of fields as FiftyOne writes them."""
    found = []
    for name, (kind, of) in fields.items():
        document = of if kind == "EmbeddedDocumentField" else None
        found.append(
            {
                "name": name,
                "ftype": f"{CORE}.{kind}",
                "embedded_doc_type": document,
                "subfield": f"{CORE}.{of}" if of and not document else None,
                "fields": make_fields(DOCUMENTS[document.rpartition(".")[2]]) if document else [],
                "db_field": "_id" if name == "id" else name,
                "description": None,
                "info": None,
                "read_only": name in READ_ONLY,
                "created_at": None,
            }
        )
    return found


def make_id(number: int, field: str = "") -> dict[str, str]:
    """Return the object id of a sample, or of one of its fields; the same in each export."""
    return {"$oid": hashlib.blake2b(f"{number}/{field}".encode(), digest_size=12).hexdigest()}


@dataclass
class FiftyOneWriter:
    """Writes the photographs, the heat maps, and the documents of the samples."""

    folder: Path
    description: Description
    samples: JsonList

    def write(self, sample: ExportedSample) -> None:
        """Write a sample."""
        row, number = sample.row, sample.number
        width, height = sample.picture.size
        name = write_picture(self.folder / "data", sample)
        values: dict[str, Any] = {
            "_id": make_id(number),
            "filepath": f"data/{name}",
            "tags": [],
            "metadata": {
                "_cls": "ImageMetadata",
                "size_bytes": len(sample.picture_file),
                "mime_type": "image/png" if name.endswith("png") else "image/jpeg",
                "width": width,
                "height": height,
                "num_channels": 3,
            },
            "_media_type": "image",
            "_rand": int(make_id(number, "_rand")["$oid"][:8], 16) / 2**32,
            "key": row.key,
            "shard": sample.shard,
            "label": self.classification(number, "label", row.label),
            "prediction": self.classification(number, "prediction", row.prediction, row.probability),
            "explained": self.classification(number, "explained", row.explained),
            "score": finite(row.score),
            **{field: self.heatmap(sample, field, sign) for field, (_, sign) in HEATMAPS.items()},
        }
        if self.description.has_atlas:
            values |= {field: row.place and finite(getattr(row.place, field)) for field in PLACES}
        self.samples.append(values)

    def classification(
        self, number: int, field: str, class_number: int | None, confidence: float | None = None
    ) -> dict[str, Any] | None:
        """Return the document of a class; None for no class."""
        if class_number is None:
            return None
        label = {"_id": make_id(number, field), "_cls": "Classification", "tags": []}
        return label | {"label": self.description.name_class(class_number), "confidence": finite(confidence)}

    def heatmap(self, sample: ExportedSample, field: str, sign: int) -> dict[str, Any] | None:
        """Write the values of one sign as a gray picture, and return its document; None if there are none."""
        values = np.round(np.maximum(sample.centered * sign, 0) * 255).astype(np.uint8)
        if not values.any():
            return None
        path = f"fields/{field}/{sample.stem}.png"
        write_file(self.folder / path, encode_png(Image.fromarray(values)))
        return {"_id": make_id(sample.number, field), "_cls": "Heatmap", "tags": [], "map_path": path, "range": None}


@contextmanager
def open_fiftyone(folder: Path, description: Description) -> Iterator[Writer]:
    """Open a folder with `metadata.json`, `samples.json`, `data/` and `fields/`."""
    with JsonList(folder / "samples.part") as samples:
        yield FiftyOneWriter(folder, description, samples)
        fields = BASE | (PLACES if description.has_atlas else {})
        colors = [{"path": name, "fieldColor": color} for name, (color, _) in HEATMAPS.items()]
        dataset = {
            "name": description.name,
            "version": VERSION,
            "media_type": "image",
            "group_media_types": {},
            "tags": [],
            "info": {"model": description.model, "method": description.method, "target": description.target},
            "app_config": {"color_scheme": {"_id": make_id(-1, "colors"), "color_by": "field", "fields": colors}},
            "classes": {},
            "default_classes": [],
            "mask_targets": {},
            "default_mask_targets": {},
            "skeletons": {},
            "sample_fields": make_fields(fields),
            "frame_fields": [],
            "saved_views": [],
            "workspaces": [],
            "annotation_runs": {},
            "brain_methods": {},
            "evaluations": {},
            "runs": {},
        }
        write_json_file(folder / "metadata.json", dataset)
        write_json_file(folder / "samples.json", {"samples": samples})
    for name in HEATMAPS:  # FiftyOne resolves the paths of fields that have a folder
        (folder / "fields" / name).mkdir(parents=True, exist_ok=True)
