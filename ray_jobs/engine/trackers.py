"""Experiment trackers that mirror a job: MLflow, Weights & Biases, and Trackio, each behind the same few calls.

All calls may block, and may raise any exception: only the thread of `tracking` makes them.
"""

import netrc
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from patterns import UserError
from ray_jobs.io.extras import import_extra

PROJECT = "patternnet"
KEY = "patternnet.key"  # tag of an MLflow run: the job that it mirrors, also after a resumption
MAX_BATCH = 100  # parameters in one request to MLflow
MAX_TEXT = 500  # characters of a parameter
# MLflow by default repeats a request seven times and waits two minutes for each.
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


MLFLOW_STATES = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class Client(Protocol):
    """A connection to one run of a tracker."""

    def log_options(self, options: Mapping[str, str]) -> None:
        """Record the options of the job."""

    def log_metrics(self, metrics: Mapping[str, float], step: int, when: float) -> None:
        """Record numbers.

        Args:
            metrics: The numbers by name.
            step: The number of shards that are done.
            when: The time in seconds since 1970.
        """

    def attach(self, file: Path) -> None:
        """Record a file."""

    def finish(self, state: str) -> None:
        """End the run as `finished`, `stopped` or `failed`."""


class MlflowClient:
    """A run of an MLflow server, or of MLflow's files.

    Args:
        uri: The address; empty for MLFLOW_TRACKING_URI.
        name: The name of the run.
        key: What identifies the run, so that a resumed job continues it.
    """

    def __init__(self, uri: str, name: str, key: str) -> None:
        import mlflow

        for variable, value in PATIENCE.items():
            os.environ.setdefault(variable, value)
        self.client = mlflow.MlflowClient(tracking_uri=uri or None)
        experiment = self.client.get_experiment_by_name(PROJECT)
        number = self.client.create_experiment(PROJECT) if experiment is None else experiment.experiment_id
        found = self.client.search_runs([number], f"tags.`{KEY}` = '{key}'", max_results=1)
        run = found[0] if found else self.client.create_run(number, tags={KEY: key}, run_name=name)
        self.run = run.info.run_id
        self.client.update_run(self.run, status="RUNNING")

    def log_options(self, options: Mapping[str, str]) -> None:
        """See `Client`. MLflow's parameters keep their first value; a later value, of a moved run, becomes a tag."""
        from mlflow.entities import Param, RunTag

        known = self.client.get_run(self.run).data.params
        remaining = iter((name, value) for name, value in options.items() if name not in known)
        while batch := list(islice(remaining, MAX_BATCH)):
            self.client.log_batch(self.run, params=[Param(*item) for item in batch])
        changed = [RunTag(name, value) for name, value in options.items() if known.get(name, value) != value]
        if changed:
            self.client.log_batch(self.run, tags=changed)

    def log_metrics(self, metrics: Mapping[str, float], step: int, when: float) -> None:
        """See `Client`."""
        from mlflow.entities import Metric

        now = int(1000 * when)
        self.client.log_batch(self.run, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])

    def attach(self, file: Path) -> None:
        """See `Client`."""
        self.client.log_artifact(self.run, str(file))

    def finish(self, state: str) -> None:
        """See `Client`."""
        self.client.set_terminated(self.run, MLFLOW_STATES[state])


class WandbClient:
    """A run of Weights & Biases. Its own settings are environment variables, such as WANDB_MODE and WANDB_PROJECT."""

    def __init__(self, _: str, name: str, key: str) -> None:
        import wandb

        self.wandb = wandb
        self.folder = tempfile.TemporaryDirectory(prefix="wandb-", ignore_cleanup_errors=True)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            id=key,
            resume="allow",
            dir=os.environ.get("WANDB_DIR", self.folder.name),
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log_options(self, options: Mapping[str, str]) -> None:
        """See `Client`."""
        self.run.config.update(dict(options), allow_val_change=True)

    def log_metrics(self, metrics: Mapping[str, float], step: int, when: float) -> None:
        """See `Client`."""
        self.run.log({**metrics, "shards done": step})

    def attach(self, file: Path) -> None:
        """See `Client`."""
        content: Any = self.wandb.Html(str(file)) if file.suffix == ".html" else self.wandb.Image(str(file))
        self.run.log({file.name: content})

    def finish(self, state: str) -> None:
        """See `Client`."""
        self.run.finish(exit_code=0 if state == "finished" else 1)


class TrackioClient:
    """A run of Trackio, on this machine, or in the space that TRACKIO_SPACE_ID names."""

    def __init__(self, _: str, name: str, key: str) -> None:
        import trackio

        self.trackio = trackio
        self.run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{name} {key[:8]}",
            resume="allow",
            space_id=os.environ.get("TRACKIO_SPACE_ID"),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log_options(self, options: Mapping[str, str]) -> None:
        """See `Client`."""
        self.run.config.update(options)

    def log_metrics(self, metrics: Mapping[str, float], step: int, when: float) -> None:
        """See `Client`."""
        self.run.log({**metrics, "shards done": step})

    def attach(self, file: Path) -> None:
        """See `Client`."""
        self.trackio.save(str(file), project=os.environ.get("TRACKIO_PROJECT", PROJECT))

    def finish(self, state: str) -> None:
        """See `Client`."""
        self.run.finish()


CLIENTS: dict[str, Callable[[str, str, str], Client]] = {
    "mlflow": MlflowClient,
    "wandb": WandbClient,
    "trackio": TrackioClient,
}


def require_tracker(track: str) -> None:
    """Raise UserError if a tracker's package is missing, or it could only ask for a key on the terminal."""
    name = track.partition(":")[0]
    import_extra(name, name, parameter="track")
    if name == "wandb" and not has_wandb_key():
        remedy = "Set WANDB_API_KEY, run wandb login, or set WANDB_MODE=offline."
        raise UserError("", "wandb has no API key", remedy, "track")


def has_wandb_key() -> bool:
    """Return whether wandb finds a key, or needs none."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def flatten_options(options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield options as names and texts that trackers accept; of a list of shards, its length and first shard."""
    for name, value in options.items():
        if isinstance(value, list) and name in ("shards", "evaluate") and value:
            text = f"{len(value)} from {value[0]}"
        elif isinstance(value, Mapping):
            yield from ((f"{name}.{each}", text) for each, text in flatten_options(value))
            continue
        else:
            text = str(value)
        yield name, text[:MAX_TEXT]


def find_metrics(progress: Mapping[str, Any], seconds: float) -> dict[str, float]:
    """Return the numbers of a job's progress.

    Args:
        progress: See `ProgressReporter.snapshot`.
        seconds: How long the job has worked.
    """
    workers = progress.get("workers", [])
    found = {name: float(progress[name]) for name in ("shards", "samples", "rejected") if name in progress}
    rate = sum(worker["rate"] for worker in workers)
    return found | {"workers": float(len(workers)), "samples per second": rate, "seconds": seconds}
