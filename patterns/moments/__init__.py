"""Sums over data: the sufficient statistics of the estimators."""

from patterns.moments.gram import bytes_of
from patterns.moments.moments import Wanted, buffer_bytes, planned_bytes

__all__ = ["Wanted", "buffer_bytes", "bytes_of", "planned_bytes"]
