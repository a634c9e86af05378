"""Web servers: requests with the token of the Hugging Face Hub, and the pauses that busy servers ask for."""

import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from patterns import UserError
from ray_jobs.io.pauses import find_pause
from ray_jobs.io.refusals import BusyError, find_refusal

MAX_PAUSE = 600.0  # seconds of one pause, however long the server asks for
FIRST_PAUSE = 1.0  # seconds after the first failure, if the server does not say how long; doubled by each attempt
MAX_FAILURES = 4  # further requests to a server that fails, and does not ask for a pause
PATIENCE = 900.0  # seconds of all pauses of a driver that lists shards
TOKEN = re.compile(r"[\x21-\x7e]+")
T = TypeVar("T")


def find_endpoint() -> str:
    """Return the address of the Hugging Face Hub: HF_ENDPOINT, or that of the public Hub."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def find_token() -> str | None:
    """Return the token for the Hub as its client finds it: HF_TOKEN, or the file that `hf auth login` writes.

    The client's package is not needed, because workers only read files.

    Raises:
        UserError: If the token has characters that no token has. They are not shown.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{home}/huggingface"
    file = Path(os.environ.get("HF_TOKEN_PATH") or f"{home}/token").expanduser()
    where, token = "HF_TOKEN", (os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or "").strip()
    if not token:
        try:
            where, token = str(file), file.read_text().strip()
        except (OSError, ValueError):
            return None
    if token and not TOKEN.fullmatch(token):
        raise UserError(where, "not a token of the Hugging Face Hub", "Log in again by hf auth login.")
    return token or None


def authorize(request: Request) -> Request:
    """Add the token to a request to the Hub; requests to other servers, also after a redirect, do not get it."""
    if request.full_url.startswith(f"{find_endpoint()}/") and (token := find_token()):
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return request


class _Redirects(HTTPRedirectHandler):
    def redirect_request(self, req: Request, *arguments: Any) -> Request | None:
        redirected = super().redirect_request(req, *arguments)
        return None if redirected is None else authorize(redirected)


class _Pauses:
    """Servers that asked this process to wait, and until when."""

    def __init__(self) -> None:
        self.lock, self.until = threading.Lock(), dict[str, float]()

    def left(self, url: str) -> float:
        """Return the seconds that are left of a server's pause."""
        with self.lock:
            return max(self.until.get(urlsplit(url).netloc, 0.0) - time.monotonic(), 0.0)

    def begin(self, url: str, seconds: float) -> None:
        """Note that the server of a URL asks for a pause."""
        with self.lock:
            self.until[urlsplit(url).netloc] = time.monotonic() + min(seconds, MAX_PAUSE)


PAUSES = _Pauses()


def open_url(url: str, timeout: float) -> Any:
    """Send a request and return the response.

    Not by fsspec, which requests ranges that some servers lack, and ends every read after five minutes.

    Args:
        url: The address.
        timeout: Seconds without a byte after which reading fails.

    Raises:
        BusyError: If the server asked this process for a pause that is not over.
        OSError: If the server cannot be reached, or responds with an error.
    """
    if left := PAUSES.left(url):
        what = f"the server asked for a pause, of which {left:.0f} s are left"
        raise BusyError.of(url, what, "Try again later.", slow_down=True, retry_after=left)
    request = Request(quote(url, safe="%/:=&?~#+!$,;'@()*[]"), headers={"User-Agent": "patternnet-ray"})
    try:
        return build_opener(_Redirects).open(authorize(request), timeout=timeout)
    except HTTPError as error:
        if (refusal := find_refusal(error)) and refusal[1]:
            for each in {error.url or url, url}:
                PAUSES.begin(each, refusal[1])
        raise


def call_patiently(function: Callable[[], T], patience: float, wait: Callable[[float], object] = time.sleep) -> T:
    """Return a function's result; it is called again while the server is busy, and a few times if the server fails.

    Args:
        function: Sends the request.
        patience: The seconds that pauses may take in all.
        wait: Waits for some seconds. An exception that it raises ends the attempts.

    Raises:
        Exception: The last error of the function.
    """
    attempt = 0
    while True:
        try:
            return function()
        except Exception as error:
            refusal = find_refusal(error)
            if refusal is None or (not refusal[0] and attempt == MAX_FAILURES):
                raise
            pause = find_pause(attempt, refusal[1], FIRST_PAUSE, MAX_PAUSE)
            if pause > patience:
                raise
            patience -= pause
            wait(pause)
        attempt += 1
