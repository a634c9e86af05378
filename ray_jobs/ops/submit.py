"""Submit a command as a Ray job, exactly once, and follow it to its end over interrupted connections.

`ray job submit` itself turns the program's exit status into 0 or 1, and ends when the connection is lost.
"""

import asyncio
import hashlib
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, cast

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobErrorType, JobStatus, JobSubmissionClient

from patterns import UserError
from ray_jobs.engine.ray_address import no_answer_error, no_token_error
from ray_jobs.engine.signals import StoppedShortError
from ray_jobs.ops.working_dir import EXCLUDES, measure_upload, require_runnable_project

NOT_FOUND = 127  # exit status of a shell that does not find the program
STOP_WITHIN = "600"  # seconds that a stopped job has to commit; Ray's default of 3 is too short
PROGRAM = "python -m ray_jobs"
ADDRESS = "RAY_API_SERVER_ADDRESS"
SILENCE = 60.0  # seconds without new log text after which the status of the job is requested
PAUSE, MAX_PAUSE = 1.0, 30.0  # seconds between attempts to reach a cluster that does not answer
Chunks = AsyncGenerator[str, None]
# Errors of the job server and of the connection to it.
CONNECTION_ERRORS = (OSError, RuntimeError, aiohttp.ClientError)


@dataclass(frozen=True)
class Submission:
    """A command for a cluster.

    Attributes:
        arguments: Arguments of the program: ("fit", "--model", …).
        working_dir: A local folder that is copied to the cluster and in which the job runs; None for the program that
            is installed there.
        pip: Requirements that are installed for the job.
        env: Environment variables of the job and its workers.
        uv: Whether the job and its workers run in the environment of the working directory's uv.lock.
    """

    arguments: tuple[str, ...]
    working_dir: str | None = None
    pip: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    uv: bool = False

    @property
    def name(self) -> str:
        """The name of the job without its number: equal for equal commands.

        The values of environment variables do not count, because they may be secrets.
        """
        identity = [self.arguments, self.working_dir, self.pip, [name for name, _ in self.env], *[self.uv] * self.uv]
        return f"patternnet-{self.arguments[0]}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:10]}"

    @property
    def runtime_env(self) -> dict[str, Any]:
        """The runtime environment of the Ray job."""
        env = {"RAY_JOB_STOP_WAIT_TIME_S": STOP_WITHIN, **dict(self.env)}
        excludes = list(EXCLUDES) if self.working_dir else []
        parts = {"working_dir": self.working_dir, "excludes": excludes, "pip": list(self.pip), "env_vars": env}
        return {name: value for name, value in parts.items() if value}


def submit(submission: Submission, address: str, wait: bool, patience: float, say: Callable[[str], None]) -> int:
    """Submit a command and follow its log. If the same command runs already, follow that job instead.

    Args:
        submission: The command.
        address: The address of the cluster's dashboard.
        wait: Follow the job to its end; else return after it was submitted.
        patience: Seconds without an answer after which the cluster is given up. The job continues.
        say: Prints a line.

    Returns:
        The exit status of the command; 0 without `wait`.

    Raises:
        UserError: If the command cannot be submitted.
        StoppedShortError: If the end of the job is unknown, or the job was stopped.
    """
    for module in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.ERROR)
    logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.ERROR)
    if submission.uv and submission.pip:
        what = "the packages of a project of uv are those of its lock"
        raise UserError("--pip", what, "Add the package by uv add, or pass --no-uv.")
    upload = None if submission.working_dir is None else measure_upload(submission.working_dir)
    client = connect_client(address)
    try:
        if submission.uv:
            require_runnable_project(str(submission.working_dir), find_ray_version(client))
        if upload is not None:
            say(f"sending {submission.working_dir}: {upload.describe()}")
        name, is_new = find_or_send(client, submission, address)
    except AuthenticationError as error:
        raise no_token_error(address) from error
    except CONNECTION_ERRORS as error:  # if the job was started nevertheless, the next call finds it
        raise no_answer_error(address) from error
    how = f"the same command follows it again, `ray job stop --address {address} {name}` stops it"
    try:
        say(f"{name}: {'submitted' if is_new else 'already running'}; {how}")
        if not wait:
            return 0
        return exit_status_of(asyncio.run(Follower(client, name, patience, say).job()), name, submission.uv)
    except AuthenticationError as error:
        raise no_token_error(address) from error
    except KeyboardInterrupt as error:
        raise StoppedShortError(f"{name} continues without this command; {how}") from error


def connect_client(address: str) -> JobSubmissionClient:
    """Connect to the dashboard of a cluster.

    Raises:
        UserError: If the address is not that of a dashboard, the token is wrong, or nothing answers.
    """
    if not address.startswith(("http://", "https://")):
        raise UserError(f"--address {address}", "not the address of a dashboard", "Write http://HOST:8265.")
    before = os.environ.get(ADDRESS)
    os.environ[ADDRESS] = address  # Ray prefers it, and RAY_ADDRESS, to the argument
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise no_token_error(address) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise no_answer_error(address) from error
    finally:
        os.environ.pop(ADDRESS)
        if before is not None:
            os.environ[ADDRESS] = before


