"""`--track`: a job's options, progress and figures, mirrored to an experiment tracker by a thread of the driver.

The job does not wait for the tracker, except for a limited time at its end, and does not fail because of it: an error
is one line in the log, and the thread tries again.
"""

import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from ray_jobs.config import Resources
from ray_jobs.engine.progress import write_line
from ray_jobs.engine.signals import StoppedShortError
from ray_jobs.engine.trackers import CLIENTS, Client, find_metrics, flatten_options
from ray_jobs.runs.run_folder import Run

MAX_POINTS = 1000  # of progress that wait while the tracker does not respond; the oldest are dropped
MAX_PAUSE = 600.0  # seconds between two attempts to reach a tracker
LAST_WAIT = 15.0  # seconds that the end of a job waits for the tracker
FILE_WAIT = 120.0  # seconds to write and attach a file after the job

Call = Callable[[Client], None]


class Tracker:
    """A thread that mirrors a job.

    Args:
        connect: Makes the client.
        place: The tracker in messages.
        say: Writes a line to the log.
        interval: Seconds between two points of the progress.
        sample: Returns a call that sends the progress now; None: only what `send` is given.

    Attributes:
        waiting: The calls that are to be made, in order.
    """

    def __init__(
        self,
        connect: Callable[[], Client],
        place: str,
        say: Callable[[str], None],
        interval: float,
        sample: Callable[[], Call | None] = lambda: None,
    ) -> None:
        self.connect, self.place, self.say, self.interval, self.sample = connect, place, say, interval, sample
        self.waiting = deque[Call](maxlen=MAX_POINTS)
        self.ended, self.done = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def send(self, call: Call) -> None:
        """Make a call when the tracker is reached."""
        self.waiting.append(call)

    def work(self) -> None:
        """Make the waiting calls until the end; one more attempt then."""
        client, pause, complained, retry_at = None, self.interval, False, 0.0
        while True:
            last = self.ended.is_set()
            if not last and (call := self.sample()) is not None:
                self.waiting.append(call)
            if last or time.monotonic() >= retry_at:
                try:
                    client = client or self.connect()
                    self.make_calls(client)
                    pause, complained = self.interval, False
                except Exception as error:  # of any library
                    pause = min(2 * pause, MAX_PAUSE)
                    retry_at = time.monotonic() + pause
                    if not complained:
                        reason = hide_passwords(" ".join(str(error).split()))[:200] or type(error).__name__
                        self.say(f"tracking: {self.place} does not work ({reason}); the job goes on without it")
                    complained = True
            if last:
                self.done.set()
                return
            self.ended.wait(self.interval)

    def make_calls(self, client: Client) -> None:
        """Make the waiting calls; one that fails waits again."""
        while self.waiting:
            call = self.waiting.popleft()
            try:
                call(client)
            except Exception:
                if len(self.waiting) < MAX_POINTS:
                    self.waiting.appendleft(call)
                raise

    def close(self, wait: float) -> None:
        """Make the last calls, and wait for them for some seconds at most."""
        self.ended.set()
        if not self.done.wait(wait):
            self.say(f"tracking: {self.place} did not take the last figures within {wait:g} s")


def describe_place(track: str) -> str:
    """Return the tracker in messages: without a password in its address."""
    name, _, uri = track.partition(":")
    split = urlsplit(uri)
    return f"{name} at {split._replace(netloc=split.netloc.rpartition('@')[2]).geturl()}" if uri else name


def hide_passwords(text: str) -> str:
    """Return a text in which no address has a user and a password.

    Example:
        >>> hide_passwords("no answer from https://me:secret@host:80/x")
        'no answer from https://host:80/x'
    """
    return re.sub(r"(\w+://)[^\s/@]+@", r"\1", text)


def make_tracker(
    resources: Resources,
    run: Run,
    job: str,
    section: Mapping[str, Any],
    sample: Callable[[], Call | None] = lambda: None,
) -> Tracker:
    """Return the thread that mirrors a job of a run to `resources.track`.

    Args:
        resources: The options of the job.
        run: The run.
        job: The name of the job's section of the manifest.
        section: The section.
        sample: See `Tracker`.
    """
    name, _, uri = str(resources.track).partition(":")
    make_client, options = CLIENTS[name], dict(flatten_options({**section["options"], "out": str(run.folder)}))

    def say(text: str) -> None:
        write_line(sys.stderr, job, str(run.folder), text, resources.log == "json")

    def connect() -> Client:
        client = make_client(uri, f"{run.folder.name}/{job}", section["tracking"])
        client.log_options(options)
        return client

    return Tracker(connect, describe_place(str(resources.track)), say, resources.timing.track_interval, sample)


@contextmanager
def mirror(
    resources: Resources, run: Run, job: str, section: Mapping[str, Any], progress: Callable[[], Mapping[str, Any]]
) -> Iterator[None]:
    """Mirror a job to the tracker of `resources.track` during the block; a no-op without one.

    Args:
        resources: The options of the job.
        run: The run.
        job: The name of the job's section of the manifest.
        section: The section; its numbers at the end of the block are the final figures.
        progress: Returns the job's progress.
    """
    if resources.track is None:
        yield
        return
    begun = time.time()

    def sample() -> Call | None:
        now, when = dict(progress()), time.time()
        if "state" not in now:
            return None
        return lambda client: client.log_metrics(find_metrics(now, when - begun), int(now["shards"]), when)

    tracker, state = make_tracker(resources, run, job, section, sample), "failed"
    try:
        yield
        state = "finished"
    except (StoppedShortError, KeyboardInterrupt):
        state = "stopped"
        raise
    finally:
        if call := sample():
            tracker.send(call)
        if state == "finished":
            tracker.send(send_figures(section))
        tracker.send(lambda client: client.finish(state))
        tracker.close(LAST_WAIT)


def mirror_file(
    resources: Resources, run: Run, job: str, write: Callable[[Path], object], name: str, figures: Mapping[str, float]
) -> None:
    """Attach a file and further figures to a mirrored job that has ended; a no-op without a tracker.

    Args:
        resources: The options of the job.
        run: The run.
        job: The name of the job's section of the manifest.
        write: Writes the file. It runs in the thread, so that its errors are the tracker's.
        name: The name of the file.
        figures: Further figures by name.
    """
    section = run.manifest()[job] if resources.track else {}
    if "tracking" not in section:  # an earlier command did the job without a tracker
        return

    def attach(client: Client) -> None:
        with TemporaryDirectory() as folder:
            write(Path(folder) / name)
            client.attach(Path(folder) / name)

    tracker = make_tracker(resources, run, job, section)
    for call in (send_figures(figures), attach, lambda client: client.finish("finished")):
        tracker.send(call)
    tracker.close(FILE_WAIT)


def send_figures(figures: Mapping[str, Any]) -> Call:
    """Return the call that sends the numbers among some figures, such as a section of the manifest."""
    found = {f"final {name}": float(value) for name, value in figures.items() if is_number(value)}
    if "missing" in figures:
        found["final missing shards"] = float(len(figures["missing"]))
    when, step = time.time(), int(found.get("final shards", 0))
    return lambda client: client.log_metrics(found, step, when) if found else None


def is_number(value: object) -> bool:
    """Return whether a value is a number that a tracker can show."""
    return isinstance(value, int | float) and not isinstance(value, bool)
