"""Sums over data from which patterns are computed."""

from patterns.moments.accumulator import buffer_bytes
from patterns.moments.gram import patch_moments_bytes
from patterns.moments.moments import RequiredSums, moments_bytes

__all__ = ["RequiredSums", "buffer_bytes", "moments_bytes", "patch_moments_bytes"]
