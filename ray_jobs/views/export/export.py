"""Write the samples of a run in the format of another tool. Memory does not grow with their number."""

import os
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

import torch

from patterns import UserError
from patterns.evaluation import compute_relevance
from patterns.io import TEMPORARY_PREFIX
from ray_jobs.config import Preprocessing
from ray_jobs.data.decoders import Decode, make_decode
from ray_jobs.data.samples import Sample, SampleError
from ray_jobs.data.shard_reader import read_shard
from ray_jobs.io.prefetch import map_in_order
from ray_jobs.models.class_names import load_class_names, map_numbers_to_names
from ray_jobs.units import make_printable
from ray_jobs.views.export.formats import FORMATS
from ray_jobs.views.export.samples import Description, ExportedSample, Row, distinguish_names, encode_picture
from ray_jobs.views.export.sources import AtlasPlaces, Source, open_source, with_places
from ray_jobs.views.photographs import model_view

THREADS = min(8, os.cpu_count() or 1)
Joined = tuple[int, str, Row, Sample]  # number, shard, map and photograph of a sample


@dataclass(frozen=True)
class Done:
    """Progress of an export.

    Attributes:
        shard: The shard that is read now; None at the end.
        shards: Number of shards that are done.
        total: Number of shards.
        samples: Number of samples that are written.
    """

    shard: str | None
    shards: int
    total: int
    samples: int


def write_export(
    out: Path,
    run: str,
    to: str,
    atlas: str | None = None,
    method: str | None = None,
    classes: str | None = None,
    threshold: float = 0.5,
    report: Callable[[Done], None] = lambda _: None,
) -> Done:
    """Write a folder with the samples of a run. It gets its name when it is complete.

    Args:
        out: The folder; it must not exist, or be empty.
        run: The folder of a finished `explain` or `atlas`.
        to: The format, one of FORMATS.
        atlas: The folder of an atlas of the same samples, for the clusters; None for that of the run, if it has one.
        method: The method of the maps; None for PatternAttribution, or else the first of the run.
        classes: A file of class names; None for the names of the model's library.
        threshold: See `Description`.
        report: Is called after each sample.

    Returns:
        What was written.

    Raises:
        UserError: If the folder is not empty, the run cannot be exported, or a photograph is not there any more.
    """
    require_empty(out)
    source, places = open_source(run, atlas, method)
    spec = source.section["model"]["spec"]
    names = distinguish_names(map_numbers_to_names(load_class_names(spec, classes)))
    options = source.section["options"]
    description = Description(
        out.resolve().name, spec, source.method, options["target"], names, places is not None, threshold
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(mkdtemp(prefix=TEMPORARY_PREFIX, dir=out.parent))
    try:
        folder.chmod(0o755)
        with FORMATS[to].open(folder, description) as writer:
            done = Done(None, 0, len(source.shards), 0)
            for done, sample in read_samples(source, places):
                writer.write(sample)
                report(done)
        if done.samples == 0:
            raise UserError(run, "has no sample to export", "All samples may have been rejected.")
        require_empty(out)
        os.replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    done = Done(None, done.total, done.total, done.samples)
    report(done)
    return done


def require_empty(out: Path) -> None:
    """Raise UserError unless a folder does not exist or is empty."""
    if out.exists() and not out.is_dir():
        raise UserError(str(out), "this is a file, not a folder", "Choose another folder.", "out")
    if out.exists() and next(out.iterdir(), None) is not None:
        what = "the folder is not empty; an export is complete once its folder exists"
        raise UserError(str(out), what, "Choose another folder, or delete it.", "out")


def read_samples(source: Source, places: AtlasPlaces | None) -> Iterator[tuple[Done, ExportedSample]]:
    """Yield all samples in the order of the shards, each with the progress once it is written."""
    preprocessing = Preprocessing(**source.section["options"]["preprocessing"])
    decode = make_decode(source.section["model"].get("decoder"), preprocessing)
    make = partial(make_sample, method=source.method, preprocessing=preprocessing, decode=decode)
    done = Done(None, 0, len(source.shards), 0)
    for count, shard in enumerate(source.shards):
        rows = source.read(shard)
        if places is not None:
            rows = with_places(rows, places.of_shard(shard))
        with closing(join(shard, rows, done.samples)) as joined, closing(map_in_order(make, joined, THREADS)) as made:
            for sample in made:
                done = Done(shard, count, len(source.shards), sample.number + 1)
                yield done, sample


def join(shard: str, rows: Iterator[Row], first: int) -> Generator[Joined, None, None]:
    """Yield the explained samples of a shard with their photographs, numbered from `first`.

    Both are read in the order of the shard, so that neither is held.

    Raises:
        UserError: If the shard does not contain a sample any more.
    """
    with closing(read_shard(shard)) as samples:
        for number, row in enumerate(rows, first):
            sample = next((each for each in samples if each.key == row.key), None)
            if sample is None:
                what = f"no longer contains sample {row.key!r}, or in another order"
                raise UserError(make_printable(shard), what, "Restore the shard, or explain it again.")
            yield number, shard, row, sample


def make_sample(joined: Joined, method: str, preprocessing: Preprocessing, decode: Decode | None) -> ExportedSample:
    """Return a sample with its photograph as the model sees it. Raise UserError if it cannot be decoded any more."""
    number, shard, row, sample = joined
    try:
        if sample.rejection is not None:
            raise SampleError(sample.rejection)
        picture = model_view(sample, preprocessing, decode).convert("RGB")
    except Exception as error:  # untrusted bytes make Pillow raise anything
        what = f"sample {row.key!r} can no longer be decoded ({error})"
        raise UserError(make_printable(shard), what, "Restore the shard, or explain it again.") from error
    relevance = compute_relevance(method, torch.from_numpy(row.map)[None])[0].numpy()
    return ExportedSample(number, make_printable(shard), row, picture, encode_picture(picture), relevance)
