"""`patternnet show`: a large picture of one sample."""

from ray_jobs.cli.arguments import echo, output_file
from ray_jobs.cli.typer_options import command
from ray_jobs.config.commands import ShowOptions

MAX_NAME = 60  # characters of a key in a file's name


@command("patternnet show runs/vgg16 cat/1 --out cat.png")
def show(options: ShowOptions) -> None:
    """Draw one sample large, and print what its explanation holds."""
    from ray_jobs.figures.drawing import draw_sample
    from ray_jobs.views.gallery import open_gallery

    explained = open_gallery(options.run, options.classes)
    row = explained.find(options.key)
    path = output_file(options.out, options.run, f"{row['key'].replace('/', '_')[:MAX_NAME]}.png")
    draw_sample(path, explained.pictures([row])[0])
    for name, value in explained.describe(row).items():
        echo(f"{name:>40}  {value}")
    echo(f"show: {path}")
