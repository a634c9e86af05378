"""The fit job: shards → moments → parts → patterns, each shard counted exactly once."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from uuid import uuid4

from patterns import CHOICES, Observer, Operator, UserError, storage
from patterns.estimators import wanted
from patterns.moments import Wanted
from patterns.storage import save_moments, write_json
from ray_jobs import models, reduce
from ray_jobs.config import FitConfig, ModelConfig, Resources, equal_share
from ray_jobs.ledger import Ledger, Part, Refused
from ray_jobs.run import Run
from ray_jobs.session import ShardJob, connected
from ray_jobs.shards import ShardReader
from ray_jobs.worker import Place, ShardReport, Share


class FitWorker:
    """Holds the model and the moments not yet committed. Losing it loses nothing that counts."""

    def __init__(self, config: FitConfig, weights: str, share: Share = Share()) -> None:  # noqa: B008 - frozen
        self.config, self.share = config, share
        self.loaded = share.load(config.model, weights)
        self.observer = Observer(self.loaded.network, wants(config))
        self.forget()

    def ready(self) -> Place:
        """Where this worker runs, once its model is loaded."""
        return self.share.place()

    def forget(self) -> None:
        """Drop the moments not yet committed."""
        self.observer.reset()
        self.shards: list[str] = []
        self.samples = 0
        self.refused: list[Refused] = []

    def work(self, shard: str) -> ShardReport:
        """Add the moments of a whole shard. On any error, everything not committed is dropped."""
        number, loaded = self.config.shards.index(shard), self.loaded
        most = equal_share(self.config.max_samples, number, len(self.config.shards))
        reader = ShardReader(shard, loaded.preprocessing, self.config.batch_size, loaded.dtype, most)
        samples = 0
        try:
            for batch in reader:
                self.observer.update(batch.images.to(loaded.device, non_blocking=True))
                samples += len(batch.keys)
        except BaseException:
            self.forget()
            raise
        self.shards.append(shard)
        self.samples += samples
        self.refused += reader.refused
        return ShardReport(samples, len(reader.refused))

    def commit(self) -> Part:
        """Write the moments as a part. It counts once the driver has put it into the ledger."""
        part = Part(f"part-{uuid4().hex}.safetensors", tuple(self.shards), self.samples, tuple(self.refused))
        save_moments(
            Path(self.config.out) / "moments" / part.file, self.observer.moments(), {"weights": self.loaded.digest}
        )
        self.forget()
        return part


class FitJob(ShardJob):
    """The driver's side of a fit: the ledger and its file."""

    def __init__(self, run: Run, config: FitConfig, max_loss: float) -> None:
        self.folder = run.folder / "moments"
        self.path = self.folder / "ledger.json"
        self.ledger = Ledger.from_json(json.loads(self.path.read_text())) if self.path.exists() else Ledger()
        named = {part.file for part in self.ledger.parts}
        for file in self.folder.glob("part-*.safetensors"):
            if file.name not in named:  # written by a worker whose driver died before it could count
                file.unlink()
        self.seconds = 0.0  # from the first worker's start to the last commit
        super().__init__("fit", config.shards, self.ledger.left(config.shards), max_loss)

    def counts(self, items: list[str], told: Part) -> None:
        if sorted(told.shards) != sorted(items):
            raise RuntimeError(f"{told.file} holds {told.shards}, not {items}")
        self.ledger = self.ledger.commit(told)
        write_json(self.path, self.ledger.to_json())
        self.seconds = time.monotonic() - self.begun


def fit(config: FitConfig, resources: Resources = Resources()) -> Run:  # noqa: B008 - frozen
    """Fit the patterns of a model to some shards, or go on with a fit that ended early.

    UserError where the configuration or the data are wrong, StoppedShortError where a signal came.
    """
    check_estimators(config.estimators)
    loaded = models.load(config.model)
    run = Run(config.out)
    section = run.claim("fit", config, loaded)
    if section["status"] == "complete":
        return run
    job = FitJob(run, config, resources.max_loss)
    with connected(resources):
        job.run(resources, FitWorker, config, loaded.digest)
        ledger = job.ledger
        run.quarantine("fit", list(ledger.refused))
        if not ledger.samples:
            first = ledger.refused[0]
            what = f"none of the {len(ledger.refused)} samples can be used; {first.key}: {first.reason}"
            raise UserError(first.shard, what, "Mend the data, then choose another --out.")
        job.reporter.line(f"solving for the patterns of {len(loaded.network.operators)} operators")
        reduce_to_patterns(run, ledger, loaded, config.estimators, config.estimators, config.seed)
    counted = {"shards": len(config.shards), "samples": ledger.samples, "refused": len(ledger.refused)}
    run.record("fit", section | {"status": "complete", **counted, "seconds": round(job.seconds, 3)}, loaded)
    return run


def solve(folder: str, estimators: Sequence[str], resources: Resources = Resources()) -> Run:  # noqa: B008 - frozen
    """Add the patterns of further estimators to a finished fit, from its moments alone.

    UserError where the fit is not finished, its weights are not found, or its sums do not do.
    """
    check_estimators(estimators)
    run = Run(folder)
    section = run.job("fit", "Run `patternnet fit` to the end first.")
    loaded = models.load(ModelConfig(**run.fitted_model()))
    if loaded.digest != section["options"]["weights"]:
        what = f"the fit's weights are {section['options']['weights']}, the model now has {loaded.digest}"
        raise UserError(folder, what, "Put the fit's weights back in their place.")
    taken = tuple(section["options"]["estimators"])
    for operator in loaded.network.operators.values():
        needed, had = wanted(operator, estimators), wanted(operator, taken)
        if needed.total > had.total or needed.open > had.open:
            what = f"a fit of {', '.join(taken)} took no sums of {operator.name} for {', '.join(estimators)}"
            raise UserError(folder, what, f"Fit with --estimators {','.join(estimators)}.")
    solved = tuple(dict.fromkeys((*section.get("solved", taken), *estimators)))
    ledger = Ledger.from_json(json.loads((run.folder / "moments" / "ledger.json").read_text()))
    with connected(resources):
        reduce_to_patterns(run, ledger, loaded, solved, taken, section["options"]["seed"])
    run.record("fit", section | {"solved": solved}, loaded)
    return run


def reduce_to_patterns(
    run: Run, ledger: Ledger, loaded: models.Loaded, choices: Sequence[str], taken: Sequence[str], seed: int
) -> None:
    """Merge the parts that count, whose sums were taken for some estimators, and write the patterns of the choices."""
    parts = [str(run.folder / "moments" / part.file) for part in ledger.parts]
    operators = list(loaded.network.operators.values())
    solutions = reduce.solve_all(parts, operators, lambda op: wanted(op, taken), choices, seed)
    storage.save(run.folder, solutions, loaded.digest)


def check_estimators(names: Sequence[str]) -> None:
    if unknown := [name for name in names if name not in CHOICES]:
        raise UserError("--estimators", f"no estimator {unknown[0]!r}", f"Choose from {', '.join(CHOICES)}.")


def wants(config: FitConfig) -> Callable[[Operator], Wanted]:
    """Which sums the estimators of a fit need of an operator."""
    return lambda operator: wanted(operator, config.estimators)
