"""Servers that are busy: HTTP status 429 or 5xx, as the libraries of all stores report it, and when to ask again."""

import errno
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from patterns import UserError

SLOW_DOWN = (429, 503)  # the server works, and asks for fewer requests
RATE_LIMIT = re.compile(r"(?:^|[;,]\s*)t=(\d+)")  # of the header RateLimit: seconds until requests are allowed


class BusyError(UserError):
    """A request that a server refused for now. The attributes survive pickling.

    Attributes:
        slow_down: Whether the server asks for fewer requests. If not, the server failed.
        retry_after: The seconds after which the server allows another request; 0 if it names no time.
        begun: Whether work on the data had begun. If not, another attempt loses no work.
    """

    slow_down = False
    retry_after = 0.0
    begun = True

    @classmethod
    def of(cls, where: str, what: str, remedy: str, slow_down: bool, retry_after: float) -> "BusyError":
        """Return the error with its attributes."""
        error = cls(where, what, remedy)
        error.slow_down, error.retry_after = slow_down, retry_after
        return error


def iterate_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and its causes, the outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def find_refusal(error: BaseException) -> tuple[bool, float] | None:
    """Return `slow_down` and `retry_after` (see `BusyError`) if a busy server is the cause of an exception.

    Args:
        error: The exception of any library: urllib, aiohttp, requests, httpx, botocore, Google's or Azure's clients.

    Returns:
        None if the cause is another one.
    """
    for each in iterate_causes(error):
        if isinstance(each, BusyError):
            return each.slow_down, each.retry_after
        if isinstance(each, OSError) and each.errno == errno.EBUSY and each.filename is None:  # s3fs: SlowDown
            return True, 0.0
        status = find_status(each)
        if status is not None and (status in SLOW_DOWN or 500 <= status < 600):
            return status in SLOW_DOWN, find_retry_after(each)
    return None


def find_status(error: BaseException) -> int | None:
    """Return the HTTP status that an exception holds; None if it holds none."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):  # botocore
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    found = (getattr(each, name, None) for each in (error, response) for name in ("status", "status_code", "code"))
    return next((each for each in found if isinstance(each, int) and 100 <= each < 600), None)


def find_retry_after(error: BaseException) -> float:
    """Return the seconds that the response of an exception asks to wait; 0 if it names no time."""
    response = getattr(error, "response", None)
    headers: Any = getattr(error, "headers", None) or getattr(response, "headers", None)
    if isinstance(response, Mapping):
        headers = response.get("ResponseMetadata", {}).get("HTTPHeaders")
    if not hasattr(headers, "get"):
        return 0.0
    seconds = parse_retry_after(headers.get("Retry-After") or headers.get("retry-after") or "")
    limit = RATE_LIMIT.search(headers.get("RateLimit") or headers.get("ratelimit") or "")
    return seconds or (float(limit[1]) if limit else 0.0)


def parse_retry_after(value: str, now: datetime | None = None) -> float:
    """Return the seconds of a header Retry-After, which holds seconds or a date; 0 if it cannot be understood.

    Example:
        >>> parse_retry_after("120")
        120.0
        >>> parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT", datetime(2015, 10, 21, 7, 27, tzinfo=UTC))
        60.0
    """
    text = value.strip()
    if text.isdecimal():
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return 0.0
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max((date - (now or datetime.now(UTC))).total_seconds(), 0.0)
