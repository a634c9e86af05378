"""`patternnet grid`: a picture of samples × methods."""

from patterns import UserError
from ray_jobs.cli.arguments import echo, output_file
from ray_jobs.cli.typer_options import command
from ray_jobs.config.commands import GridOptions


@command(
    "patternnet grid runs/vgg16 --worst 20 --columns 2",
    "patternnet grid runs/vgg16 --keys cat/1,dog/7 --out figure.pdf",
)
def grid(options: GridOptions) -> None:
    """Draw photographs × methods, with captions: label → prediction and its probability."""
    from ray_jobs.figures.drawing import draw_grid
    from ray_jobs.views.gallery import open_gallery

    if (bool(options.keys) + bool(options.worst) + bool(options.random)) != 1:
        raise UserError(
            "grid",
            "samples are chosen in no way or in several",
            "Pass exactly one of `keys`, `worst=N` and `random=N`.",
        )
    explained = open_gallery(options.run, options.classes)
    if options.keys:
        rows = explained.find_all(options.keys)
    elif options.worst:
        rows = explained.worst(options.worst)
    else:
        rows = explained.draw(options.random, options.seed)
    if not rows:
        raise UserError("", "no prediction is wrong", "Choose samples by `keys` or `random`.", "worst")
    path = output_file(options.out, options.run, "grid.png")
    draw_grid(path, explained.pictures(rows), options.columns)
    echo(f"grid: {len(rows)} samples in {path}")
