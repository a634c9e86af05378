"""Pauses before a request to a busy server is repeated."""

import random

JITTER = 0.25  # largest random addition to a pause, as a fraction of it, so that clients do not return together


def find_pause(attempt: int, retry_after: float, first: float, longest: float) -> float:
    """Return the seconds to wait before a request is repeated.

    Args:
        attempt: The number of earlier attempts.
        retry_after: The seconds that the server asked for; 0 if it named no time.
        first: The pause for attempt 0, doubled by each attempt.
        longest: The longest pause, before the random addition.

    Example:
        >>> 30.0 <= find_pause(2, retry_after=30.0, first=1.0, longest=600.0) <= 37.5
        True
    """
    return min(max(first * 2.0**attempt, retry_after), longest) * random.uniform(1, 1 + JITTER)
