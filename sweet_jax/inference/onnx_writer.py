"""The values of a traced program as values of an ONNX graph.

Arrays that JAX broadcasts stay as small as they are until an operator needs them whole, since
those of ONNX that compute by element broadcast as NumPy does.

Shape letters: B batch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sweet_jax.inference.onnx_graph import GraphBuilder
from sweet_jax.inference.onnx_trace import Operation, Program, Value

Shape = tuple[Any, ...]
Operator = Callable[["GraphWriter", Operation], Any]


class UnsupportedOperationError(Exception):
    """Says that a program has an operation that no operator computes; its text names it."""


class GraphWriter:
    """Writes the operations of a program as nodes.

    Args:
      graph: to add to.
      tokens: its value int32 [B], the number of tokens of each row.
      operators: writes the nodes of an operation of each kind; returns the names of its outputs.

    """

    def __init__(self, graph: GraphBuilder, tokens: str, operators: Mapping[str, Operator]):
        self.graph, self.tokens, self.operators = graph, tokens, operators
        self._names: dict[Value, str] = {}
        self._shapes: dict[Value, Shape] = {}
        self._reshaped: dict[str, tuple[str, Shape]] = {}  # by name: what was reshaped
        self._transposed: dict[str, tuple[str, tuple[int, ...]]] = {}

    def write(self, program: Program) -> None:
        """Adds the nodes of all operations. Raises UnsupportedOperationError."""
        for operation in program.operations:
            if operation.kind not in self.operators:
                raise UnsupportedOperationError(operation.kind)
            found = self.operators[operation.kind](self, operation)
            names = [found] if isinstance(found, str) else found
            for value, name in zip(operation.outputs, names, strict=True):
                self._names[value] = name

    def give(self, value: Value, name: str, shape: Sequence[Any] | None = None) -> str:
        """Names a value; `shape` is that of the array in the graph, 1 where it is broadcast."""
        self._names[value] = name
        if shape is not None:
            self._shapes[value] = tuple(shape)
        return name

    def shape(self, value: Value) -> Shape:
        """Returns the shape of a value's array in the graph."""
        return self._shapes.get(value, value.shape)

    def name(self, value: Value) -> str:
        """Returns the name of a value, which may be smaller than its shape says."""
        if value.constant is not None:
            return self.graph.weight(value.constant, value.name)
        return self._names[value]

    def full(self, value: Value) -> str:
        """Returns the name of a value of its whole shape."""
        if self.shape(value) == value.shape:
            return self.name(value)
        return self.graph.op("Expand", self.name(value), self.graph.shape(value.shape))

    def reshape(self, name: str, before: Shape, after: Shape) -> str:
        """Reshapes; a size that stays where it is, and one more, need not be known."""
        source, before = self._reshaped.get(name, (name, before))
        if before == after:
            return source
        kept = [0 if i < len(before) and n == before[i] else n for i, n in enumerate(after)]
        unknown = [i for i, n in enumerate(kept) if not isinstance(n, int)]
        if unknown:
            kept[unknown[-1]] = -1
        out = self.graph.op("Reshape", source, self.graph.shape(kept))
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
