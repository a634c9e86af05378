"""The formats of exports."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from ray_jobs.views.export.coco import open_coco
from ray_jobs.views.export.fiftyone import open_fiftyone
from ray_jobs.views.export.huggingface import open_huggingface
from ray_jobs.views.export.samples import Description, Writer
from ray_jobs.views.export.virelay import open_virelay


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        open: Opens the writer of a folder. The files that list all samples are written at the end of the block, if it
            raised nothing.
        hint: How the folder is opened; `{out}` is its path.
    """

    open: Callable[[Path, Description], AbstractContextManager[Writer]]
    hint: str


FORMATS = {
    "fiftyone": Format(open_fiftyone, "fiftyone.Dataset.from_dir({out!r}, fiftyone.types.FiftyOneDataset)"),
    "virelay": Format(open_virelay, "virelay {out}/project.yaml"),
    "huggingface": Format(open_huggingface, "datasets.load_dataset({out!r})"),
    "coco": Format(open_coco, "pycocotools.coco.COCO({out!r} + '/annotations.json')"),
}
