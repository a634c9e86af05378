"""Report the progress of a run from its files alone, on any machine that can read them."""

from collections.abc import Iterator
from typing import Any

from patterns import UserError
from ray_jobs.config.timing import PRODUCTION, Timing
from ray_jobs.runs.lease import Driver, wait_for_heartbeat
from ray_jobs.runs.run_folder import JOBS, Run
from ray_jobs.runs.usage import Usage
from ray_jobs.units import format_duration


def status_lines(
    run: Run, now: float, patience: float = 0.0, timing: Timing = PRODUCTION, price: str | None = None
) -> Iterator[str]:
    """Yield lines that describe the jobs of a run and their progress.

    Args:
        run: The run.
        now: The time in seconds since 1970.
        patience: Seconds to wait for a heartbeat if the last one is old, or in the future by this machine's clock.
        timing: Intervals of the heartbeat.
        price: Price of the workers; None: what the job was given.

    Raises:
        UserError: If the folder holds no run.
    """
    manifest, progress = run.manifest(), run.progress()
    jobs = [job for job in JOBS if job in manifest]
    if not jobs:
        raise UserError(str(run.folder), "holds no run", "Name the folder that was given to --out.")
    for job in jobs:
        section = manifest[job]
        used = Usage.read(section)
        if section["status"] == "complete":
            missing = f", {len(section['missing'])} shards missing" if section["missing"] else ""
            yield f"{job}: complete, {section['samples']} samples{missing} ({section['written']})"
        else:
            noted = progress if progress.get("job", "").startswith(job) else {}
            yield from progress_lines(job, section, noted, now, run, patience, timing)
            used |= Usage.read(noted)
        if used.worker_hours:
            yield f"  {used.describe(price or section.get('price'))}"


def progress_lines(
    job: str, section: dict[str, Any], progress: dict[str, Any], now: float, run: Run, patience: float, timing: Timing
) -> Iterator[str]:
    """Yield the progress that the last driver of an unfinished job recorded."""
    if "state" in progress:
        yield f"{job}: {progress['shards']}/{progress['of']} shards, {progress['state']}"
    else:
        yield f"{job}: started, no shard processed yet ({section['written']})"
    if not progress:
        return
    since = now - progress["time"]
    silent = max(since, 0.0)
    for worker in sorted(progress.get("workers", ()), key=lambda worker: worker["rate"]):
        shard, seconds = worker["shard"], format_duration(worker["seconds"] + silent)
        at = "idle" if shard is None else f"{seconds} at {shard}"
        yield f"  {worker['worker']}: {worker['rate']:.1f} samples/s, {at}"
    resume = "the same command resumes it"
    if progress.get("ended"):
        yield f"  stopped {format_duration(silent)} ago; {resume}"
    elif Driver(**progress["driver"]).has_ended() or (
        not 0 <= since <= timing.stale_after and not wait_for_heartbeat(run, progress, patience, timing.watch_interval)
    ):
        yield f"  stale: no heartbeat from its driver for {format_duration(silent)}; {resume}"
