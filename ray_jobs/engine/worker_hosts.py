"""The processes of workers on Ray. Between the jobs of one command they can be kept, with all that they imported."""

import gc
import hashlib
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, RayError

from patterns import UserError

CLEAR_TIMEOUT = 10.0  # seconds in which a host must have ended its worker to be used again


def pack(values: Sequence[Any]) -> tuple[bytes, str]:
    """Return values as bytes to send, and the digest of the bytes."""
    content = cloudpickle.dumps(tuple(values))
    return content, hashlib.sha256(content).hexdigest()


def unpack(content: bytes, digest: str) -> Any:
    """Return the values of `pack`.

    Raises:
        UserError: If these are not the bytes of the digest.
    """
    if (found := hashlib.sha256(content).hexdigest()) != digest:
        what = f"the model that this worker received has the digest {found[:16]} instead of {digest[:16]}"
        raise UserError(platform.node(), what, "Check the memory and the network of this node, then resume the job.")
    return cloudpickle.loads(content)


class WorkerHost:
    """The process of a worker, a Ray actor: the methods of `PoolWorker`, for one worker after another."""

    def __init__(self) -> None:
        self.worker: Any = None
        self.error: Exception | None = None

    def start(self, content: Sequence[Any], digest: str, *further: Any) -> None:
        """Make a worker.

        Args:
            content: Ray's reference of the packed class of the worker and its arguments, the only item.
            digest: The digest of these bytes.
            further: Further arguments of the class.
        """
        try:
            worker, *arguments = unpack(ray.get(content[0]), digest)
            self.worker, self.error = worker(*arguments, *further), None
        except Exception as error:  # the code of a worker may be anything
            self.error = error

    def describe(self) -> Any:
        """Return who the worker is, or raise the error with which it could not be made."""
        if self.error is not None:
            raise self.error
        return self.worker.describe()

    def prepare(self) -> None:
        """Load whatever the work needs."""
        self.worker.prepare()

    def work(self, task: Any, following: Any = None) -> Iterator[Any]:
        """Work on a task, and yield reports."""
        yield from self.worker.work(task, following)

    def commit(self) -> Any:
        """Make all work since the last commit permanent."""
        return self.worker.commit()

    def clear(self) -> None:
        """End the worker, and free its memory."""
        self.worker.close()
        self.worker = None
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a pure function."""
        return function(*arguments)


@dataclass(frozen=True)
class KeptHost:
    """A host without a worker.

    Attributes:
        actor: The handle of its actor.
        options: The actor's options.
        cleared: Ray's reference of its last `clear`.
    """

    actor: Any
    options: dict[str, Any]
    cleared: Any


_kept: list[KeptHost] | None = None  # None: hosts end with their job


@contextmanager
def keep_workers() -> Iterator[None]:
    """Keep the processes of workers that finish a job in this block for its next job, and end them with the block."""
    global _kept
    if _kept is not None:
        yield
        return
    _kept = []
    try:
        yield
    finally:
        end_kept_hosts()
        _kept = None


def start_host(options: dict[str, Any]) -> Any:
    """Return the actor of a host: a kept one with the same options, or a new one. Kept ones with others are ended."""
    while _kept:
        host = _kept.pop(0)
        if host.options == options and is_cleared(host):
            return host.actor
        ray.kill(host.actor)
    return ray.remote(WorkerHost).options(**options).remote()


def is_cleared(host: KeptHost) -> bool:
    """Return whether a host is alive and has ended its worker."""
    try:
        ray.get(host.cleared, timeout=CLEAR_TIMEOUT)
    except (RayError, GetTimeoutError):
        return False
    return True


def release_host(actor: Any, options: dict[str, Any]) -> None:
    """Keep the host of an idle worker, or end it, after its worker has deleted its temporary files."""
    cleared = actor.clear.remote()
    if _kept is None:
        actor.__ray_terminate__.remote()
    else:
        _kept.append(KeptHost(actor, options, cleared))


def kept_actors() -> list[Any]:
    """Return the actors of the kept hosts, which hold CPUs that other tasks would wait for."""
    return [host.actor for host in _kept or ()]


def end_kept_hosts() -> None:
    """End all kept hosts."""
    while _kept:
        ray.kill(_kept.pop().actor)
