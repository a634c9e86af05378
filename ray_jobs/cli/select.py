"""`patternnet select`: samples of an atlas → lists for other commands."""

from ray_jobs.cli.arguments import echo
from ray_jobs.cli.typer_options import command
from ray_jobs.config.commands import SelectOptions


@command(
    "patternnet select runs/vgg16-atlas 'class=17 and cluster=2' --out watermark",
    "patternnet select runs/vgg16-atlas 'label != prediction and loss > 2'",
)
def select(options: SelectOptions) -> None:
    """Write the keys and the shards of some samples of an atlas."""
    import pyarrow.parquet as pq

    from patterns import UserError
    from patterns.io import write_atomically
    from ray_jobs.data.selection import write_keys
    from ray_jobs.io.object_store import fetch
    from ray_jobs.runs.atlas_files import SAMPLES_FILE
    from ray_jobs.runs.run_folder import Run
    from ray_jobs.views.atlas.selection import parse_expression

    run = Run(options.run)
    run.require_job("atlas", "Run `patternnet atlas` to the end first.")
    with fetch(run.folder / SAMPLES_FILE) as path:
        chosen = parse_expression(options.expression, pq.read_schema(path))
        table = pq.read_table(path, columns=["number", "shard", "key"], filters=chosen).sort_by("number")
    if not len(table):
        raise UserError(options.expression, "no sample matches", "See samples.parquet of the run.", "expression")
    shards = list(dict.fromkeys(table["shard"].to_pylist()))
    write_keys(options.out / "keys.txt", zip(table["shard"].to_pylist(), table["key"].to_pylist()))
    lines = "".join(f"{shard}\n" for shard in shards)
    write_atomically(options.out / "shards.txt", lambda temporary: temporary.write_text(lines, encoding="utf-8"))
    files = f"{options.out / 'keys.txt'}, {options.out / 'shards.txt'}"
    echo(f"select: {len(table)} samples of {len(shards)} shards: {files}")
