"""Elementwise operators, by JAX primitive."""

from collections.abc import Callable
from typing import Any

from sweet_jax.inference.onnx_graph import GraphBuilder
from sweet_jax.inference.onnx_trace import Operation
from sweet_jax.inference.onnx_writer import GraphWriter, Operator


def elementwise(nodes: Callable[..., str]) -> Operator:
    """Returns an operator whose output has the shape that its inputs are broadcast to.

    nodes: function of (graph, operation, names of the inputs) that adds the nodes, and returns the
      name of the output.
    """

    def write(writer: GraphWriter, operation: Operation) -> str:
        (out,), shapes = operation.outputs, [writer.shape(value) for value in operation.inputs]
        name = nodes(writer.graph, operation, *map(writer.name, operation.inputs))
        sizes = [
            next((s[i] for s in shapes if len(s) == len(out.shape) and s[i] != 1), 1)
            for i in range(len(out.shape))
        ]
        return writer.give(out, name, sizes)

    return write


def _node(kind: str, **attributes: Any) -> Operator:
    """Returns an elementwise operator that is a single ONNX node."""
    return elementwise(lambda graph, operation, *names: graph.op(kind, *names, **attributes))


def _power(graph: GraphBuilder, operation: Operation, x: str) -> str:
    dtype = operation.inputs[0].dtype
    return graph.op("Pow", x, graph.constant(operation.params["y"], dtype))


_SIMPLE = {
    **{"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min"},
    **{"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"},
    **{"and": "And", "or": "Or", "xor": "Xor", "not": "Not", "pow": "Pow", "exp": "Exp"},
    **{"log": "Log", "tanh": "Tanh", "logistic": "Sigmoid", "erf": "Erf", "sqrt": "Sqrt"},
    **{"abs": "Abs", "neg": "Neg", "sign": "Sign", "floor": "Floor", "ceil": "Ceil", "sin": "Sin"},
    **{"cos": "Cos", "gelu": "Gelu"},
}
_COMPOSED: dict[str, Callable[..., str]] = {
    "select_n": lambda graph, _, which, no, yes: graph.op("Where", which, yes, no),
    "ne": lambda graph, _, a, b: graph.op("Not", graph.op("Equal", a, b)),
    "rsqrt": lambda graph, _, x: graph.op("Reciprocal", graph.op("Sqrt", x)),
    "integer_pow": _power,
    "square": lambda graph, _, x: graph.op("Mul", x, x),
    "clamp": lambda graph, _, low, x, high: graph.op("Min", graph.op("Max", x, low), high),
    "convert_element_type": lambda graph, cast, x: graph.cast(x, cast.outputs[0].dtype),
}
ELEMENTWISE: dict[str, Operator] = {
    **{primitive: _node(kind) for primitive, kind in _SIMPLE.items()},
    **{primitive: elementwise(nodes) for primitive, nodes in _COMPOSED.items()},
    "tanh_gelu": _node("Gelu", approximate="tanh"),
}
