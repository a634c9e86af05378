"""Shards → partial moments, each shard counted exactly once: the part that `fit` and `quality` share."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from patterns import Network, UserError
from patterns.estimation import OperatorObserver
from patterns.io import TensorFile, require_moments_of
from ray_jobs.config import Resources
from ray_jobs.data.concepts import ConceptLabels, require_one_sample
from ray_jobs.data.samples import RejectedSample, derive_seed
from ray_jobs.data.selection import Selection
from ray_jobs.data.shard_reader import ShardTask, equal_share
from ray_jobs.engine.ray_tasks import PendingCall, Tasks
from ray_jobs.engine.shard_job import ShardJob, require_enough_samples
from ray_jobs.engine.shard_worker import BatchStream, ShardReport, ShardWorker, WorkerResources, make_reader_config
from ray_jobs.models.loading import TracedModel
from ray_jobs.runs.lease import Heartbeat
from ray_jobs.runs.ledger import Ledger, PartialMoments
from ray_jobs.runs.moments_store import MomentsStore, group_keys, new_file

Observe = Callable[[Network], OperatorObserver[Any]]
MAX_FILES = 32  # of partial moments in a store; if there are more, some are merged while the job goes on
MERGED_AT_ONCE = 16
POLL_INTERVAL = 0.05  # seconds between two checks whether a merge has ended
FLUSH_SHARE = 100  # the ledger is written at most 1/100 of the time
NOT_FINITE = "the model's output is not finite"
LABELED = "labeled"  # the tensor of partial moments with the number of samples that each row of concepts labels


@dataclass(frozen=True)
class MomentsSpec:
    """The moments that a job takes.

    Attributes:
        shards: The shards.
        store: The folder of the partial moments.
        batch_size: The number of samples of a batch.
        max_samples: The number of samples at most, an equal share from each shard; None: all.
        round: 0, or the number of this attempt to use the samples that were rejected before.
        selection: The samples that are used.
        concepts: The labels of concepts whose sums are taken; None: no concepts.
    """

    shards: tuple[str, ...]
    store: MomentsStore
    batch_size: int
    max_samples: int | None = None
    round: int = 0
    selection: Selection = Selection()  # noqa: RUF009 - frozen
    concepts: ConceptLabels | None = None


class NotFiniteError(UserError):
    """Samples for which the model's output is not finite."""

    def __init__(self, shard: str, keys: Sequence[str], *_: str) -> None:
        self.keys = frozenset(keys)
        super().__init__(shard, f"{NOT_FINITE} for {', '.join(keys)}", "They will be left out.")


def require_finite(shard: str, keys: Sequence[str], finite: Tensor) -> None:
    """Raise NotFiniteError if an element of `finite`, a bool for each sample, is False."""
    if bad := [key for key, good in zip(keys, finite.tolist()) if not good]:
        raise NotFiniteError(shard, bad)


@dataclass(frozen=True)
class MomentsTask(ShardTask):
    """One shard of a job.

    Attributes:
        number: The shard's number in the job's list.
        round: See `MomentsSpec`.
    """

    number: int = field(kw_only=True)
    round: int = field(default=0, kw_only=True)


