"""Datasets of the Hugging Face Hub as shards: the driver lists their files once, at one commit.

`hf://datasets/ORG/NAME@REVISION/PATH`, with braces and wildcards in PATH, becomes the plain URLs of files at the commit
of the revision. Workers read these like any other URL, so they need no package of the Hub.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from fsspec.utils import glob_translate

from patterns import UserError
from ray_jobs.io.extras import import_extra
from ray_jobs.io.file_systems import to_user_error
from ray_jobs.io.web import PATIENCE, call_patiently, find_endpoint, find_token

PREFIX = "hf://datasets/"
SPEC = re.compile(
    rf"{PREFIX}(?P<name>[^/@]+/[^/@]+)(@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?(/(?P<path>.*))?", re.DOTALL
)
WILDCARDS = "*?["
T = TypeVar("T")


def is_dataset(spec: str) -> bool:
    """Return whether a spec names files of a dataset."""
    return spec.startswith(PREFIX)


def match_files(specs: Iterable[str]) -> Iterator[str]:
    """Yield the URLs of the files that some specs without braces match, at the commits of their revisions.

    Args:
        specs: The specs. Paths without wildcards are not checked.

    Raises:
        UserError: If a dataset cannot be listed, or nothing matches.
    """
    commits: dict[tuple[str, str | None], str] = {}
    api: Any = None
    for spec in specs:
        match = SPEC.fullmatch(spec)
        if match is None or not match["path"]:
            example = f"{PREFIX}ORG/NAME@REVISION/**/*.parquet"
            raise UserError(f"--shards {spec}", "names no files of a dataset", f"Write {example}.")
        name, path = match["name"], match["path"]
        if path.endswith("/"):
            what, remedy = "a folder of a dataset, not its files", f"Write {spec}**/*.parquet or {spec}**/*.tar."
            raise UserError(f"--shards {spec}", what, remedy)
        revision = unquote(match["revision"]) if match["revision"] else None
        if api is None:
            import_extra("hf", "huggingface_hub", where=f"--shards {spec}")
            api = make_client()
        if (name, revision) not in commits:
            commits[name, revision] = ask(spec, partial(find_commit, api, name, revision))
        commit = commits[name, revision]
        if any(c in path for c in WILDCARDS):
            paths = ask(spec, partial(list_paths, api, name, commit, path))
            if not paths:
                raise UserError(f"--shards {spec}", f"nothing matches at commit {commit}", "Check the path.")
        else:
            paths = [path]
        root = f"{find_endpoint()}/datasets/{name}/resolve/{commit}"
        yield from (f"{root}/{quote(each)}" for each in paths)


def make_client() -> Any:
    """Return a client of the Hub, with the user's token if there is one."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=find_endpoint(), token=find_token() or False, library_name="patternnet-ray")


def find_commit(api: Any, name: str, revision: str | None) -> str:
    """Return the commit of a revision; None is the main branch."""
    return str(api.dataset_info(name, revision=revision).sha)


def list_paths(api: Any, name: str, commit: str, pattern: str) -> list[str]:
    """Return the sorted paths of the files of a dataset that a pattern of fsspec matches."""
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    first = min(pattern.find(c) for c in WILDCARDS if c in pattern)
    folder = pattern[:first].rpartition("/")[0] or None
    expression = re.compile(glob_translate(pattern))
    try:
        tree = api.list_repo_tree(name, folder, recursive=True, revision=commit, repo_type="dataset")
        return sorted(e.path for e in tree if isinstance(e, RepoFile) and expression.match(e.path))
    except EntryNotFoundError:  # there is no such folder
        return []


def ask(spec: str, request: Callable[[], T]) -> T:
    """Return the answer of the Hub, which may ask for pauses. Raise UserError if it cannot answer."""
    from huggingface_hub import errors

    where = f"--shards {spec}"
    try:
        return call_patiently(request, PATIENCE)
    except errors.GatedRepoError as error:
        remedy = "Accept its conditions on its page, and set HF_TOKEN in the environment of the driver and the workers."
        raise UserError(where, "access to this dataset needs its owner's permission", remedy) from error
    except errors.RepositoryNotFoundError as error:
        remedy = "Check the name; for a private dataset set HF_TOKEN in the environment of the driver and the workers."
        raise UserError(where, "no such dataset, or the token does not give access to it", remedy) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(where, "the dataset has no such revision", "Check the part after @.") from error
    except errors.HFValidationError as error:
        raise UserError(where, "not the name of a dataset", f"Write {PREFIX}ORG/NAME.") from error
    except errors.HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 401:
            remedy = "Check HF_TOKEN, or log in again by hf auth login."
            raise UserError(where, "the Hub does not accept the token", remedy) from error
        raise to_user_error(error, where) from error
    except UserError:
        raise
    except Exception as error:  # of the network
        raise to_user_error(error, where) from error
