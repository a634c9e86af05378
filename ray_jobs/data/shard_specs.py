"""Shard specifications: resolve specs to shards, each a string from which any worker can read.

| spec | shards |
| --- | --- |
| `train-{000..015}.tar`, `*.tar.gz`, any URL of fsspec | one shard per WebDataset tar |
| `*.parquet` | one shard per file |
| `hf://datasets/ORG/NAME@REVISION/PATH` | the files of a dataset, at one commit (see `hf_datasets`) |
| `FOLDER` on this machine, `URL/` | `FOLDER/images-…` with at most 1000 images each (see `image_folders`) |
| `FOLDER/images-…`, `FILE.parquet#image=COLUMN` | this shard, as a list of shards of an earlier job names it |
| `@shards.txt`, `@URL` | the shards of the specs in this list, one spec per line |
| `pipe:COMMAND` | the output of the command, if pipes are allowed |

fsspec and its file systems take credentials and endpoints of object stores from the environment of the driver and of
the workers: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_PROFILE; AWS_ENDPOINT_URL or FSSPEC_S3_ENDPOINT_URL for
servers other than Amazon's; FSSPEC_S3_ANON=true for public buckets; GOOGLE_APPLICATION_CREDENTIALS;
AZURE_STORAGE_CONNECTION_STRING; HF_TOKEN. Each file system is a separate package: s3fs, gcsfs, adlfs, huggingface_hub.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit
from zlib import crc32

from braceexpand import braceexpand

from patterns import UserError
from ray_jobs.data import hf_datasets
from ray_jobs.data.byte_streams import open_stream
from ray_jobs.data.image_folders import SHARD as FOLDER_SHARD
from ray_jobs.data.image_folders import scan_folder
from ray_jobs.data.parquet_reader import is_parquet
from ray_jobs.data.references import name_column, split_shard
from ray_jobs.io.file_systems import is_url, open_file_system, translate_errors
from ray_jobs.io.object_store import Location, locate, normalize_location
from ray_jobs.io.web import PATIENCE, call_patiently

PIPE = "pipe:"
EXTENSIONS = r"(\.tar|\.tgz|\.parquet|\.pq)?(\.(gz|bz2|xz|zst))?$"
MAX_NAME = 200
WILDCARDS = "*?["


def list_shards(
    specs: Iterable[str], allow_pipes: bool = False, image_column: str | None = None, image_base: str | None = None
) -> tuple[str, ...]:
    """Return the shards of some specs, in order.

    Local paths become absolute, because workers run in other folders. A URL without wildcards is not checked; if it
    does not exist, reading it fails.

    Args:
        specs: The specs (see the table above).
        allow_pipes: Whether a spec may be `pipe:COMMAND`, which runs a shell command.
        image_column: The column of Parquet files that holds the images, or their URLs or paths.
        image_base: The folder or URL of relative paths in this column; None: that of each Parquet file.

    Raises:
        UserError: If there are no shards, a shard is missing, empty or listed twice, or a pipe is not allowed; if a
            column of images is named and a shard is no Parquet file.
    """
    shards: list[str] = []
    for spec in specs:
        for line in read_list(spec):
            if line.startswith(PIPE) and not allow_pipes:
                raise UserError(line, "a pipe runs a shell command", "Pass --allow-pipes to allow it.")
            shards += expand_spec(line)
    if not shards:
        raise UserError("--shards", "there are no shards", "Pass at least one tar file.")
    if len(set(shards)) < len(shards):
        repeated = next(s for s in shards if shards.count(s) > 1)
        raise UserError(f"--shards {repeated}", "this shard is listed twice", "List each shard once.")
    if image_column is None:
        if image_base is not None:
            what = "a base of images, but no column names them"
            raise UserError("", what, "Name the column by `image_column`.", "image_base")
        return tuple(shards)
    other = next((shard for shard in shards if not is_parquet(shard)), None)
    if other is not None:
        raise UserError(other, "not a Parquet file, so it has no columns", "Leave out `image_column`.", "image_column")
    base = None if image_base is None else str(locate(image_base))
    return tuple(choose_column(shard, image_column, base) for shard in shards)


def choose_column(shard: str, image_column: str, base: str | None) -> str:
    """Return the shard of a Parquet file whose images a column holds or names.

    Raises:
        UserError: If the shard's name already has another column, or another base.
    """
    file, column = split_shard(shard)
    if column is None:
        return name_column(file, image_column, base)
    if shard != name_column(file, image_column, base or column.base):
        what = f"the shard has the column {column.name!r}, and the base {column.base or 'of its folder'}"
        raise UserError(shard, what, "Leave out `image_column` and `image_base`.", "image_column")
    return shard


def read_list(spec: str) -> Iterator[str]:
    """Yield the specs in a list file, relative to its folder; any other spec is yielded as it is."""
    if not spec.startswith("@") or os.path.lexists(spec.partition("/")[0]):  # a file whose name begins with @
        yield spec
        return
    path = normalize_location(spec[1:])
    path = path if is_url(path) else str(Path(path).absolute())

    def read_lines() -> list[str]:
        with open_stream(path) as file:
            return file.read().decode("utf-8-sig").splitlines()

    with translate_errors(path, remedy="Check --shards; @FILE is a list of shards."):
        lines = call_patiently(read_lines, PATIENCE)
    for line in lines:
        entry = line.partition(" #")[0].strip()
        if entry and not entry.startswith("#"):
            whole = is_url(entry) or entry.startswith(("/", "~", "file:", PIPE))
            yield entry if whole else f"{path.rpartition('/')[0]}/{entry}"


def expand_spec(spec: str) -> Iterator[str]:
    """Yield the shards of a path, URL, command or folder with braces and wildcards."""
    if spec.startswith(PIPE):
        yield from expand_braces(spec)
        return
    spec = normalize_location(spec)
    file, column = split_shard(spec)
    if column is not None:
        yield from (name_column(each, column.name, column.base) for each in expand_spec(file))
        return
    if hf_datasets.is_dataset(spec):
        yield from hf_datasets.match_files(expand_braces(spec))
        return
    for path in match_urls(spec) if is_url(spec) else match_paths(spec):
        yield from list_folder_shards(path) if path.endswith("/") else [path]


def expand_braces(spec: str, whole: str = "") -> list[str]:
    """Return the words to which bash expands `{a,b}` and `{000..015}`."""
    if "{" not in spec:
        return [spec]
    try:
        return list(braceexpand(spec))
    except ValueError as error:
        raise UserError(f"--shards {whole or spec}", "a brace is not closed", "Write ranges as {000..015}.") from error


def match_urls(spec: str) -> Iterator[str]:
    """Yield the URLs that a URL with braces and wildcards matches; URLs of folders end with a slash."""
    for number, url in enumerate(expand_braces(spec)):
        # A query may hold anything, and an IPv6 address has brackets.
        http = url.startswith(("http:", "https:"))
        wild = "*" in urlsplit(url).path if http else any(c in url for c in WILDCARDS)
        if number == 0:  # report a missing package now
            open_file_system(url)
        if not wild or (not http and Location(url).exists()):
            yield url
            continue
        with translate_errors(url, remedy="Check --shards. If the server cannot list folders, pass each shard."):
            filesystem, path = open_file_system(url)
            entries = call_patiently(partial(filesystem.glob, path, detail=True), PATIENCE).items()
            found = sorted(filesystem.unstrip_protocol(p) + "/" * (e["type"] == "directory") for p, e in entries)
        if not found:
            raise no_match_error(url)
        yield from found


def match_paths(spec: str) -> Iterator[str]:
    """Yield the absolute paths that a path with braces and wildcards matches; paths of folders end with a slash.

    Existing files and folders are taken literally, so that braces and wildcards in their names are not expanded. So are
    shards of folders of images.
    """
    shard = FOLDER_SHARD.fullmatch(spec)
    if shard is not None and Path(shard["folder"]).is_dir():
        yield str(Path(spec).absolute())
        return
    with translate_errors(spec, remedy="Check --shards."):
        head, tail = split_existing(Path(spec).absolute())
        for pattern in expand_braces(tail, spec) if tail else [""]:
            found = [head / pattern]
            if any(c in pattern for c in WILDCARDS):
                found = sorted(head.glob(pattern.rstrip("/")))
                if not found:
                    raise no_match_error(f"{head}/{pattern}")
            for each in found:
                if not each.exists():
                    raise UserError(
                        str(each), "the shard does not exist", "Check --shards; write ranges as {000..015}."
                    )
                if each.is_file() and each.stat().st_size == 0:
                    raise UserError(str(each), "the file is empty (0 bytes)", "Delete or replace it.")
                yield f"{each}/" if each.is_dir() else str(each)


def split_existing(path: Path) -> tuple[Path, str]:
    """Split an absolute path after its last existing component."""
    parts = path.parts
    head = Path(parts[0])
    for number, part in enumerate(parts[1:], 1):
        if not os.path.lexists(head / part):
            return head, "/".join(parts[number:])
        head /= part
    return head, ""


def no_match_error(pattern: str) -> UserError:
    """Return the error for a pattern without matches."""
    return UserError(f"--shards {pattern}", "nothing matches", "Check the path.")


def list_folder_shards(path: str) -> list[str]:
    """Return the shards of a folder of images."""
    with translate_errors(path, remedy="Check --shards. For shards in a folder, pass FOLDER/*.tar."):
        shards = scan_folder(path).shards()
    if not shards:
        raise UserError(path, "the folder has no images", "For shards in a folder, pass FOLDER/*.tar.")
    return shards


def name_outputs(shards: Sequence[str]) -> dict[str, str]:
    """Return for each shard a safe and unique relative path without extension, by which its outputs are named.

    It is the shard's path without the folders that all shards share, and without a URL's query, which may be secret.

    Args:
        shards: The shards of a job.

    Returns:
        The paths by shard. A digest of the shard is appended to paths that are too long or not unique.

    Example:
        >>> name_outputs(["/data/a/0.tar", "/data/b/0.tar"])
        {'/data/a/0.tar': 'a/0', '/data/b/0.tar': 'b/0'}
    """
    paths = [make_shard_path(split_shard(shard)[0]) for shard in shards]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])  # noqa: PTH120 - may be parts of URLs
    names = [re.sub(EXTENSIONS, "", path.removeprefix(common).lstrip("/")) for path in paths]
    taken = Counter(names)
    return {
        shard: name
        if taken[name] == 1 and len(name) < MAX_NAME
        else f"{name[:MAX_NAME]}-{crc32(os.fsencode(shard)):08x}"
        for shard, name in zip(shards, names)
    }


def make_shard_path(shard: str) -> str:
    """Return a shard's path, after the host or bucket of a URL; a pipe's command becomes one component."""
    if shard.startswith(PIPE):
        path = shard.removeprefix(PIPE).replace("/", "_")
    elif is_url(shard):
        split = urlsplit(shard)
        path = f"{split.hostname or ''}{split.path}"
    else:
        path = shard
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    return re.sub(r"[^\w./=+-]+", "_", "/".join(parts))
