"""Writes the values of a traced program as values of an ONNX graph.

Arrays that JAX broadcasts stay small until an operator needs the full array, since ONNX's
elementwise operators broadcast as NumPy does.

Shape letters: B batch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sweet_jax.inference.onnx_graph import GraphBuilder
from sweet_jax.inference.onnx_trace import Operation, Program, Value

Shape = tuple[Any, ...]
Operator = Callable[["GraphWriter", Operation], Any]


class UnsupportedOperationError(Exception):
    """Raised for an operation that no operator here supports; the message names it."""


class GraphWriter:
    """Writes the operations of a program as nodes.

    Args:
      graph: builder of the graph.
      tokens: name of its value int32 [B], the number of tokens of each row.
      operators: function for each kind of operation that writes its nodes and returns the names of
        its outputs.

    """

    def __init__(self, graph: GraphBuilder, tokens: str, operators: Mapping[str, Operator]):
        self.graph, self.tokens, self.operators = graph, tokens, operators
        self._names: dict[Value, str] = {}
        self._shapes: dict[Value, Shape] = {}
        self._reshaped: dict[str, tuple[str, Shape]] = {}  # the source of each reshape, by name
        self._transposed: dict[str, tuple[str, tuple[int, ...]]] = {}

    def write(self, program: Program) -> None:
        """Adds the nodes of all operations. Raises UnsupportedOperationError."""
        for operation in program.operations:
            if operation.kind not in self.operators:
                raise UnsupportedOperationError(operation.kind)
            written = self.operators[operation.kind](self, operation)
            names = [written] if isinstance(written, str) else written
            for value, name in zip(operation.outputs, names, strict=True):
                self._names[value] = name

    def give(self, value: Value, name: str, shape: Sequence[Any] | None = None) -> str:
        """Sets the name of a value, and the shape in the graph, with 1 for broadcast axes."""
        self._names[value] = name
        if shape is not None:
            self._shapes[value] = tuple(shape)
        return name

    def shape(self, value: Value) -> Shape:
        """Returns the shape of a value's array in the graph."""
        return self._shapes.get(value, value.shape)

    def name(self, value: Value) -> str:
        """Returns the name of a value; its array may have 1 instead of a broadcast size."""
        if value.constant is not None:
            return self.graph.weight(value.constant, value.name)
        return self._names[value]

    def full(self, value: Value) -> str:
        """Returns the name of a value, broadcast to its full shape."""
        if self.shape(value) == value.shape:
            return self.name(value)
        return self.graph.op("Expand", self.name(value), self.graph.shape(value.shape))

    def reshape(self, name: str, before: Shape, after: Shape) -> str:
        """Reshapes; sizes that keep their position, and one more, may be symbolic."""
        source, before = self._reshaped.get(name, (name, before))
        if before == after:
            return source
        sizes = [0 if i < len(before) and n == before[i] else n for i, n in enumerate(after)]
        unknown = [i for i, n in enumerate(sizes) if not isinstance(n, int)]
        if unknown:
            sizes[unknown[-1]] = -1
        out = self.graph.op("Reshape", source, self.graph.shape(sizes))
        self._reshaped[out] = (source, before)
        return out

    def transpose(self, name: str, order: Sequence[int]) -> str:
        """Permutes axes."""
        source, first = self._transposed.get(name, (name, tuple(range(len(order)))))
        composed = tuple(first[axis] for axis in order)
        if composed == tuple(range(len(order))):
            return source
        out = self.graph.op("Transpose", source, perm=composed)
        self._transposed[out] = (source, composed)
        return out