def find_or_send(client: JobSubmissionClient, submission: Submission, address: str) -> tuple[str, bool]:
    """Return the name of the job and whether this call started it.

    Ray rejects a name that is in use, so a command never runs twice at the same time.
    """
    earlier = {name: job for name, job in list_jobs(client).items() if name.startswith(f"{submission.name}-")}
    for name, job in earlier.items():
        if not job.status.is_terminal():
            return name, False
    last = max(
        (int(name.rpartition("-")[2]) for name in earlier), default=0
    )  # numbers may be missing: jobs can be deleted
    name = f"{submission.name}-{last + 1}"
    # Ray's hook for `uv run` starts the workers in the same environment as the driver.
    command = f"{'uv run --locked ' * submission.uv}{PROGRAM} {shlex.join(submission.arguments)}"
    try:
        client.submit_job(entrypoint=command, submission_id=name, runtime_env=submission.runtime_env)
    except (*CONNECTION_ERRORS, ValueError) as error:
        if name not in list_jobs(client):  # if it is listed, the answer was lost, or another process sent it
            what = f"the cluster rejected the job ({' '.join(str(error).split())[:300]})"
            raise UserError(f"--address {address}", what, "Check --working-dir and --pip.") from error
    return name, True


def find_ray_version(client: JobSubmissionClient) -> str:
    """Return the version of Ray on a cluster."""
    return str(client._do_request("GET", "/api/version").json()["ray_version"])


def list_jobs(client: JobSubmissionClient) -> dict[str, JobDetails]:
    """Return the cluster's jobs by submission id."""
    return {job.submission_id: job for job in client.list_jobs() if job.submission_id}


@dataclass
class Follower:
    """Printer of the log of a job as it grows, each character once, over any number of connections.

    Attributes:
        client: The connection to the dashboard.
        name: The submission id of the job.
        patience: Seconds without an answer after which the cluster is given up.
        say: Prints a line.
        shown: Number of characters of the log that were printed.
    """

    client: JobSubmissionClient
    name: str
    patience: float
    say: Callable[[str], None]
    shown: int = 0

    async def job(self) -> JobDetails:
        """Follow the job to its end and return its details."""
        last_answer, pause = time.monotonic(), PAUSE
        while True:
            with suppress(*CONNECTION_ERRORS):  # the cluster may answer nevertheless
                await self.follow()
            try:
                job = list_jobs(self.client).get(self.name)
                if job is not None and job.status.is_terminal():
                    self.show(self.client.get_job_logs(self.name)[self.shown :])
                    return job
                last_answer, pause = time.monotonic(), PAUSE
            except CONNECTION_ERRORS as error:
                if time.monotonic() - last_answer > self.patience:
                    what = f"{self.name}: the cluster did not answer for {self.patience:.0f} s"
                    raise StoppedShortError(f"{what}; the same command follows it again") from error
                if pause == PAUSE:
                    self.say(f"{self.name}: no answer from the cluster; retrying for {self.patience:.0f} s")
                pause = min(2 * pause, MAX_PAUSE)
            else:
                if job is None:
                    raise StoppedShortError(
                        f"{self.name}: the cluster no longer knows the job; the same command submits it again"
                    )
            await asyncio.sleep(pause)

    async def follow(self) -> None:
        """Print the log until it ends, or until there is no new text for `SILENCE` seconds (a suspended laptop)."""
        seen = 0
        async with aclosing(cast(Chunks, self.client.tail_job_logs(self.name))) as chunks:
            while (chunk := await next_chunk(chunks)) is not None:
                self.show(chunk[max(self.shown - seen, 0) :])
                seen += len(chunk)

    def show(self, text: str) -> None:
        """Print new text of the log."""
        sys.stdout.write(text)
        sys.stdout.flush()
        self.shown += len(text)


async def next_chunk(chunks: Chunks) -> str | None:
    """Return the next chunk; None at the end, or after `SILENCE` seconds."""
    try:
        return await asyncio.wait_for(anext(chunks, None), SILENCE)
    except TimeoutError:
        return None


def exit_status_of(job: JobDetails, name: str, uv: bool = False) -> int:
    """Return the exit status of a finished job's program.

    Args:
        job: The job.
        name: The submission id of the job.
        uv: Whether `uv run` starts the program.

    Raises:
        UserError: If the runtime environment could not be prepared, or the cluster has no uv.
        StoppedShortError: If the job was stopped, killed or lost.
    """
    if job.status == JobStatus.SUCCEEDED:
        return 0
    if job.status == JobStatus.STOPPED:
        raise StoppedShortError(f"{name} was stopped; the same command resumes it")
    if uv and job.driver_exit_code == NOT_FOUND:
        raise UserError(name, "uv is not installed on the cluster", "Install it on every node, or pass --no-uv.")
    if job.driver_exit_code is not None and 0 <= job.driver_exit_code < 128:
        return job.driver_exit_code
    if job.driver_exit_code is not None:
        raise StoppedShortError(f"{name} was killed (exit status {job.driver_exit_code}); the same command resumes it")
    reason = " ".join((job.message or "no reason given").split())[:300]
    if job.error_type == JobErrorType.RUNTIME_ENV_SETUP_FAILURE:
        raise UserError(
            name, f"the cluster could not prepare the job ({reason})", "Check --pip, --env and --working-dir."
        )
    raise StoppedShortError(f"{name} was lost ({reason}); the same command resumes it")
