"""The template of the jobs over shards: load the model, open the run, hold its lease, connect to Ray, record, work."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self, TypeVar
from uuid import uuid4

from patterns import UserError
from ray_jobs.config import Resources
from ray_jobs.data.selection import load_selection
from ray_jobs.engine.progress import write_line
from ray_jobs.engine.ray_session import choose_worker_cpus, connect
from ray_jobs.engine.ray_tasks import Tasks
from ray_jobs.engine.shard_worker import require_gpu_for_mode
from ray_jobs.engine.trackers import require_tracker
from ray_jobs.engine.tracking import mirror
from ray_jobs.io.object_store import locate
from ray_jobs.models import loading
from ray_jobs.runs.lease import Heartbeat, hold_lease, remove_leftovers
from ray_jobs.runs.run_folder import Config, Run
from ray_jobs.runs.usage import Usage

C = TypeVar("C", bound=Config)


class JobSession:
    """One job in its run's folder.

    Args:
        name: The job's section of the manifest.
        config: The options of the job. Its model is opened unless `loaded` is passed.
        loaded: The model.

    Attributes:
        run: The run's folder.
        selection: The samples that are used.
        section: The job's section of the manifest. Additions during the work are recorded when it ends.
        heartbeat: The heartbeat of this driver, while it works.
        tasks: Runs functions on the cluster, while it works.

    Raises:
        UserError: If the model or the lists of keys cannot be loaded, or the folder holds this job with other options.

    Example of the work of a job, see `run_job`::

        with session.work(resources, scales=scales):
            session.section |= {"samples": do_it(session.heartbeat, session.tasks)}
    """

    heartbeat: Heartbeat
    tasks: Tasks

    def __init__(self, name: str, config: Config, loaded: loading.AnyModel | None = None) -> None:
        self.name = name
        self.run = Run(config.out)
        folders = dict.fromkeys([self.run.folder, locate(getattr(config, "patterns", config.out))])
        self.loaded = loaded or loading.open_model(config.model, *folders)
        self.section: dict[str, Any] = self.run.section(name, config, self.loaded)
        keys, without_keys = (getattr(config, option, None) for option in ("keys", "without_keys"))
        self.selection = load_selection(keys, without_keys, config.shards)
        if self.section.setdefault("selection", self.selection.digest) != self.selection.digest:
            what = f"this {name} was begun with other lists of keys: their files have changed"
            raise UserError(str(self.run.folder), what, "Restore the files, or choose another --out.")

    @property
    def finished(self) -> bool:
        """Whether the job has ended, and no shard is missing."""
        return self.section["status"] == "complete" and not self.section["missing"]

    def close(self) -> Run:
        """Return the run of a finished job, after deleting the files that a killed driver has left."""
        remove_leftovers(self.run)
        return self.run

    @contextmanager
    def work(
        self, resources: Resources, compile_mode: str | None = None, lease: str | None = None, **recorded: object
    ) -> Iterator[Self]:
        """Hold the run's lease and a connection to Ray, and record the job before and after the work.

        Args:
            resources: The workers, and the limits on failures.
            compile_mode: The mode of `torch.compile`, to validate it again: the cluster's GPUs are known only now.
            lease: The name under which progress is shown, if it is not the job's.
            recorded: Entries of the section that are recorded before the work, in addition to the options.
        """
        if resources.track is not None:
            require_tracker(resources.track)
            self.section.setdefault("tracking", uuid4().hex)
        if resources.price is not None:
            self.section["price"] = resources.price
        last = self.run.progress()  # if a driver was killed, the manifest lacks its hours
        resumed = "usage" in self.section and last.get("job", "").startswith(self.name)
        earlier = Usage.read(last) if resumed else Usage()
        with hold_run(self.run, lease or self.name, resources) as (self.heartbeat, self.tasks):
            require_gpu_for_mode(compile_mode, resources)
            self.heartbeat.usage = Usage.read(self.section) | earlier
            self.section |= {**recorded, "usage": self.heartbeat.usage.to_json()}
            self.section["cpus_per_worker"] = choose_worker_cpus(resources)
            self.run.record(self.name, self.section, self.loaded)
            for line in self.loaded.traced.store(self.run.folder):
                write_line(sys.stderr, self.name, str(self.run.folder), line, resources.log == "json")
            begun = dict(self.section)
            try:
                with mirror(resources, self.run, self.name, self.section, self.read_progress):
                    yield self
                    self.section["usage"] = self.heartbeat.usage.to_json()
            except BaseException:
                self.record_usage(begun)
                raise
            self.section["status"] = "complete"
            self.run.record(self.name, self.section, self.loaded)

    def read_progress(self) -> dict[str, Any]:
        """Return the progress that the driver's heartbeat shows."""
        return self.heartbeat.progress

    def record_usage(self, begun: dict[str, Any]) -> None:
        """Record the usage of a job that ends early, unless another driver has taken over its run.

        Args:
            begun: The section as it was when the job began.
        """
        with suppress(UserError, OSError):
            self.heartbeat.require_lease()
            self.run.record(self.name, begun | {"usage": self.heartbeat.usage.to_json()}, self.loaded)


def run_job(name: str, config: C, resources: Resources, work: Callable[[JobSession, C, Resources], object]) -> Run:
    """Do a job, or resume one that ended early; a finished job is not done again.

    Args:
        name: The job's section of the manifest.
        config: The options of the job.
        resources: The workers, and the limits on failures.
        work: Does the job.

    Returns:
        The run.

    Raises:
        UserError: If the configuration or the data are wrong.
        StoppedShortError: If a signal stopped the job.
    """
    session = JobSession(name, config)
    if session.finished:
        return session.close()
    work(session, config, resources)
    return session.run


@contextmanager
def hold_run(run: Run, job: str, resources: Resources) -> Iterator[tuple[Heartbeat, Tasks]]:
    """Hold a run's lease and a connection to Ray.

    Raises:
        UserError: If another driver works on the run, or Ray does not answer.
    """
    with hold_lease(run, job, resources.timing) as heartbeat, connect(resources) as tasks:
        yield heartbeat, tasks
