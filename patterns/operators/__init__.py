"""Linear operators of a network: their types, gates and receptive fields."""

from patterns.operators.operator import OPERATOR_TYPES, TYPE_NAMES, Gate, Operator, OperatorType

__all__ = ["OPERATOR_TYPES", "TYPE_NAMES", "Gate", "Operator", "OperatorType"]
