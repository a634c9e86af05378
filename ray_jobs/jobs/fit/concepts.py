"""Concepts of a fit: the record of their labels, and the table of their directions."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import pyarrow as pa

from patterns import Network, UserError
from patterns.estimation import solve_concepts
from patterns.io import TensorFile, load_moments, write_table
from patterns.moments import CONCEPTS, ConceptSums, has_concepts
from ray_jobs.data.concepts import ConceptLabels
from ray_jobs.io.object_store import publish
from ray_jobs.runs.concept_table import CONCEPT_TABLE, CONCEPTS_SCHEMA
from ray_jobs.runs.moments_store import MomentsStore
from ray_jobs.runs.run_folder import Run


class Pass(Protocol):
    """A pass over the data; see `ray_jobs.jobs.fit.fit.Pass`."""

    @property
    def operators(self) -> tuple[str, ...]:
        """The names of the operators whose moments are taken."""
        ...

    @property
    def store(self) -> MomentsStore:
        """The folder of their partial moments."""
        ...


def describe_labels(labels: ConceptLabels, before: Mapping[str, Any] | None, out: str) -> dict[str, Any]:
    """Return the entry `concepts` of a fit's section of the manifest.

    Args:
        labels: The labels.
        before: The entry that an earlier driver has written; None: none.
        out: The folder of the fit.

    Raises:
        UserError: If the fit was begun with other labels.
    """
    if before is not None and before["digest"] != labels.digest:
        what = "this fit was begun with other labels of concepts: their file has changed"
        raise UserError(out, what, "Restore the file, or choose another --out.", "concepts")
    return {"names": list(labels.names), "digest": labels.digest}


def merge_labels(entries: Sequence[Mapping[str, Any] | None], folders: Sequence[str]) -> dict[str, Any] | None:
    """Return the entry `concepts` of a merged fit; None if the fits have no concepts.

    Args:
        entries: The entry of each fit; None for a fit without concepts.
        folders: The folders of the fits, for errors.

    Raises:
        UserError: If the fits have different concepts.
    """
    names = [None if entry is None else entry["names"] for entry in entries]
    for folder, own in zip(folders, names):
        if own != names[0]:
            found, other = (", ".join(each or ["no concept"]) for each in (own, names[0]))
            what = f"this fit has the concepts {found}, and {folders[0]} has {other}"
            raise UserError(folder, what, "Merge fits with the same columns of concepts.")
    if names[0] is None:
        return None
    digests = "".join(entry["digest"] for entry in entries if entry is not None)
    return {"names": names[0], "digest": hashlib.sha256(digests.encode()).hexdigest()}


def write_concepts(run: Run, passes: Sequence[Pass], network: Network, names: Sequence[str]) -> dict[str, Any]:
    """Write the directions of concepts from the partial moments that count.

    Args:
        run: The run.
        passes: The passes of the fit.
        network: The network.
        names: The names of the concepts.

    Returns:
        The entries `labeled` and `unlabeled`, numbers of samples, and `constant`, the concepts without a direction.

    Raises:
        UserError: If no sample has a label.
    """
    samples = min(each.store.read_ledger().samples for each in passes)
    rows = list(list_rows(passes, network, names))
    labeled = max((row["n"] for row in rows), default=0)
    if not labeled:
        what = f"none of the {samples} samples has labels of concepts" if rows else "no operator can have concepts"
        remedy = "The column `key` must hold the keys of the samples, as the column `key` of explanations.parquet."
        raise UserError(str(run.folder), what, remedy, "concepts")
    with publish(run.folder) as folder:
        write_table(folder / CONCEPT_TABLE, CONCEPTS_SCHEMA, [pa.Table.from_pylist(rows, CONCEPTS_SCHEMA)])
    constant = list(dict.fromkeys(row["concept"] for row in rows if row["variance"] == 0))
    return {"labeled": labeled, "unlabeled": samples - labeled, "constant": constant}


def list_rows(passes: Sequence[Pass], network: Network, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table: operators in the order of the network, and for each the concepts."""
    for each in passes:
        with ExitStack() as stack:
            files = [
                stack.enter_context(TensorFile(each.store.folder / e.file)) for e in each.store.read_ledger().entries
            ]
            for name in each.operators:
                if not has_concepts(network.operators[name]):
                    continue
                found = solve_concepts(load_moments(files, f"{name}/{CONCEPTS}", ConceptSums))
                for number, concept in enumerate(names):
                    yield {
                        "operator": name,
                        "concept": concept,
                        "n": found.n,
                        "mean": float(found.mean[number]),
                        "variance": float(found.variance[number]),
                        "relative_error": float(found.relative_errors[number]),
                        "direction": found.directions[number].tolist(),
                        "standard_error": found.errors[number].tolist(),
                    }


def describe_concepts(section: Mapping[str, Any]) -> list[str]:
    """Return lines on the concepts of a fit: images without labels, and concepts without a direction.

    Args:
        section: The fit's section of the manifest.
    """
    concepts = section.get("concepts")
    if not concepts:
        return []
    lines = [f"directions of {len(concepts['names'])} concepts from {concepts['labeled']} samples"]
    if concepts["unlabeled"]:
        lines[0] += f"; {concepts['unlabeled']} samples have no labels"
    if concepts["constant"]:
        lines.append(f"constant in these samples, so without a direction: {', '.join(concepts['constant'])}")
    return lines
