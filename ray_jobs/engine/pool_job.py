"""The interface of a job to the worker pool."""

from typing import Any, Protocol


class Job(Protocol):
    """A job whose items the pool gives to workers. The pool calls the `on_` methods when something happens.

    Attributes:
        max_loss: Seconds of work that a worker may hold uncommitted. None: an item is committed when it is done.
        stall_timeout: Seconds without a report after which a worker is replaced.
        item_timeout: Seconds for one item after which a worker is replaced, although it reports.
        attempts: Attempts at an item before it is given up.
        bad_input: Type of the errors of an item that leave the worker usable. The worker drops its uncommitted work.
        busy: Subtype of `bad_input` for servers that refuse requests for now, with the attributes of
            `ray_jobs.io.refusals.BusyError`. If `begun` is False, the worker keeps its uncommitted work.
    """

    max_loss: float | None
    stall_timeout: float
    item_timeout: float
    attempts: int
    bad_input: type[Exception]
    busy: type[Exception]

    def wanted_workers(self) -> int:
        """Return how many workers the pool should have now."""

    def make_task(self, item: str) -> Any:
        """Return the task that a worker gets for an item."""

    def must_leave(self, worker: Any) -> bool:
        """Return whether a worker must leave its node; `worker` is its description."""

    def on_ready(self, worker: Any) -> None:
        """A worker is prepared; `worker` is its description, here and below."""

    def on_removed(self, worker: Any, error: Exception | None) -> None:
        """A worker that was ready is gone: it was lost by an error, or (None) left its node."""

    def on_released(self, worker: Any, seconds: float) -> None:
        """A worker that held resources of the cluster for some seconds has ended, whether it was ready or not."""

    def on_assigned(self, item: str, worker: Any) -> None:
        """A worker begins with an item."""

    def on_progress(self, item: str, report: Any) -> None:
        """A worker reported progress with an item."""

    def on_done(self, item: str, report: Any) -> None:
        """A worker finished an item with this last report; the work may still be lost."""

    def on_failed(self, item: str, error: Exception) -> None:
        """An attempt at an item failed."""

    def on_lost(self, items: list[str]) -> None:
        """Uncommitted items are lost and will be done again."""

    def on_committed(self, items: list[str], result: Any) -> None:
        """Items are done for good; `result` is what `commit`, or `work` if `max_loss` is None, returned."""
