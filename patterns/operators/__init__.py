"""Linear operators of a network: their types, gates and receptive fields."""

from patterns.operators.gates import FACTORS, AnyGate, Gate, SmoothGate
from patterns.operators.operator import OPERATOR_TYPES, TYPE_NAMES, Operator, OperatorType

__all__ = ["FACTORS", "OPERATOR_TYPES", "TYPE_NAMES", "AnyGate", "Gate", "Operator", "OperatorType", "SmoothGate"]
