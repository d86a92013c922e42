"""Elementwise operators, by JAX primitive."""

from typing import Any

from sweet_jax.inference.onnx_trace import Operation, Value
from sweet_jax.inference.onnx_writer import GraphWriter, Operator


def elementwise(kind: str, **attributes: Any) -> Operator:
    """Returns an operator that writes a single ONNX node."""

    def write(writer: GraphWriter, operation: Operation) -> str:
        out = operation.outputs[0]
        name = writer.graph.op(kind, *map(writer.name, operation.inputs), **attributes)
        return broadcast(writer, operation, out, name)

    return write


def broadcast(writer: GraphWriter, operation: Operation, out: Value, name: str) -> str:
    """Names the output of an elementwise operation, whose shape is broadcast from its inputs."""
    shapes = [writer.shape(value) for value in operation.inputs]
    sizes = [
        next((s[i] for s in shapes if len(s) == len(out.shape) and s[i] != 1), 1)
        for i in range(len(out.shape))
    ]
    return writer.give(out, name, sizes)


def _select(writer: GraphWriter, operation: Operation) -> str:
    which, no, yes = operation.inputs
    name = writer.graph.op("Where", *map(writer.name, (which, yes, no)))
    return broadcast(writer, operation, operation.outputs[0], name)


def _not_equal(writer: GraphWriter, operation: Operation) -> str:
    equal = writer.graph.op("Equal", *map(writer.name, operation.inputs))
    name = writer.graph.op("Not", equal)
    return broadcast(writer, operation, operation.outputs[0], name)


def _rsqrt(writer: GraphWriter, operation: Operation) -> str:
    root = writer.graph.op("Sqrt", writer.name(operation.inputs[0]))
    name = writer.graph.op("Reciprocal", root)
    return broadcast(writer, operation, operation.outputs[0], name)


def _power(writer: GraphWriter, operation: Operation) -> str:
    x = operation.inputs[0]
    exponent = writer.graph.constant(operation.params["y"], x.dtype)
    name = writer.graph.op("Pow", writer.name(x), exponent)
    return broadcast(writer, operation, operation.outputs[0], name)


def _square(writer: GraphWriter, operation: Operation) -> str:
    x = writer.name(operation.inputs[0])
    name = writer.graph.op("Mul", x, x)
    return broadcast(writer, operation, operation.outputs[0], name)


def _clamp(writer: GraphWriter, operation: Operation) -> str:
    low, x, high = map(writer.name, operation.inputs)
    name = writer.graph.op("Min", writer.graph.op("Max", x, low), high)
    return broadcast(writer, operation, operation.outputs[0], name)


def _cast(writer: GraphWriter, operation: Operation) -> str:
    out = operation.outputs[0]
    name = writer.graph.cast(writer.name(operation.inputs[0]), out.dtype)
    return broadcast(writer, operation, out, name)


_SIMPLE = {
    **{"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min"},
    **{"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"},
    **{"and": "And", "or": "Or", "xor": "Xor", "not": "Not", "pow": "Pow", "exp": "Exp"},
    **{"log": "Log", "tanh": "Tanh", "logistic": "Sigmoid", "erf": "Erf", "sqrt": "Sqrt"},
    **{"abs": "Abs", "neg": "Neg", "sign": "Sign", "floor": "Floor", "ceil": "Ceil", "sin": "Sin"},
    **{"cos": "Cos", "gelu": "Gelu"},
}
ELEMENTWISE: dict[str, Operator] = {
    **{primitive: elementwise(kind) for primitive, kind in _SIMPLE.items()},
    "tanh_gelu": elementwise("Gelu", approximate="tanh"),
    "select_n": _select,
    "ne": _not_equal,
    "rsqrt": _rsqrt,
    "integer_pow": _power,
    "square": _square,
    "clamp": _clamp,
    "convert_element_type": _cast,
}
