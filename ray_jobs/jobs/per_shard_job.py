"""Jobs that write files for each shard: the files of a shard are complete or absent, and written once."""

from dataclasses import dataclass, field

from ray_jobs.config import MethodsConfig, Resources
from ray_jobs.data.shard_reader import ShardTask, equal_share
from ray_jobs.engine.shard_job import ShardJob, require_enough_samples
from ray_jobs.io.object_store import list_names
from ray_jobs.jobs.job_session import JobSession
from ray_jobs.runs.map_files import ShardFiles, list_shard_files
from ray_jobs.runs.run_folder import read_rejected


@dataclass(frozen=True)
class FilesTask(ShardTask):
    """One shard of a job.

    Attributes:
        files: The files to write.
    """

    files: ShardFiles = field(kw_only=True)


class PerShardJob(ShardJob):
    """The driver's side of a job that writes files for each shard. It works on the shards whose files are missing."""

    def __init__(
        self, session: JobSession, config: MethodsConfig, files: dict[str, ShardFiles], resources: Resources
    ) -> None:
        existing = {folder: set(list_names(folder)) for folder in {each.folder for each in files.values()}}
        remaining = [shard for shard, each in files.items() if each.rows not in existing[each.folder]]
        limits = (equal_share(config.max_samples, number, len(files)) for number in range(len(files)))
        chosen = session.selection
        self.tasks = {
            shard: FilesTask(shard, limit, chosen.only_of(shard), chosen.skip_of(shard), files=each)
            for (shard, each), limit in zip(files.items(), limits)
        }
        super().__init__(session.name, session.heartbeat, config.shards, remaining, resources, max_loss=None)

    def make_task(self, item: str) -> FilesTask:
        """Return the task of a shard."""
        return self.tasks[item]


def write_shard_files(
    session: JobSession,
    config: MethodsConfig,
    resources: Resources,
    folder: str,
    message: str,
    worker: type,
    *arguments: object,
) -> list[ShardFiles]:
    """Have workers write the files of the shards that have none yet.

    The session's section gets the number of finished shards, the missing shards and the number of rejected samples;
    the rejected samples are put into quarantine. `validate_sample_count` then judges how many samples were used.

    Args:
        session: The job.
        config: Its config, the first argument of the workers.
        resources: The workers, and the limits on failures.
        folder: The folder of the files in the run.
        message: The line to log if there is anything to do.
        worker: The class of the workers.
        *arguments: Further arguments of the workers.

    Returns:
        The files of the finished shards.

    Raises:
        UserError: If no shard can be used.
        StoppedShortError: If a signal stopped the job, or more shards failed than may.
    """
    files = list_shard_files(config.out, config.shards, folder)
    job = PerShardJob(session, config, files, resources)
    if job.remaining:
        job.reporter.log(message)
    job.run(worker, config, *arguments)
    done = [each for shard, each in files.items() if shard not in job.missing]
    rejected = [row for each in done for row in read_rejected(each.folder / each.rejected)]
    session.run.write_quarantine(session.name, rejected)
    session.section |= {"shards": len(done), "missing": job.missing, "refused": len(rejected)}
    return done


def validate_sample_count(session: JobSession, samples: int, resources: Resources) -> None:
    """Raise UserError if a job whose files are all written has rejected too many samples.

    The samples of earlier calls with the same command count as well, so the quarantine must be written.
    """
    rejected = session.run.read_quarantine(session.name)
    fraction = resources.max_bad_fraction
    require_enough_samples(str(session.run.folder), samples, len(rejected), lambda: rejected[0], fraction)
