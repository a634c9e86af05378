"""Jobs that write files for each input shard: a shard is wholly there or not there, and worked on once."""

from typing import NamedTuple

from ray_jobs.config import MethodsConfig, Resources, equal_share
from ray_jobs.engine.shard_job import ShardJob, judge_samples
from ray_jobs.io.object_store import names
from ray_jobs.runs.lease import Heartbeat
from ray_jobs.runs.map_files import Outputs, outputs
from ray_jobs.runs.run_folder import Run, refused_in


class ShardTask(NamedTuple):
    """What a worker is told of a shard. out: the files to write.  most: samples at most."""

    shard: str
    out: Outputs
    most: int | None = None


class PerShardJob(ShardJob):
    """The driver's side: where the files of each shard go, and of how many samples they are."""

    def __init__(
        self, name: str, beat: Heartbeat, config: MethodsConfig, outs: dict[str, Outputs], resources: Resources
    ) -> None:
        there = {folder: set(names(folder)) for folder in {out.folder for out in outs.values()}}
        left = [shard for shard, out in outs.items() if out.rows not in there[out.folder]]
        shares = (equal_share(config.max_samples, number, len(outs)) for number in range(len(outs)))
        self.told = {shard: ShardTask(shard, out, most) for (shard, out), most in zip(outs.items(), shares)}
        super().__init__(name, beat, config.shards, left, resources, max_loss=None)

    def task(self, item: str) -> ShardTask:
        return self.told[item]


def shard_by_shard(
    name: str,
    beat: Heartbeat,
    config: MethodsConfig,
    resources: Resources,
    kind: str,
    line: str,
    worker: type,
    *more: object,
) -> tuple[list[Outputs], dict[str, object]]:
    """Have workers, made from the config and more, write what is left of a kind of files.

    line: said before, where anything is left.
    Gives the files of the shards that are done, and what the manifest says of them; the samples that were rejected
    are put in quarantine. Raises what a job raises; `enough_used` then judges how many samples were used.
    """
    outs = outputs(config.out, config.shards, kind)
    job = PerShardJob(name, beat, config, outs, resources)
    if job.left:
        job.reporter.line(line)
    job.run(worker, config, *more)
    done = [out for shard, out in outs.items() if shard not in job.missing]
    refused = [row for out in done for row in refused_in(out.folder / out.refused)]
    beat.run.quarantine(name, refused)
    return done, {"shards": len(done), "missing": job.missing, "refused": len(refused)}


def enough_used(run: Run, job: str, samples: int, resources: Resources) -> None:
    """Judge a job whose files are all written; see `judge_samples`. Its quarantine must be written too.

    Only then, because the samples of earlier calls with the same command count as well.
    """
    refused = run.quarantined(job)
    judge_samples(str(run.folder), samples, len(refused), lambda: refused[0], resources.max_bad_fraction)
