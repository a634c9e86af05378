"""Sums over data from which patterns are computed."""

from patterns.moments.accumulator import buffer_bytes
from patterns.moments.concepts import PREFIX as CONCEPTS
from patterns.moments.concepts import ConceptSums, has_concepts, zero_concept_sums
from patterns.moments.gram import patch_moments_bytes
from patterns.moments.moments import RequiredSums, moments_bytes

__all__ = [
    "CONCEPTS",
    "ConceptSums",
    "RequiredSums",
    "buffer_bytes",
    "has_concepts",
    "moments_bytes",
    "patch_moments_bytes",
    "zero_concept_sums",
]
