"""A command as a job of a cluster that is elsewhere: sent once, followed to its end, whatever the line does.

Ray's own `ray job submit` turns this program's exit status into 0 or 1, and ends when the connection does.
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
from pathlib import Path
from typing import Any, cast

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobErrorType, JobStatus, JobSubmissionClient

from patterns import UserError
from ray_jobs.engine.ray_address import no_answer_error, no_token_error
from ray_jobs.engine.signals import StoppedShortError

STOP_WITHIN = "600"  # seconds that a job has to commit when it is stopped; Ray's own 3 are too few
PROGRAM = "python -m ray_jobs"
SILENCE = 60.0  # seconds without a word of the log, after which the job is asked for whether it lives
PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between attempts to reach a cluster that does not answer
Chunks = AsyncGenerator[str, None]
# What the job's server, or the line to it, raise on the way.
AWAY = (OSError, RuntimeError, aiohttp.ClientError)


@dataclass(frozen=True)
class Submission:
    """A command for a cluster.

    arguments: of the program: ("fit", "--model", …).
    working_dir: a folder of this machine that the job gets a copy of and runs in; None: the program installed there.
    pip: requirements that are installed for the job.  env: variables of the job and its workers.
    """

    arguments: tuple[str, ...]
    working_dir: str | None = None
    pip: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """The same for the same command, whatever the variables' values, which may be secrets."""
        told = [self.arguments, self.working_dir, self.pip, [name for name, _ in self.env]]
        return f"patternnet-{self.arguments[0]}-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:10]}"

    @property
    def runtime_env(self) -> dict[str, Any]:
        env = {"RAY_JOB_STOP_WAIT_TIME_S": STOP_WITHIN, **dict(self.env)}
        parts = {"working_dir": self.working_dir, "pip": list(self.pip), "env_vars": env}
        return {name: value for name, value in parts.items() if value}


def submit(submission: Submission, address: str, wait: bool, patience: float, say: Callable[[str], None]) -> int:
    """Send a command, or find it where it was sent before and runs yet; follow its log; gives its exit status.

    patience: seconds for which a cluster may not answer before it is given up; the job goes on then.
    UserError where it cannot be sent; StoppedShortError where its end is not known, or another ended it.
    """
    for talker in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{talker}").setLevel(logging.ERROR)
    logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.ERROR)
    if submission.working_dir is not None and not Path(submission.working_dir).is_dir():
        raise UserError(
            f"--working-dir {submission.working_dir}", "no such folder", "Name one to send, or leave it out."
        )
    client = client_of(address)
    try:
        name, begun = sent(client, submission, address)
    except AuthenticationError as error:
        raise no_token_error(address) from error
    except AWAY as error:  # where the job was begun all the same, this command finds it
        raise no_answer_error(address) from error
    how = f"the same command follows it again, `ray job stop --address {address} {name}` ends it"
    try:
        say(f"{name}: {'sent' if begun else 'found at work'}; {how}")
        if not wait:
            return 0
        return status_of(asyncio.run(Follower(client, name, patience, say).job()), name)
    except AuthenticationError as error:
        raise no_token_error(address) from error
    except KeyboardInterrupt as error:
        raise StoppedShortError(f"{name} goes on without this command; {how}") from error


def client_of(address: str) -> JobSubmissionClient:
    if not address.startswith(("http://", "https://")):
        raise UserError(f"--address {address}", "not a dashboard's address", "Write http://HOST:8265.")
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # which Ray would else prefer to what it is told
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise no_token_error(address) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise no_answer_error(address) from error


def sent(client: JobSubmissionClient, submission: Submission, address: str) -> tuple[str, bool]:
    """The job's name, and whether it was begun by this: Ray takes no name twice, so that none begins twice."""
    earlier = {name: job for name, job in jobs(client).items() if name.startswith(f"{submission.name}-")}
    for name, job in earlier.items():
        if not job.status.is_terminal():
            return name, False
    last = max((int(name.rpartition("-")[2]) for name in earlier), default=0)  # some may have been deleted
    name = f"{submission.name}-{last + 1}"
    command = f"{PROGRAM} {shlex.join(submission.arguments)}"
    try:
        client.submit_job(entrypoint=command, submission_id=name, runtime_env=submission.runtime_env)
    except (*AWAY, ValueError) as error:
        if name not in jobs(client):  # else its answer was lost on the way, or another was as quick
            what = f"the job was not taken ({' '.join(str(error).split())[:300]})"
            raise UserError(
                f"--address {address}", what, "Check --working-dir, of at most 100 MiB, and --pip."
            ) from error
    return name, True


def jobs(client: JobSubmissionClient) -> dict[str, JobDetails]:
    """The jobs that the cluster knows, by the names they were sent under."""
    return {job.submission_id: job for job in client.list_jobs() if job.submission_id}


@dataclass
class Follower:
    """Shows a job's log as it grows, each character once, over as many connections as it takes.

    shown: characters of the log that were shown.
    """

    client: JobSubmissionClient
    name: str
    patience: float
    say: Callable[[str], None]
    shown: int = 0

    async def job(self) -> JobDetails:
        """Follow the job to its end, and give what the cluster says of it then."""
        heard, pause = time.monotonic(), PAUSE
        while True:
            with suppress(*AWAY):  # the cluster may answer all the same
                await self.follow()
            try:
                job = jobs(self.client).get(self.name)
                if job is not None and job.status.is_terminal():
                    self.show(self.client.get_job_logs(self.name)[self.shown :])
                    return job
                heard, pause = time.monotonic(), PAUSE
            except AWAY as error:
                if time.monotonic() - heard > self.patience:
                    what = f"{self.name}: the cluster did not answer for {self.patience:.0f} s"
                    raise StoppedShortError(f"{what}; the same command follows it again") from error
                if pause == PAUSE:
                    self.say(f"{self.name}: the cluster does not answer; trying again for {self.patience:.0f} s")
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                if job is None:
                    raise StoppedShortError(
                        f"{self.name}: the cluster knows it no more; the same command sends it anew"
                    )
            await asyncio.sleep(pause)

    async def follow(self) -> None:
        """Show the log until it ends, or says nothing for long, as when this machine has slept."""
        seen = 0
        async with aclosing(cast(Chunks, self.client.tail_job_logs(self.name))) as chunks:
            while (chunk := await next_of(chunks)) is not None:
                self.show(chunk[max(self.shown - seen, 0) :])
                seen += len(chunk)

    def show(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        self.shown += len(text)


async def next_of(chunks: Chunks) -> str | None:
    """The next chunk; None at the end, or after SILENCE."""
    try:
        return await asyncio.wait_for(anext(chunks, None), SILENCE)
    except TimeoutError:
        return None


def status_of(job: JobDetails, name: str) -> int:
    """The exit status of a job that has ended: its program's own, where it had one."""
    if job.status == JobStatus.SUCCEEDED:
        return 0
    if job.status == JobStatus.STOPPED:
        raise StoppedShortError(f"{name} was stopped; the same command goes on")
    if job.driver_exit_code is not None and 0 <= job.driver_exit_code < 128:
        return job.driver_exit_code
    if job.driver_exit_code is not None:
        raise StoppedShortError(f"{name} was killed (its status is {job.driver_exit_code}); the same command goes on")
    told = " ".join((job.message or "no reason given").split())[:300]
    if job.error_type == JobErrorType.RUNTIME_ENV_SETUP_FAILURE:
        raise UserError(
            name, f"the cluster could not prepare the job ({told})", "Check --pip, --env and --working-dir."
        )
    raise StoppedShortError(f"{name} was lost ({told}); the same command goes on")
