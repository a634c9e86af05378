"""File systems of paths and URLs: their errors as UserErrors, and a time limit for stores that do not respond."""

import errno
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from patterns import UserError
from ray_jobs.io.refusals import BusyError, find_refusal, find_status, iterate_causes

ANSWER_TIMEOUT = 45.0  # seconds for a small request
MAX_MESSAGE = 300  # characters of a file system's message
T = TypeVar("T")

# Packages on PyPI, by module, if the names differ.
PACKAGES = {"smbclient": "smbprotocol", "libarchive": "libarchive-c", "git": "GitPython", "pysftp": "paramiko"}
MODULES = {"sftp": "paramiko", "ssh": "paramiko", "smb": "smbclient", "hf": "huggingface_hub", "webhdfs": "requests"}
# Names of exception classes, because the packages that define them may not be installed.
NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "ProfileNotFound",
    "NoAuthTokenError",
    "DefaultCredentialsError",
    "RefreshError",
    "ClientAuthenticationError",
    "LocalTokenNotFoundError",
    "GatedRepoError",
}
NO_ANSWER = {
    "ConnectionError",
    "TimeoutError",
    "gaierror",
    "URLError",
    "EndpointConnectionError",
    "HTTPClientError",
    "ClientConnectionError",
    "ServiceRequestError",
    "TransportError",
    "NetworkError",
}
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_RIGHT = {errno.EACCES, errno.EPERM, errno.EROFS}
NO_PATH = {errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST, errno.EINVAL, errno.ENOENT}
RESUME = "then run the same command to resume"
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(://|::)")


class MissingError(UserError, FileNotFoundError):
    """A file that does not exist. Callers that expect this catch it as a FileNotFoundError."""


@contextmanager
def translate_errors(where: str, action: str = "read", remedy: str = "") -> Iterator[None]:
    """Translate every exception of the block to a UserError, because errors of file systems have no common base class.

    Args:
        where: The path or URL.
        action: `read`, `written` or `deleted`.
        remedy: The remedy for errors of no known type.

    Raises:
        UserError: If the block raises an exception.
        MissingError: If a file does not exist.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise to_user_error(error, where, action, remedy) from error


def to_user_error(error: Exception, where: str, action: str = "read", remedy: str = "") -> UserError:
    """Return the UserError for an exception of a file system.

    Args:
        error: The exception.
        where: The path or URL.
        action: `read`, `written` or `deleted`.
        remedy: The remedy for errors of no known type.

    Returns:
        The error; a MissingError if a file does not exist, a BusyError if a server refuses requests for now.
    """
    chain = list(iterate_causes(error))
    names = {base.__name__ for each in chain for base in type(each).__mro__}
    cause = chain[-1] if isinstance(error, FileNotFoundError) else error  # HTTP: the status is in the cause
    reason = f"cannot be {action} ({format_message(cause)})"
    number = next((each.errno for each in chain if isinstance(each, OSError) and each.errno is not None), None)
    if missing := next((each for each in chain if isinstance(each, ImportError)), None):
        package = find_package(where, missing)
        what = f"cannot be {action}: the package {package} is not installed"
        return UserError(where, what, f"Run pip install {package} on every node.")
    if "unknown protocol" in names or has_unknown_scheme(where):
        what = f"no file system is known for {parse_scheme(where)}://"
        return UserError(where, what, "Use a path, or a URL such as s3://, gs://, az://, hf:// or https://.")
    if refusal := find_refusal(error):
        what = f"{reason[:-1]}: the server {'asks for fewer requests' if refusal[0] else 'failed'})"
        return BusyError.of(where, what, f"Wait, {RESUME}.", *refusal)
    denied = any(find_status(each) in (401, 403) for each in chain)
    if names & NO_CREDENTIALS or denied or (isinstance(error, PermissionError) and "://" in where):
        credentials = "Set the store's credentials in the environment of the driver and the workers (see docs/data.md)."
        return UserError(where, reason, credentials)
    if isinstance(error, FileNotFoundError) and not names & (NO_ANSWER - {"URLError"}) and action == "read":
        status = next((s for e in chain if isinstance(s := getattr(e, "status", None), int)), 404)
        if status in (404, 410):
            missing_file = error.filename or where
            what = "it does" if str(missing_file) == where else f"{missing_file} does"
            return MissingError(where, f"cannot be read ({what} not exist)", remedy or "Check the path.")
    if names & NO_ANSWER:
        what = f"cannot be {action}, because the server does not respond ({format_message(cause)})"
        return UserError(where, what, f"Check the address and the network, {RESUME}.")
    if isinstance(error, NotImplementedError) and action == "written":
        return UserError(where, "this type of store is read-only", "Choose another folder or store.")
    if number in NO_ROOM:
        return UserError(where, reason, f"Free disk space, {RESUME}.")
    if number in NO_RIGHT:
        return UserError(where, reason, f"Fix the permissions or choose another folder, {RESUME}.")
    if number in NO_PATH:
        return UserError(where, reason, remedy or "Check the path, or choose another.")
    return UserError(where, reason, remedy or f"Check the path or URL and its server, {RESUME}.")


def format_message(error: BaseException) -> str:
    """Return the message of an exception in one line, or the name of its class if there is no message."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(str(text).split())[:MAX_MESSAGE] or type(error).__name__


def find_package(where: str, error: ImportError) -> str:
    """Return the name on PyPI of the package whose import failed."""
    from fsspec.registry import known_implementations

    scheme = parse_scheme(where)
    module = next((e.name for e in iterate_causes(error) if isinstance(e, ImportError) and e.name), None)
    if module is None or module.startswith("fsspec"):
        module = MODULES.get(scheme) or known_implementations.get(scheme, {}).get("class", scheme).partition(".")[0]
    top = module.partition(".")[0]
    return PACKAGES.get(top, top)


def parse_scheme(where: str) -> str:
    """Return the scheme of a URL, or the first scheme of a chain of URLs; empty for a path."""
    match = SCHEME.match(where)
    return match[1] if match else ""


def is_url(path: str) -> bool:
    """Return whether a string is a URL, or a chain of URLs, instead of a path of this machine.

    `::` in a name is not a chain unless a known file system precedes it.

    Example:
        >>> is_url("s3://bucket/train.tar"), is_url("zip::data.zip"), is_url("a::b.tar")
        (True, True, False)
    """
    match = SCHEME.match(path)
    return match is not None and (match[2] == "://" or is_known_scheme(match[1]))


def is_known_scheme(scheme: str) -> bool:
    """Return whether fsspec knows a file system of this scheme."""
    from fsspec.registry import known_implementations, registry

    return scheme in known_implementations or scheme in registry


def has_unknown_scheme(where: str) -> bool:
    """Return whether a string is a URL of no known file system."""
    return is_url(where) and not is_known_scheme(parse_scheme(where))


def resolve_file_url(path: str) -> str:
    """Return the path of a `file:` URL, percent-encoded or not; return other paths and URLs unchanged."""
    match = re.match(r"file:(//(localhost)?(?=/))?", path)
    if match is None:
        return path
    plain = Path(path[match.end() :])
    decoded = Path(unquote(str(plain)))
    with translate_errors(path):
        return str(decoded if not plain.parent.exists() and decoded.parent.exists() else plain)


def expand_home(path: str) -> str:
    """Return a path with its leading `~` or `~USER` expanded, which shells do not do in quotes or lists."""
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:  # no such user, or no home folder
        raise UserError(
            path, "its home folder is not known", "Pass the absolute path, or ./~ for this name."
        ) from error


def open_file_system(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it.

    Raises:
        UserError: If there is no such file system, or its package is not installed.
    """
    import fsspec

    if has_unknown_scheme(url):
        raise to_user_error(ValueError(), url)
    with translate_errors(url):
        return fsspec.core.url_to_fs(url)


def call_with_timeout(function: Callable[..., T], *arguments: object) -> T:
    """Return the result of a small request to a store.

    Args:
        function: The request.
        *arguments: Its arguments.

    Raises:
        TimeoutError: If there is no response within ANSWER_TIMEOUT seconds.
        Exception: The exception of the request.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            results.append(function(*arguments))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_TIMEOUT)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no response within {ANSWER_TIMEOUT:g} s")
    return results[0]
