"""Sums over data: the sufficient statistics of the estimators."""

from patterns.moments.moments import Wanted, buffer_bytes, planned_bytes
from patterns.moments.patches import bytes_of

__all__ = ["Wanted", "buffer_bytes", "bytes_of", "planned_bytes"]
