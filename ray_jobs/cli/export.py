"""`patternnet export`: the samples of a run as a dataset of another tool."""

import time

from ray_jobs.cli.arguments import echo
from ray_jobs.cli.typer_options import command
from ray_jobs.config.commands import ExportOptions


@command(
    "patternnet export runs/vgg16-atlas --to fiftyone --out vgg16-fiftyone",
    "patternnet export runs/vgg16 --atlas runs/vgg16-atlas --to virelay \\\n    --out vgg16-virelay",
    "patternnet export runs/vgg16 --to coco --threshold 0.3 --out vgg16-coco",
)
def export(options: ExportOptions) -> None:
    """Write photographs, maps and clusters for FiftyOne, ViRelAy, Hugging Face or COCO."""
    from ray_jobs.engine.progress import ProgressReporter, WorkerProgress
    from ray_jobs.views.export import FORMATS, Done, write_export

    reporter: ProgressReporter | None = None
    worker = WorkerProgress("export", time.monotonic())

    def report(done: Done) -> None:
        nonlocal reporter
        if reporter is None:  # not before the options are known to be right
            reporter = ProgressReporter("export", options.run, done.total, 0)
            reporter.workers[0] = worker
        if done.shard != worker.shard:
            worker.shard, worker.shard_since = done.shard, time.monotonic()
        reporter.counts.shards, reporter.counts.samples = done.shards, done.samples
        worker.samples = done.samples
        reporter.tick()

    try:
        written = write_export(
            options.out,
            options.run,
            options.to,
            options.atlas,
            options.method,
            options.classes,
            options.threshold,
            report,
        )
    finally:
        if reporter is not None:
            reporter.close()
    hint = FORMATS[options.to].hint.format(out=str(options.out))
    echo(f"export: {written.samples} samples in {options.out}. Open it: {hint}")