class MomentsWorker(ShardWorker[MomentsTask]):
    """A worker that holds the model and the moments since its last commit; only committed moments count."""

    def __init__(
        self,
        model: TracedModel,
        store: MomentsStore,
        batch_size: int,
        observe: Observe,
        concepts: ConceptLabels | None = None,
        resources: WorkerResources = WorkerResources(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(model, resources)
        self.store, self.batch_size, self.observer, self.concepts = store, batch_size, observe, concepts

    def prepare(self) -> None:
        """Place the model on the device, and make the observation."""
        self.model = model = self.resources.place(self.model)
        self.reader_config = make_reader_config(model, self.batch_size, self.resources.decoders)
        self.observation = self.observer(model.network)
        self.forget()

    def forget(self) -> None:
        """Drop the moments since the last commit."""
        self.reset()
        self.shards: list[int] = []
        self.samples = 0
        self.rejected: list[RejectedSample] = []

    def reset(self) -> None:
        """Set the sums to 0."""
        self.observation.reset()
        self.labeled = torch.zeros(0 if self.concepts is None else len(self.concepts.values), dtype=torch.int32)

    def work(self, task: MomentsTask, following: MomentsTask | None = None) -> Iterator[ShardReport]:
        """Add the moments of a shard, and yield reports of the progress.

        An error drops everything since the last commit. A sample for which the model's output is not finite makes the
        sums useless. If they hold this shard only, the shard is read again without the sample. Otherwise the shard
        fails, and a worker whose sums are empty tries it again.
        """
        self.round = task.round
        skipped: frozenset[str] = frozenset()
        stream = self.open_stream(task, following)  # may raise BusyError, which keeps the moments
        try:
            while True:
                try:
                    samples = yield from self.observe(task.shard, stream)
                    break
                except NotFiniteError as error:
                    if self.shards:
                        raise
                    self.reset()
                    skipped |= error.keys
                    stream = self.start_stream(replace(self.reader(task), skip=task.skip | skipped))
        except BaseException:
            self.forget()
            raise
        not_finite = [RejectedSample(task.shard, key, "model", NOT_FINITE) for key in sorted(skipped)]
        self.shards.append(task.number)
        self.samples += samples
        self.rejected += [*stream.reader.rejected, *not_finite]
        yield stream.report(samples, len(not_finite))

    def observe(self, shard: str, stream: BatchStream) -> Generator[ShardReport, None, int]:
        """Add the batches of a shard, and return the number of their samples.

        The outputs of a batch are checked after the next batch has been started, so that a GPU does not wait.

        Raises:
            NotFiniteError: If the model's output is not finite for a sample.
        """
        samples, before = 0, (list[str](), torch.ones(0, dtype=torch.bool))
        with closing(stream):
            for batch in stream:
                images = batch.images.to(self.model.device, non_blocking=True)
                labels = None if self.concepts is None else self.read_labels(self.concepts, shard, batch.keys)
                outputs = self.observation.update(images, [derive_seed(key) for key in batch.keys], labels)
                now = batch.keys, outputs.flatten(1).isfinite().all(1)
                require_finite(shard, *before)
                before = now
                samples += len(batch.keys)
                if stream.report_due():
                    yield stream.report(samples)
        require_finite(shard, *before)
        self.observation.flush()
        return samples

    def read_labels(self, concepts: ConceptLabels, shard: str, keys: Sequence[str]) -> Tensor:
        """Return the values of concepts for samples of a shard, and count the samples of each row."""
        rows = concepts.find_rows(shard, keys)
        known = rows[rows >= 0]
        self.labeled.index_add_(0, known, torch.ones(len(known), dtype=torch.int32))
        return concepts.of(rows)

    def commit(self) -> PartialMoments:
        """Write the moments to the store. They count once the driver has put them into the ledger."""
        partial = PartialMoments(new_file(), tuple(self.shards), self.samples, len(self.rejected), self.round)
        tensors = self.observation.tensors()
        if self.concepts is not None and not self.concepts.by_shard:
            tensors[LABELED] = self.labeled
        self.store.write(partial, tensors, self.model.digest, self.rejected)
        self.forget()
        return partial


class MomentsJob(ShardJob):
    """The driver's side: it writes the ledger, and merges partial moments if there are many."""

    def __init__(self, name: str, heartbeat: Heartbeat, spec: MomentsSpec, tasks: Tasks, resources: Resources) -> None:
        self.spec, self.tasks, self.store = spec, tasks, spec.store
        self.ledger = self.store.read_ledger()
        self.unwritten: list[PartialMoments] = []  # committed, but not in the ledger yet
        self.flushed = self.flush_cost = 0.0  # when the ledger was last written, and the seconds it took
        self.numbers = {shard: number for number, shard in enumerate(spec.shards)}
        wanted: Sequence[int] = range(len(spec.shards))
        self.retried: dict[str, frozenset[str]] = {}  # the keys of rejected samples to try again, by shard
        if spec.round:
            self.retried = group_keys(self.store.read_rejected(self.ledger, spec.shards, before=spec.round))
            wanted = [self.numbers[shard] for shard in self.retried]
        left = [spec.shards[number] for number in self.ledger.remaining(wanted, spec.round)]
        self.store.remove_uncounted(self.ledger)
        self.labeled: Tensor | None = None  # number of samples that each row of concepts labels
        self.merging: PendingCall | None = None
        self.merged: list[str] = []  # the files that are being merged
        self.seconds = 0.0  # from the first worker's start to the last commit
        super().__init__(name, heartbeat, [spec.shards[n] for n in wanted], left, resources, resources.max_loss)

    def gather(self, observe: Observe, model: TracedModel) -> Ledger:
        """Work until every shard counts or is missing.

        Args:
            observe: Makes the observation that sums the moments of a network.
            model: The model.

        Returns:
            The ledger.

        Raises:
            UserError: If too few samples could be used, or the moments of an earlier version cannot be continued.
        """
        spec = self.spec
        for partial in self.ledger.entries[:1] if self.remaining else ():
            with TensorFile(self.store.folder / partial.file) as file:
                require_moments_of(file, model.network.operators)
        self.count_labeled(self.ledger.entries)
        try:
            self.run(MomentsWorker, model, spec.store, spec.batch_size, observe, spec.concepts)
            self.flush()
            self.tick()  # there may still be many files
            while not self.idle():
                self.tick()
                time.sleep(POLL_INTERVAL)
        finally:
            self.flush()
            self.store.remove_uncounted(self.ledger)
        self.judge_all()
        return self.ledger

    def judge_all(self) -> None:
        """Check the fraction of rejected samples of this command, or of the whole ledger if this command used none.

        So a command goes on if the data were fixed after an earlier command, and a command that has nothing left to
        do ends as the last command did. Samples that are tried again may well be rejected again.
        """
        spec, ledger, counts = self.spec, self.ledger, self.reporter.counts
        samples, rejected = counts.samples, counts.rejected
        if not samples or not ledger.samples:
            samples, rejected = ledger.samples, sum(partial.rejected for partial in ledger.entries)
        if not samples and not rejected:
            raise UserError(spec.shards[0], "no samples in any shard", "Check --shards.", "shards")
        allowed = self.resources.max_bad_fraction if spec.round == 0 else 1.0
        require_enough_samples(self.folder, samples, rejected, lambda: self.read_rejected()[0], allowed)

    def read_rejected(self) -> list[RejectedSample]:
        """Return the samples that are rejected until now."""
        return self.store.read_rejected(self.ledger, self.spec.shards)

    def make_task(self, item: str) -> MomentsTask:
        """Return the task of a shard."""
        spec, number = self.spec, self.numbers[item]
        limit = equal_share(spec.max_samples, number, len(spec.shards))
        only = self.retried.get(item, spec.selection.only_of(item))
        return MomentsTask(item, limit, only, spec.selection.skip_of(item), number=number, round=spec.round)

    def on_committed(self, items: list[str], result: PartialMoments) -> None:
        """Note committed moments for the ledger."""
        if sorted(result.shards) != sorted(self.numbers[item] for item in items):
            raise RuntimeError(f"{result.file} holds {result.shards}, not {items}")
        self.unwritten.append(result)
        self.count_labeled([result])
        self.seconds = time.monotonic() - self.first_ready
        super().on_committed(items, result)

    def count_labeled(self, partials: Sequence[PartialMoments]) -> None:
        """Count the samples that each row of concepts labels. Raise UserError if a row labels several."""
        concepts = self.spec.concepts
        if concepts is None or concepts.by_shard or (found := self.store.add_up(partials, LABELED)) is None:
            return
        self.labeled = found if self.labeled is None else self.labeled + found
        require_one_sample(self.labeled, self.folder)

    def tick(self) -> None:
        """Write the ledger unless that took long and was done just now, and merge."""
        if time.monotonic() - self.flushed > FLUSH_SHARE * self.flush_cost:
            self.flush()
        self.merge()
        super().tick()

    def too_many_rejected(self) -> bool:
        """Return whether too many samples were rejected; samples that are tried again may be rejected again."""
        return self.spec.round == 0 and super().too_many_rejected()

    def describe_rejection(self) -> str:
        """Return the first rejected sample for an error message."""
        self.flush()
        rows = self.read_rejected()
        return f"; {rows[0].shard}, {rows[0].key}: {rows[0].reason}" if rows else ""

    @property
    def samples(self) -> int:
        """The number of samples that count, or will once the ledger is written."""
        return self.ledger.samples + sum(partial.samples for partial in self.unwritten)

    def flush(self) -> None:
        """Put the committed moments into the ledger: several at once if they arrive fast."""
        if self.unwritten:
            self.write_ledger(self.ledger.commit(*self.unwritten))
            self.unwritten = []

    def write_ledger(self, ledger: Ledger) -> None:
        """Replace the ledger, unless another driver has taken over the run."""
        begun = time.monotonic()
        self.heartbeat.require_lease()
        self.store.write_ledger(ledger)
        self.ledger, self.flushed = ledger, time.monotonic()
        self.flush_cost = self.flushed - begun

    def merge(self) -> None:
        """Merge the smallest partial moments if there are many, while the workers go on."""
        if self.merging is not None and self.merging.done():
            merged, self.merging = self.merging.result(), None
            self.write_ledger(self.ledger.merge(self.merged, merged))  # before the old files are deleted
            for file in self.merged:
                self.store.remove(file)
        if self.idle():
            partials = [partial for partial in self.ledger.entries if partial.round == self.spec.round]
            if len(partials) > MAX_FILES:
                chosen = sorted(partials, key=lambda partial: partial.samples)[:MERGED_AT_ONCE]
                self.merged = [partial.file for partial in chosen]
                self.merging = self.tasks.submit(merge_files, self.store, chosen)

    def idle(self) -> bool:
        """Return whether no task reads the store, so that files may be deleted."""
        return self.merging is None


def merge_files(store: MomentsStore, partials: Sequence[PartialMoments]) -> PartialMoments:
    """Merge partial moments in a task; see `MomentsStore.merge`."""
    torch.set_num_threads(1)
    return store.merge(partials)


def require_disjoint(sets: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Raise UserError if two of some named sets of shards have a shard in common."""
    seen: dict[str, str] = {}
    for name, shards in sets:
        for shard in shards:
            if shard in seen:
                what = f"is in {seen[shard]} and in {name}; each needs shards of its own"
                raise UserError(shard, what, "Name other shards.")
            seen[shard] = name
