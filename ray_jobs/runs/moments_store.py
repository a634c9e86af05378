"""The folder of partial moments: their files, and the ledger that says which of them count."""

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path
from uuid import uuid4

from torch import Tensor

from patterns.io import TensorFile, merge_moments, save_moments, write_json
from ray_jobs.data.samples import RejectedSample
from ray_jobs.io.file_systems import translate_errors
from ray_jobs.io.object_store import Location, copy_file, list_names, locate, publish, remove
from ray_jobs.runs.ledger import Ledger, PartialMoments, combine_entries
from ray_jobs.runs.run_folder import read_rejected, write_rejected
from ray_jobs.units import make_printable

LEDGER, PREFIX = "ledger.json", "part-"


class MomentsStore:
    """A folder of partial moments and its ledger.

    A file counts only if the ledger names it. So a worker that dies while it writes a file, and a driver that dies
    before it writes the ledger, change nothing.

    Args:
        folder: The folder or its URL.
    """

    def __init__(self, folder: str | Path | Location) -> None:
        self.folder = locate(str(folder))

    def read_ledger(self) -> Ledger:
        """Return the ledger; it is empty if the folder has none yet."""
        path = self.folder / LEDGER
        try:
            with translate_errors(str(path), remedy="Delete the run's moments/ and fit again."):
                return Ledger.from_json(json.loads(path.read_text()))
        except FileNotFoundError:
            return Ledger()

    def write_ledger(self, ledger: Ledger) -> None:
        """Replace the ledger."""
        with publish(self.folder) as folder:
            write_json(folder / LEDGER, ledger.to_json())

    def list_files(self) -> list[str]:
        """Return the paths or URLs of the files that count."""
        return [str(self.folder / partial.file) for partial in self.read_ledger().entries]

    def write(
        self, partial: PartialMoments, tensors: dict[str, Tensor], weights: str, rejected: Sequence[RejectedSample]
    ) -> None:
        """Write partial moments and, if samples were rejected, the table of these.

        Args:
            partial: Their entry in the ledger, which is not written here.
            tensors: The sums by name.
            weights: The digest of the model's weights.
            rejected: The samples that were rejected.
        """
        with publish(self.folder) as folder:
            if rejected:
                write_rejected(folder / rejected_table_path(partial.file), rejected)
            save_moments(folder / partial.file, tensors, {"weights": weights})

    def merge(self, partials: Sequence[PartialMoments]) -> PartialMoments:
        """Write the sum of several partial moments to a new file; at most two of their tensors are in memory.

        Args:
            partials: The partial moments; their files are kept.

        Returns:
            The entry of the new file for the ledger.
        """
        merged = combine_entries(new_file(), partials)
        with publish(self.folder) as folder, ExitStack() as stack:
            if merged.rejected:
                tables = (self.read_table(partial) for partial in partials)
                write_rejected(folder / rejected_table_path(merged.file), chain.from_iterable(tables))
            files = [stack.enter_context(TensorFile(self.folder / partial.file)) for partial in partials]
            merge_moments(folder / merged.file, files, files[0].metadata)
        return merged

    def add_up(self, partials: Iterable[PartialMoments], name: str) -> Tensor | None:
        """Return the sum of a tensor over partial moments; None if one of them lacks it, or there are none."""
        total: Tensor | None = None
        for partial in partials:
            with TensorFile(self.folder / partial.file) as file:
                if name not in file.specs:
                    return None
                total = file.get(name) if total is None else total.add_(file.get(name))
        return total

    def remove(self, file: str) -> None:
        """Delete the file of partial moments and its table of rejected samples."""
        remove(self.folder / file)
        remove(self.folder / rejected_table_path(file))

    def remove_uncounted(self, ledger: Ledger) -> None:
        """Delete the files that a ledger does not name: workers that were lost wrote them."""
        counted = {name for partial in ledger.entries for name in (partial.file, rejected_table_path(partial.file))}
        for name in list_names(self.folder, PREFIX):
            if name not in counted:
                remove(self.folder / name)

    def copy_from(self, other: "MomentsStore", partial: PartialMoments) -> None:
        """Copy the files of partial moments from another store."""
        copy_file(other.folder / partial.file, self.folder)
        if partial.rejected:
            copy_file(other.folder / rejected_table_path(partial.file), self.folder)

    def read_table(self, partial: PartialMoments) -> list[RejectedSample]:
        """Return the samples that partial moments rejected."""
        return read_rejected(self.folder / rejected_table_path(partial.file)) if partial.rejected else []

    def read_rejected(self, ledger: Ledger, shards: Sequence[str], before: int | None = None) -> list[RejectedSample]:
        """Return the samples that are rejected; of each shard, its latest round decides.

        Args:
            ledger: The ledger.
            shards: The job's shards, by number.
            before: Only rounds before this one are read.
        """
        found = (partial for partial in ledger.entries if before is None or partial.round < before)
        partials = sorted(found, key=lambda partial: partial.round)
        latest = {shards[number]: partial.round for partial in partials for number in partial.shards}
        originals = {make_printable(shard): shard for shard in latest}
        rejected = []
        for partial in partials:
            rows = (replace(row, shard=originals[row.shard]) for row in self.read_table(partial))
            rejected += [row for row in rows if latest[row.shard] == partial.round]
        return rejected


def new_file() -> str:
    """Return a new name for a file of partial moments."""
    return f"{PREFIX}{uuid4().hex}.safetensors"


def rejected_table_path(file: str) -> str:
    """Return the name of the table of rejected samples that belongs to a file of partial moments."""
    return file.replace(".safetensors", ".refused.parquet")


def group_keys(rejected: Iterable[RejectedSample]) -> dict[str, frozenset[str]]:
    """Return the keys of rejected samples by shard."""
    keys: dict[str, set[str]] = {}
    for row in rejected:
        keys.setdefault(row.shard, set()).add(row.key)
    return {shard: frozenset(found) for shard, found in keys.items()}
