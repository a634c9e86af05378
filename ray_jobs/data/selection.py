"""Lists of samples by shard and key: `patternnet select` writes them for `--keys` and `--without-keys` of jobs."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from patterns import UserError
from patterns.io import write_atomically
from ray_jobs.io.object_store import read_option_file
from ray_jobs.units import make_printable

Keys = dict[str, frozenset[str]]  # keys by the printable name of their shard


@dataclass(frozen=True)
class Selection:
    """The samples of a job that are used.

    Attributes:
        only: The samples that are used; None: all.
        skip: The samples that are not used.
        digest: A digest of both lists; empty if there are none.
    """

    only: Keys | None = None
    skip: Keys = field(default_factory=dict)
    digest: str = ""

    def only_of(self, shard: str) -> frozenset[str] | None:
        """Return the keys of a shard that are used; None: all."""
        return None if self.only is None else self.only.get(make_printable(shard), frozenset())

    def skip_of(self, shard: str) -> frozenset[str]:
        """Return the keys of a shard that are not used."""
        return self.skip.get(make_printable(shard), frozenset())


def load_selection(keys: str | None, without_keys: str | None, shards: Sequence[str]) -> Selection:
    """Return the selection of a job.

    Args:
        keys: The file of the samples that are used; None: all are.
        without_keys: The file of the samples that are not used; None: none.
        shards: The shards of the job.

    Raises:
        UserError: If a file cannot be read, has another format, or names no sample of these shards.
    """
    digest = hashlib.sha256()
    found: dict[str, Keys] = {}
    for option, file in (("keys", keys), ("without_keys", without_keys)):
        if file is not None:
            content = read_option_file(f"`{option}`", file)
            digest.update(option.encode() + content)
            found[option] = parse_keys(content, file, option)
            if not set(found[option]) & set(map(make_printable, shards)):
                example = next(iter(found[option]), "no shard")
                what = f"names no sample of these shards, but of {example}"
                raise UserError(file, what, "Pass the shards of the list, for example --shards @shards.txt.", option)
    return Selection(found.get("keys"), found.get("without_keys", {}), digest.hexdigest() if found else "")


def read_keys(file: str, option: str) -> Keys:
    """Return the keys of the list that an option names. Raise UserError if it cannot be read, or has another format."""
    return parse_keys(read_option_file(f"`{option}`", file), file, option)


def parse_keys(content: bytes, file: str, option: str) -> Keys:
    """Return the keys of a list of lines SHARD, tab, KEY.

    Raises:
        UserError: If a line has another form.
    """
    found: dict[str, set[str]] = {}
    for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), 1):
        if line.strip():
            shard, tab, key = line.partition("\t")
            if not tab or not key:
                what = f"line {number} is not a shard, a tab and a key"
                raise UserError(file, what, "Write the list by `patternnet select`.", option)
            found.setdefault(shard, set()).add(key)
    return {shard: frozenset(keys) for shard, keys in found.items()}


def write_keys(path: Path, samples: Iterable[tuple[str, str]]) -> None:
    """Write a list of samples: shard and key."""
    text = "".join(f"{shard}\t{key}\n" for shard, key in samples)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline=""))
