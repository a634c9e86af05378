"""`patternnet pack`: a folder of images → shards."""

from collections import Counter

from ray_jobs.cli.arguments import echo
from ray_jobs.cli.typer_options import command
from ray_jobs.config.commands import PackOptions


@command(
    "patternnet pack photos/ shards/",
    "patternnet pack photos/ shards/ --per-shard 500 --crops 4 --size 224",
)
def pack(options: PackOptions) -> None:
    """Pack a folder of images into WebDataset shards."""
    from ray_jobs.data.packing import choose_images, list_images
    from ray_jobs.data.packing import pack as run_pack

    shards = run_pack(**vars(options))
    images = choose_images(list_images(options.images), options.keys, options.without_keys)
    formats = Counter(name.rpartition(".")[2].lower() for name in images).most_common()
    counts = ", ".join(f"{count} {extension}" for extension, count in formats)
    out = options.out
    echo(f"{len(shards)} shards in {out} from these images: {counts}; their classes in {out / 'classes.json'}")
