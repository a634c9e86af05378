"""Records of graphs as values of JSON, for files.

A file can name only the operations of ATen and the functions that are listed here, so reading one runs no other code.
"""

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from patterns.operators.gates import AnyGate, Gate, SmoothGate
from patterns.operators.operator import OPERATOR_TYPES, TYPE_NAMES, Operator
from patterns.tracing.average_pools import fixed_product
from patterns.tracing.canonicalize import weighted_sum
from patterns.tracing.graph_records import NodeName, NodeRecord, OperationName
from patterns.tracing.inputs import require_batch
from patterns.tracing.linearize import DETACHED_NORMS
from patterns.tracing.scales import SCALES

NAMESPACE = "aten"
SYMBOLIC = operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg
FUNCTIONS: dict[str, Any] = {
    function.__name__: function
    for function in (require_batch, fixed_product, weighted_sum, *SCALES, *DETACHED_NORMS.values(), *SYMBOLIC)
}
ENUMERATIONS = torch.dtype, torch.layout, torch.memory_format  # types of constants of the module torch
STEPS = "placeholder", "get_attr", "call_module", "call_function", "output"
# Names of inputs, attributes and keywords: torch writes them into the code of a graph.
NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
PLAIN = str, int, float, bool, type(None)
STATE = "name", "source", "calls", "mixed_gates", "per_image", "rows", "input_shapes", "output_shape"


def encode_record(record: NodeRecord) -> list[Any]:
    """Return the record of a node as a value of JSON.

    Raises:
        TypeError: If the node calls an operation of the user's code, has an unusual name, or has an argument of an
            unknown type.
    """
    target: Any = record.target
    if record.op not in STEPS or (isinstance(target, str) and not NAME.fullmatch(target)):
        raise TypeError(f"{record.op} of {target} has no form in files")
    if isinstance(target, OperationName):
        if target.namespace != NAMESPACE:
            raise TypeError(f"the operation {target.namespace}::{target.name} is not one of torch's own")
        target = {"operation": [target.name, target.overload]}
    elif callable(target):
        if FUNCTIONS.get(name := getattr(target, "__name__", "")) is not target:
            raise TypeError(f"the function {name or target} has no name in files")
        target = {"function": name}
    arguments = encode_value(record.args), {name: encode_value(value) for name, value in record.kwargs.items()}
    return [record.op, record.name, target, *arguments, record.is_number]


def decode_record(value: Sequence[Any]) -> NodeRecord:
    """Return the record of a node; KeyError, TypeError or ValueError if the value is not a record."""
    op, name, target, args, kwargs, is_number = value
    if op not in STEPS or not all(map(NAME.fullmatch, [*kwargs, *([target] if isinstance(target, str) else [])])):
        raise ValueError(f"{op} of {target} is not part of a graph")
    if isinstance(target, Mapping):
        ((kind, found),) = target.items()
        target = FUNCTIONS[found] if kind == "function" else OperationName(NAMESPACE, *found)
    decoded = {key: decode_value(each) for key, each in kwargs.items()}
    return NodeRecord(op, name, target, decode_value(args), decoded, is_number)


def encode_value(value: Any) -> Any:
    """Return an argument of a node as a value of JSON. Raise TypeError for a type that is not known."""
    if type(value) in PLAIN:
        return value
    if isinstance(value, list):
        return [encode_value(each) for each in value]
    if isinstance(value, tuple):
        return {"tuple": [encode_value(each) for each in value]}
    if isinstance(value, NodeName):
        return {"node": value.name}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, ENUMERATIONS):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, slice):
        return {"slice": [encode_value(each) for each in (value.start, value.stop, value.step)]}
    raise TypeError(f"an argument of the type {type(value).__name__} has no form in files")


def decode_value(value: Any) -> Any:
    """Return the argument that `encode_value` has encoded."""
    if isinstance(value, list):
        return [decode_value(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    ((kind, found),) = value.items()
    if kind in ("tuple", "slice"):
        return (tuple if kind == "tuple" else to_slice)([decode_value(each) for each in found])
    if kind == "torch" and isinstance(constant := getattr(torch, found), ENUMERATIONS):
        return constant
    return {"node": NodeName, "device": torch.device}[kind](found)


def to_slice(limits: Sequence[Any]) -> slice:
    """Return the slice of a start, a stop and a step."""
    return slice(*limits)


def encode_operator(module: Operator) -> dict[str, Any]:
    """Return all of an operator but its weight and bias as a value of JSON."""
    options, gate = asdict(module.operator_type), module.gate  # type: ignore[call-overload]
    encoded = None if gate is None else {type(gate).__name__: asdict(gate)}
    state = {name: getattr(module, name) for name in STATE}
    return {"type": TYPE_NAMES[type(module.operator_type)], "options": options, "gate": encoded, **state}


def decode_operator(value: Mapping[str, Any], weight: Tensor, bias: Tensor | None) -> Operator:
    """Return an operator; KeyError, TypeError or ValueError if the value is not an operator."""
    state = {name: to_tuple(value[name]) for name in STATE}
    operator_type = OPERATOR_TYPES[value["type"]](**{name: to_tuple(each) for name, each in value["options"].items()})
    gate = decode_gate(value["gate"])
    fixed = {name: state.pop(name) for name in ("name", "input_shapes", "output_shape", "source")}
    module = Operator(operator_type=operator_type, weight=weight, bias=bias, gate=gate, **fixed)
    for name, each in state.items():
        setattr(module, name, each)
    return module


def decode_gate(value: Mapping[str, Any] | None) -> AnyGate | None:
    """Return a gate."""
    if value is None:
        return None
    ((kind, fields),) = value.items()
    return {"Gate": Gate, "SmoothGate": SmoothGate}[kind](**{name: to_tuple(each) for name, each in fields.items()})


def to_tuple(value: Any) -> Any:
    """Return a value of JSON with tuples instead of lists."""
    return tuple(map(to_tuple, value)) if isinstance(value, list) else value
