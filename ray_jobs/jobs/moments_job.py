"""Shards → moments → parts, each shard counted exactly once: the half that `fit` and `quality` share."""

import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from torch import Tensor

from patterns import Network, UserError
from patterns.estimation import Observation
from patterns.io import TensorFile, merge_moments, save_moments, write_json
from ray_jobs.config import ModelConfig, Resources, equal_share
from ray_jobs.data.samples import Rejected, seed_of
from ray_jobs.data.shard_reader import ShardReader
from ray_jobs.engine.ray_tasks import Pending, Tasks
from ray_jobs.engine.shard_job import ShardJob, judge_samples
from ray_jobs.engine.shard_worker import BatchStream, ShardReport, ShardWorker, WorkerResources
from ray_jobs.io.file_systems import translated
from ray_jobs.io.object_store import Location, located, names, published, remove
from ray_jobs.models.loading import ModelDigests
from ray_jobs.runs.lease import Heartbeat
from ray_jobs.runs.ledger import Ledger, PartialMoments, together
from ray_jobs.runs.run_folder import refused_in, write_refused
from ray_jobs.units import printable

Observe = Callable[[Network], Observation[Any]]
MOST_PARTS = 32  # that lie in a folder; more are merged while the job goes on
MERGED_AT_ONCE = 16
WAIT = 0.05  # seconds between two questions whether a merge is over
FLUSH_SHARE = 100  # the ledger is left alone so many times as long as writing it took


@dataclass(frozen=True)
class MomentsSpec:
    """What to take moments of, and the folder for the parts and their ledger.

    most: samples at most, an equal share of each shard.
    round: 0, or which time the samples refused until then are tried again.
    """

    model: ModelConfig
    shards: tuple[str, ...]
    folder: str
    batch_size: int
    most: int | None = None
    round: int = 0


class NotFiniteError(UserError):
    """Samples for which the model gives no finite output."""

    def __init__(self, shard: str, keys: Sequence[str], *_: str) -> None:
        self.keys = frozenset(keys)
        super().__init__(shard, f"the model's output is not finite for {', '.join(keys)}", "They will be left out.")


def check_finite(shard: str, keys: Sequence[str], finite: Tensor) -> None:
    """NotFiniteError where the output of one of some samples is not finite; `finite` says which are."""
    if bad := [key for key, good in zip(keys, finite.tolist()) if not good]:
        raise NotFiniteError(shard, bad)


class MomentsTask(NamedTuple):
    """The work on one shard.

    number: the shard's.  only: the keys to use; None: all.  round: see MomentsSpec.  most: samples at most.
    """

    number: int
    shard: str
    most: int | None = None
    only: frozenset[str] | None = None
    round: int = 0


