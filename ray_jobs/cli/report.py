"""`patternnet report`: runs → one page of HTML."""

from ray_jobs.cli.arguments import echo, output_file
from ray_jobs.cli.typer_options import command
from ray_jobs.config.commands import ReportOptions
from ray_jobs.units import format_bytes


@command("patternnet report runs/vgg16", "patternnet report runs/vgg16 runs/resnet50 --samples 50 --out both.html")
def report(options: ReportOptions) -> None:
    """Write one self-contained HTML page about one or several runs."""
    from ray_jobs.views.report import write_report

    path = output_file(options.out, options.runs[0], "report.html")
    write_report(path, options.runs, options.samples, options.classes, options.seed, options.price)
    echo(f"report: {path}, {format_bytes(path.stat().st_size)}")
