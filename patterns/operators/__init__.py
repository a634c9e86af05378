"""Linear operators of a network, their types and the positions that they see."""

from patterns.operators.operator import TYPE_NAMES

__all__ = ["TYPE_NAMES"]
