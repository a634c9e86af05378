"""ViRelAy: HDF5 files of photographs, maps and clusters, a label map, and the project that names them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ray_jobs.io.extras import import_extra
from ray_jobs.views.export.huggingface import quote_yaml
from ray_jobs.views.export.samples import NO_CLASS, Description, ExportedSample, Writer

BATCH = 64  # samples that are written together
CLUSTERING, EMBEDDING, ANALYSIS = "atlas", "principal_components", "atlas"
PLACE = np.dtype(
    [("class", np.int64), ("cluster", np.int32), ("index", np.int64), ("x", np.float32), ("y", np.float32)]
)
PROJECT = """\
project:
  name: {name}
  model: {model}
  label_map: label_map.json
  dataset:
    name: {name}
    type: hdf5
    path: dataset.h5
    input_width: {width}
    input_height: {height}
    down_sampling_method: none
    up_sampling_method: none
  attributions:
    attribution_method: {method}
    attribution_strategy: {strategy}
    sources: [attributions.h5]
"""
ANALYSES = f"""\
  analyses:
    - analysis_method: {ANALYSIS}
      sources: [analysis.h5]
"""


class Array:
    """A dataset of an HDF5 file that grows along its first axis. A chunk is one sample, or some thousand numbers."""

    def __init__(self, file: Any, name: str) -> None:
        self.file, self.name, self.data = file, name, None

    def append(self, values: np.ndarray) -> None:
        """Add the values of some samples, (N, …)."""
        if self.data is None:
            chunks = (4096,) if values.ndim == 1 else (1, *values.shape[1:])
            packed = {} if values.ndim == 1 else {"compression": "gzip", "compression_opts": 4, "shuffle": True}
            self.data = self.file.create_dataset(
                self.name, (0, *values.shape[1:]), values.dtype, maxshape=(None,) * values.ndim, chunks=chunks, **packed
            )
        data: Any = self.data
        data.resize((len(data) + len(values), *np.maximum(data.shape[1:], values.shape[1:])))
        data[
            tuple(slice(-len(values), None) if not axis else slice(size) for axis, size in enumerate(values.shape))
        ] = values


@dataclass
class VirelayWriter:
    """Writes photographs and maps, and keeps 28 bytes of each sample for the analysis, which is by class."""

    description: Description
    dataset: Any
    attributions: Any
    classes: set[int]
    waiting: list[ExportedSample] = field(default_factory=list)
    places: list[np.ndarray] = field(default_factory=list)
    size: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        """Create the arrays."""
        self.data, self.label = Array(self.dataset, "data"), Array(self.dataset, "label")
        names = ("attribution", "label", "prediction", "scale")
        self.arrays = {name: Array(self.attributions, name) for name in names}

    def write(self, sample: ExportedSample) -> None:
        """Write a sample, or keep it until there are enough."""
        self.waiting.append(sample)
        if len(self.waiting) == BATCH:
            self.flush()

    def flush(self) -> None:
        """Write the samples that wait."""
        if not self.waiting:
            return
        samples, self.waiting = self.waiting, []
        rows = [sample.row for sample in samples]
        self.size = samples[0].picture.size
        labels = np.array([NO_CLASS if row.label is None else row.label for row in rows], np.int64)
        self.data.append(np.stack([np.asarray(sample.picture) for sample in samples]))
        self.label.append(labels)
        maps = np.stack([sample.relevance for sample in samples])
        scale = np.abs(maps).max((1, 2))
        # ViRelAy sums the channels, and draws some colors only if there are several. The others are 0.
        scaled = np.pad((maps / np.where(scale > 0, scale, 1)[:, None, None])[..., None], [(0, 0)] * 3 + [(0, 2)])
        predictions = [NO_CLASS if row.prediction is None else row.prediction for row in rows]
        probabilities = np.zeros((len(rows), 1 + max(0, *predictions, *self.classes)), np.float32)
        for number, row in enumerate(rows):
            if row.prediction is not None:
                probabilities[number, row.prediction] = row.probability or 0
        values = {
            "attribution": scaled.astype(np.float16),
            "label": labels,
            "prediction": probabilities,
            "scale": scale,
        }
        for name, array in self.arrays.items():
            array.append(values[name])
        explained = [row.explained for row in rows if row.explained is not None]
        self.classes |= {*labels.tolist(), *predictions, *explained}
        found = [(row.place, sample.number) for row, sample in zip(rows, samples) if row.place is not None]
        self.places.append(np.array([(p.class_number, p.cluster, n, p.x, p.y) for p, n in found], PLACE))

    def write_analysis(self, file: Any, width: int) -> None:
        """Write the clusters and the plot of each class."""
        places = np.sort(np.concatenate(self.places), order=["class", "index"])
        for number, first in zip(*np.unique(places["class"], return_index=True)):
            part = places[first : np.searchsorted(places["class"], number, "right")]
            group = file.create_group(format_class(int(number), width))
            group["index"] = part["index"]
            group[f"cluster/{CLUSTERING}"] = part["cluster"]
            group[f"embedding/{EMBEDDING}"] = np.stack([part["x"], part["y"]], 1)


def format_class(number: int, width: int) -> str:
    """Return a class number with leading zeros, so that ViRelAy lists the classes in their order."""
    return f"{number:0{width}d}"


@contextmanager
def open_virelay(folder: Path, description: Description) -> Iterator[Writer]:
    """Open a folder with `project.yaml` and the files that it names."""
    h5py = import_extra("virelay", "h5py", where="virelay", parameter="to")
    with h5py.File(folder / "dataset.h5", "w") as dataset, h5py.File(folder / "attributions.h5", "w") as attributions:
        writer = VirelayWriter(description, dataset, attributions, set(description.names))
        yield writer
        writer.flush()
    classes = sorted(writer.classes)
    width = len(str(max(classes, default=0)))
    if description.has_atlas and writer.places:
        with h5py.File(folder / "analysis.h5", "w") as file:
            writer.write_analysis(file, width)
    labels = [
        {
            "index": number,
            "word_net_id": format_class(number, width),  # by which ViRelAy finds the name of a class of the analysis
            "name": "none" if number == NO_CLASS else description.name_class(number),
        }
        for number in classes
    ]
    (folder / "label_map.json").write_text(json.dumps(labels, indent=1))
    project = PROJECT.format(
        width=writer.size[0],
        height=writer.size[1],
        strategy="true_label" if description.target == "label" else "predicted_label",
        **{name: quote_yaml(getattr(description, name)) for name in ("name", "model", "method")},
    )
    (folder / "project.yaml").write_text(project + (ANALYSES if description.has_atlas else ""))
