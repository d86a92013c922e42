"""Traces a JAX function to a flat list of operations, the first step of writing an ONNX graph.

The sizes of batch and length stay symbolic. Calls are inlined, operations on constants (including
parameters) are evaluated by JAX, and chains of reshapes or transposes become one operation.
`onnx_fusions` then replaces some groups of operations by one, and `onnx_operators` writes each
operation as nodes of a graph.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core
import numpy as np

# Functions of `models/layers.py` with a custom backward pass that ONNX has operators for. They are
# kept as one operation with this name.
KEPT = ("layer_norm", "gelu", "masked_softmax")
_CALLS = {"jit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}
_CALLS |= {"custom_vjp_call": "call_jaxpr"}
_SAME = ("copy", "copy_p", "stop_gradient", "optimization_barrier")
_Jaxpr = jax.extend.core.ClosedJaxpr


@dataclasses.dataclass(eq=False)
class Value:
    """Describes an array: a constant, an input, or an output of an operation.

    Attributes:
      shape: sizes, some of which may be symbolic.
      dtype: dtype of its elements.
      constant: the array itself, if it is constant.
      name: path of the parameter, if it is one; else "".

    """

    shape: tuple[Any, ...]
    dtype: Any
    constant: np.ndarray | None = None
    name: str = ""


class Operation(NamedTuple):
    """Holds one operation, whose kind is a JAX primitive, one of KEPT or a name of a fusion."""

    kind: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    params: Mapping[str, Any]


class Program(NamedTuple):
    """Holds the operations of a function in an order in which they can be computed."""

    inputs: Mapping[str, Value]  # by name
    operations: list[Operation]
    outputs: list[Value]


def as_constant(array: Any, name: str = "") -> Value:
    """Returns an array as a constant value."""
    array = np.asarray(array)
    return Value(array.shape, array.dtype, array, name)


def trace(
    function: Callable[[Any, Any], Sequence[jax.Array]],
    parameters: Mapping[str, np.ndarray],
    inputs: Mapping[str, jax.ShapeDtypeStruct],
) -> Program:
    """Returns the program of function(parameters, inputs).

    Args:
      function: function from two dicts of arrays to a list of arrays.
      parameters: parameters by path, which become constants of the program.
      inputs: inputs by name, with symbolic sizes.

    """
    shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in parameters.items()}
    jaxpr = jax.make_jaxpr(function)(shapes, dict(inputs))
    # Sorted, since JAX sorts the keys of dicts.
    constants = [as_constant(parameters[name], name) for name in sorted(parameters)]
    variables = {name: Value(x.shape, np.dtype(x.dtype)) for name, x in sorted(inputs.items())}
    walk = _Walk()
    outputs = walk.inline(jaxpr, [*constants, *variables.values()])
    return Program(variables, used(walk.operations, outputs), outputs)


def used(operations: Sequence[Operation], outputs: Sequence[Value]) -> list[Operation]:
    """Returns the operations that some outputs depend on."""
    needed, selected = set(outputs), []
    for operation in reversed(operations):
        if not needed.isdisjoint(operation.outputs):
            selected.append(operation)
            needed.update(operation.inputs)
    return selected[::-1]


class _Walk:
    """Collects the operations of a jaxpr."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self._made: dict[Value, Operation] = {}

    def inline(self, jaxpr: _Jaxpr, inputs: Sequence[Value]) -> list[Value]:
        """Adds the operations of a jaxpr; returns its outputs."""
        values = dict(zip(jaxpr.jaxpr.invars, inputs, strict=True))
        values |= zip(jaxpr.jaxpr.constvars, map(as_constant, jaxpr.consts), strict=True)

        def read(atom: Any) -> Value:
            return as_constant(atom.val) if hasattr(atom, "val") else values[atom]

        for equation in jaxpr.jaxpr.eqns:
            outputs = self._add(equation, [read(atom) for atom in equation.invars])
            values |= zip(equation.outvars, outputs, strict=True)
        return [read(atom) for atom in jaxpr.jaxpr.outvars]

    def _add(self, equation: Any, inputs: list[Value]) -> Sequence[Value]:
        """Adds an equation; returns its outputs."""
        kind, params = equation.primitive.name, equation.params
        shapes = [variable.aval for variable in equation.outvars]
        # A symbolic size is not a constant, although it has no inputs.
        is_constant = kind != "dim_as_value" and all(x.constant is not None for x in inputs)
        if kind in _CALLS:
            inner = params[_CALLS[kind]]
            name = inner.jaxpr.debug_info.func_name
            if is_constant or kind != "custom_vjp_call" or name not in KEPT:
                return self.inline(inner, inputs)
            kind, params = name, {"jaxpr": inner}
        elif is_constant and all(isinstance(size, int) for aval in shapes for size in aval.shape):
            results = equation.primitive.bind(*[value.constant for value in inputs], **params)
            return [
                as_constant(x)
                for x in (results if equation.primitive.multiple_results else [results])
            ]
        outputs = tuple(Value(aval.shape, np.dtype(aval.dtype)) for aval in shapes)
        return self._simplified(Operation(kind, tuple(inputs), outputs, params))

    def _simplified(self, operation: Operation) -> Sequence[Value]:
        """Adds an operation unless it changes nothing; returns its outputs."""
        kind, (x, *others), (out, *_) = (
            operation.kind,
            operation.inputs or (None,),
            operation.outputs,
        )
        before = self._made.get(x) if x is not None else None
        same = x is not None and x.shape == out.shape and x.dtype == out.dtype
        if kind in _SAME or (same and kind in ("convert_element_type", "reshape")):
            return operation.inputs
        plain = kind in ("add", "mul") and others[0].shape == out.shape
        if plain and _is_scalar(x, int(kind == "mul")):  # 0 + x or 1 * x, from jnp.arange
            return others
        if kind == "reshape" and before is not None and before.kind == "reshape":
            if before.inputs[0].shape == out.shape:
                return before.inputs
            operation = operation._replace(inputs=before.inputs)
        if kind == "transpose" and before is not None and before.kind == "transpose":
            order = tuple(before.params["permutation"][i] for i in operation.params["permutation"])
            if order == tuple(range(len(order))):
                return before.inputs
            params = {"permutation": order}
            operation = operation._replace(inputs=before.inputs, params=params)
        self.operations.append(operation)
        self._made |= dict.fromkeys(operation.outputs, operation)
        return operation.outputs


def _is_scalar(value: Value | None, number: int) -> bool:
    return (
        value is not None
        and value.shape == ()
        and value.constant is not None
        and bool(value.constant == number)
    )