class MomentsWorker(ShardWorker[MomentsTask]):
    """Holds the model and the moments not yet committed. Losing it loses nothing that counts."""

    def __init__(
        self,
        model: ModelConfig,
        folder: str,
        batch_size: int,
        observe: Observe,
        weights: ModelDigests,
        share: WorkerResources = WorkerResources(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(share)
        self.folder, self.batch_size = located(folder), batch_size
        self.model, self.weights, self.observer = model, weights, observe

    def ready(self) -> None:
        """Load the model."""
        self.loaded = self.share.load(self.model, self.weights)
        self.observation = self.observer(self.loaded.network)
        self.forget()

    def forget(self) -> None:
        """Drop the moments not yet committed."""
        self.observation.reset()
        self.shards: list[int] = []
        self.samples = 0
        self.refused: list[Rejected] = []

    def reader(self, task: MomentsTask) -> ShardReader:
        loaded = self.loaded
        return ShardReader(
            task.shard,
            loaded.preprocessing,
            self.batch_size,
            loaded.dtype,
            task.most,
            only=task.only,
            threads=self.share.decoders,
        )

    def work(self, task: MomentsTask, following: MomentsTask | None = None) -> Iterator[ShardReport]:
        """Add the moments of a shard, or of some of its samples only, telling now and then how far it is.

        On any error, everything not committed is dropped. Samples for which the model's output is not finite
        spoil the sums: the shard is then begun anew without them, or, where other shards' sums would be lost
        too, fails, and is tried again by a worker that has none.
        """
        self.round = task.round
        spoilt: frozenset[str] = frozenset()
        try:
            stream = self.stream(task, following)
            while True:
                try:
                    samples = yield from self.observe(task.shard, stream)
                    break
                except NotFiniteError as error:
                    if self.shards:
                        raise
                    self.observation.reset()
                    spoilt |= error.keys
                    stream = BatchStream(replace(self.reader(task), skip=spoilt), self.loaded.device)
        except BaseException:
            self.forget()
            raise
        reason = "the model's output is not finite"
        unfit = [Rejected(task.shard, key, "model", reason) for key in sorted(spoilt)]
        self.shards.append(task.number)
        self.samples += samples
        self.refused += [*stream.reader.refused, *unfit]
        yield stream.report(samples, len(unfit))

    def observe(self, shard: str, stream: BatchStream) -> Generator[ShardReport, None, int]:
        """Add a shard's batches; gives how many samples they had. NotFiniteError where the model's output is not.

        Each batch's outputs are looked at after the next was begun, so that a GPU never waits for the question.
        """
        samples, before = 0, (list[str](), torch.ones(0, dtype=torch.bool))
        with closing(stream):
            for batch in stream:
                images = batch.images.to(self.loaded.device, non_blocking=True)
                outputs = self.observation.update(images, [seed_of(key) for key in batch.keys])
                now = batch.keys, outputs.flatten(1).isfinite().all(1)
                check_finite(shard, *before)
                before = now
                samples += len(batch.keys)
                if stream.due():
                    yield stream.report(samples)
        check_finite(shard, *before)
        self.observation.settle()
        return samples

    def commit(self) -> PartialMoments:
        """Write the moments as a part. It counts once the driver has put it into the ledger."""
        part = PartialMoments(new_part(), tuple(self.shards), self.samples, len(self.refused), self.round)
        save_part(self.folder, part, self.observation.tensors(), self.loaded.digest, self.refused)
        self.forget()
        return part


class MomentsJob(ShardJob):
    """The driver's side: the ledger and its file, and the merging of parts where they become many."""

    def __init__(self, name: str, beat: Heartbeat, task: MomentsSpec, tasks: Tasks, resources: Resources) -> None:
        self.gathering, self.tasks, self.parts = task, tasks, located(task.folder)
        self.ledger = read_ledger(self.parts)
        self.fresh: list[PartialMoments] = []  # parts that are to be put into the ledger
        self.flushed = self.flush_cost = 0.0  # when the ledger was last written, and how long that took
        self.numbers = {shard: number for number, shard in enumerate(task.shards)}
        wanted: Sequence[int] = range(len(task.shards))
        self.refused: dict[str, frozenset[str]] = {}
        if task.round:
            self.refused = refused_keys(read_refused(self.parts, self.ledger, task.shards, before=task.round))
            wanted = [self.numbers[shard] for shard in self.refused]
        left = [task.shards[number] for number in self.ledger.left(wanted, task.round)]
        self.clean()
        self.merging: Pending | None = None
        self.merged: list[str] = []  # the files that are being merged
        self.seconds = 0.0  # from the first worker's start to the last commit
        super().__init__(name, beat, [task.shards[n] for n in wanted], left, resources, resources.max_loss)

    def gather(self, observe: Observe, weights: ModelDigests) -> Ledger:
        """Work until every shard counts, or is missing. UserError where no sample of any shard could be used."""
        task = self.gathering
        try:
            self.run(MomentsWorker, task.model, task.folder, task.batch_size, observe, weights)
            self.flush()
            self.tick()  # parts may still be many
            while not self.idle():
                self.tick()
                time.sleep(WAIT)
        finally:
            self.flush()
            self.clean()
        self.judge_all()
        return self.ledger

    def judge_all(self) -> None:
        """Judge the samples that this command has read; those of the whole ledger if it has read none, or used none.

        So a command goes on if the data were fixed after an earlier one, and a command that has nothing left to do
        ends as the last one did. Samples that are tried again may well be rejected again.
        """
        shards, ledger, counts = self.gathering.shards, self.ledger, self.reporter.counts
        samples, refused = counts.samples, counts.refused
        if not samples or not ledger.samples:
            samples, refused = ledger.samples, sum(part.refused for part in ledger.parts)
        if not samples and not refused:
            raise UserError(shards[0], "no samples in any shard", "Check --shards.")
        allowed = self.resources.max_bad_fraction if self.gathering.round == 0 else 1.0
        judge_samples(self.folder, samples, refused, lambda: self.rejected()[0], allowed)

    def rejected(self) -> list[Rejected]:
        """The samples that were rejected until now."""
        return read_refused(self.parts, self.ledger, self.gathering.shards)

    def task(self, item: str) -> MomentsTask:
        task, number = self.gathering, self.numbers[item]
        most = equal_share(task.most, number, len(task.shards))
        return MomentsTask(number, item, most, self.refused.get(item), task.round)

    def counts(self, items: list[str], told: PartialMoments) -> None:
        if sorted(told.shards) != sorted(self.numbers[item] for item in items):
            raise RuntimeError(f"{told.file} holds {told.shards}, not {items}")
        self.fresh.append(told)
        self.seconds = time.monotonic() - self.first_ready
        super().counts(items, told)

    def tick(self) -> None:
        if time.monotonic() - self.flushed > FLUSH_SHARE * self.flush_cost:
            self.flush()
        self.merge()
        super().tick()

    def mostly_refused(self) -> bool:
        """As for any job; samples that were refused before may well be refused again."""
        return self.gathering.round == 0 and super().mostly_refused()

    def for_example(self) -> str:
        self.flush()
        rows = self.rejected()
        return f"; {rows[0].shard}, {rows[0].key}: {rows[0].reason}" if rows else ""

    @property
    def samples(self) -> int:
        """The samples that count, or will once the ledger is written."""
        return self.ledger.samples + sum(part.samples for part in self.fresh)

    def flush(self) -> None:
        """Put the parts that have come into the ledger: several at once where they come fast."""
        if self.fresh:
            self.write(self.ledger.commit(*self.fresh))
            self.fresh = []

    def write(self, ledger: Ledger) -> None:
        """Make a ledger the one that counts."""
        begun = time.monotonic()
        self.beat.check()
        with published(self.parts) as folder:
            write_json(folder / LEDGER, ledger.to_json())
        self.ledger, self.flushed = ledger, time.monotonic()
        self.flush_cost = self.flushed - begun

    def merge(self) -> None:
        """Merge the smallest parts where there are many, while the workers go on."""
        if self.merging is not None and self.merging.done():
            merged, self.merging = self.merging.result(), None
            self.write(self.ledger.merge(self.merged, merged))  # before the old ones go
            for file in self.merged:
                remove_part(self.parts, file)
        if self.idle():
            alike = [part for part in self.ledger.parts if part.round == self.gathering.round]
            if len(alike) > MOST_PARTS:
                chosen = sorted(alike, key=lambda part: part.samples)[:MERGED_AT_ONCE]
                self.merged = [part.file for part in chosen]
                self.merging = self.tasks.start(merge_parts, str(self.parts), chosen)

    def idle(self) -> bool:
        """Whether no part is being read by what goes on beside the workers, and may be deleted."""
        return self.merging is None

    def clean(self) -> None:
        """Delete the parts that do not count: of workers that were lost while, or after, they wrote them."""
        named = {name for part in self.ledger.parts for name in (part.file, beside(part.file))}
        for name in names(self.parts, PART):
            if name not in named:
                remove(self.parts / name)


LEDGER, PART = "ledger.json", "part-"


def new_part() -> str:
    """A name for a part's file."""
    return f"{PART}{uuid4().hex}.safetensors"


def beside(file: str) -> str:
    """The name of the table of the samples that a part refused."""
    return file.replace(".safetensors", ".refused.parquet")


def save_part(
    folder: Location, part: PartialMoments, tensors: dict[str, Tensor], weights: str, refused: Sequence[Rejected]
) -> None:
    """Write a part and, where it refused samples, the table of them."""
    with published(folder) as out:
        if refused:
            write_refused(out / beside(part.file), refused)
        save_moments(out / part.file, tensors, {"weights": weights})


def remove_part(folder: Location, file: str) -> None:
    remove(folder / file)
    remove(folder / beside(file))


def merge_parts(where: str, parts: Sequence[PartialMoments]) -> PartialMoments:
    """Write one part in the place of several, without having more than two of their tensors in memory."""
    torch.set_num_threads(1)
    folder, merged = located(where), together(new_part(), parts)
    with published(folder) as out, ExitStack() as stack:
        if merged.refused:
            tables = (refused_in(folder / beside(part.file)) for part in parts if part.refused)
            write_refused(out / beside(merged.file), chain.from_iterable(tables))
        files = [stack.enter_context(TensorFile(folder / part.file)) for part in parts]
        merge_moments(out / merged.file, files, files[0].metadata)
    return merged


def read_ledger(folder: Location) -> Ledger:
    """The ledger of a folder of parts; empty where there is none yet."""
    path = folder / LEDGER
    try:
        with translated(str(path), remedy="Delete the run's moments/ and fit again."):
            return Ledger.from_json(json.loads(path.read_text()))
    except FileNotFoundError:
        return Ledger()


def read_refused(folder: Location, ledger: Ledger, shards: Sequence[str], before: int | None = None) -> list[Rejected]:
    """The samples refused to this day, or before a round: the last word on each shard counts."""
    parts = sorted((p for p in ledger.parts if before is None or p.round < before), key=lambda part: part.round)
    last = {shards[number]: part.round for part in parts for number in part.shards}
    named = {printable(shard): shard for shard in last}
    rows = ((part, row) for part in parts if part.refused for row in refused_in(folder / beside(part.file)))
    found = ((part, replace(row, shard=named[row.shard])) for part, row in rows)
    return [row for part, row in found if part.round == last[row.shard]]


def refused_keys(refused: Iterable[Rejected]) -> dict[str, frozenset[str]]:
    """The keys of refused samples by shard."""
    keys: dict[str, set[str]] = {}
    for row in refused:
        keys.setdefault(row.shard, set()).add(row.key)
    return {shard: frozenset(found) for shard, found in keys.items()}


def apart(sets: Iterable[tuple[str, Sequence[str]]]) -> None:
    """UserError where two named sets of shards share one."""
    seen: dict[str, str] = {}
    for name, shards in sets:
        for shard in shards:
            if shard in seen:
                what = f"is in {seen[shard]} and in {name}; each needs shards of its own"
                raise UserError(shard, what, "Name other shards.")
            seen[shard] = name
