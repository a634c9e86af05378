"""Jobs that are stopped: by signals, and how they end."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StoppedShortError(Exception):
    """The job ended with shards undone. Nothing is lost: the same command goes on."""


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """SIGTERM and Ctrl-C ask the job to commit and end; a second one ends it at once."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    # After ray.init(), which installs its own.
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
