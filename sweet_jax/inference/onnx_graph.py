"""A builder of ONNX graphs: nodes are added one by one, and weights stay outside the graph.

Nodes of the domain com.microsoft are ONNX Runtime's own, with which it would replace the standard
ones: attention of all heads, the norm of a sum with its residual and bias.

Shape letters: N rows, I and O input and output features.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MICROSOFT = "com.microsoft"
_OPSETS = (("", 21), (MICROSOFT, 1))
_IR_VERSION = 10  # that ONNX Runtime 1.22 reads
_SMALL = 512  # bytes of an array that stands in the graph
_LARGEST, _ZERO = 127, 128  # of int8; what stands for 0 among uint8
_SMALLEST = 1e-12  # of what a kernel's scale is made of: a feature of zeros has one too


class Graph(NamedTuple):
    """Holds a graph without its weights, and these by name."""

    model: bytes  # a serialised onnx.ModelProto
    weights: Mapping[str, np.ndarray]


class GraphBuilder:
    """Collects the nodes of a graph; a node that is there already is not added again.

    Methods return the name of a value of the graph.

    Args:
      precision: "float32", or "int8" for matrix products of integers: kernels are quantised here,
        with a scale for each output feature, and what they multiply when it is computed, with a
        scale for each token, so that no text changes the answer of another one.
      exact: how the names of kernels begin that are multiplied in float32 all the same.

    """

    def __init__(self, precision: str = "float32", exact: Sequence[str] = ()):
        self._precision, self._exact = precision, tuple(exact)
        self._nodes: list[onnx.NodeProto] = []
        self._named: dict[tuple[Any, ...], tuple[str, ...]] = {}  # outputs of nodes there are
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._weights: dict[str, np.ndarray] = {}
        self._sizes: dict[str, str] = {}

    def input(self, name: str, dtype: Any, shape: Sequence[Any]) -> str:
        """Adds an input; its symbolic sizes that are letters can be computed with from now on."""
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        sizes = [size if isinstance(size, int) else str(size) for size in shape]
        self._inputs.append(helper.make_tensor_value_info(name, kind, sizes))
        for axis, size in enumerate(sizes):
            if isinstance(size, str) and size not in self._sizes:
                self._sizes[size] = self.op("Shape", name, start=axis, end=axis + 1)
        return name

    def size_input(self, name: str, size: Any) -> str:
        """Adds an input that gives a symbolic size itself, int64 [1]."""
        self._inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, [1]))
        self._sizes[str(size)] = name
        return name

    def output(self, name: str, value: str, shape: Sequence[Any]) -> None:
        """Adds a float32 output of this name."""
        sizes = [size if isinstance(size, int) else str(size) for size in shape]
        self._nodes.append(helper.make_node("Identity", [value], [name]))
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes))

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Adds a node with one output. An input "" is left out."""
        return self.ops(kind, 1, *inputs, domain=domain, **attributes)[0]

    def ops(
        self, kind: str, count: int, *inputs: str, domain: str = "", **attributes: Any
    ) -> tuple[str, ...]:
        """Adds a node with `count` outputs; returns their names."""
        key = (kind, domain, inputs, repr(sorted(attributes.items())))
        if key not in self._named:
            names = tuple(f"{kind}_{len(self._nodes)}_{place}" for place in range(count))
            node = helper.make_node(kind, inputs, names, domain=domain, **attributes)
            self._nodes.append(node)
            self._named[key] = names
        return self._named[key]

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """Adds an array whose values stand in the graph."""
        array = np.asarray(value, dtype)
        name = f"constant_{array.dtype}_{array.shape}_{array.tobytes().hex()}"
        self._constants.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def weight(self, array: np.ndarray, name: str = "") -> str:
        """Adds an array, a large one beside the graph; arrays of equal contents are one."""
        if array.nbytes <= _SMALL:
            return self.constant(array, array.dtype)
        array = np.ascontiguousarray(array)
        digest = hashlib.sha256(array.tobytes()).hexdigest()[:16]
        name = f"{name or 'constant'}:{array.dtype}{list(array.shape)}:{digest}"
        self._weights.setdefault(name, array)
        return name

    def cast(self, x: str, dtype: Any) -> str:
        """Converts the elements of a value."""
        return self.op("Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def size(self, size: Any) -> str:
        """Returns a size that may be symbolic, int64 [1]."""
        if isinstance(size, int):
            return self.constant([size])
        # JAX writes symbolic sizes in this grammar, and reads them (jax.export.symbolic_shape).
        names: dict[str, Any] = {name: _Size(self, value) for name, value in self._sizes.items()}
        two = {"max": "Max", "min": "Min", "floordiv": "Div", "mod": "Mod"}
        names |= {name: _Size(self).function(kind) for name, kind in two.items()}
        found = eval(str(size).replace("^", "**"), {"__builtins__": {}}, names)
        return found.name if isinstance(found, _Size) else self.constant([found])

    def shape(self, shape: Sequence[Any]) -> str:
        """Returns sizes of which some may be symbolic, int64 [their number]."""
        if all(isinstance(size, int) for size in shape):
            return self.constant(shape)
        return self.op("Concat", *map(self.size, shape), axis=0)

    def matmul(self, x: str, kernel: np.ndarray, name: str = "", *, exact: bool = False) -> str:
        """Multiplies x [..., I] by a kernel [I, O]; in float32 with `exact`."""
        if exact or self._precision == "float32" or name.startswith(self._exact):
            return self.op("MatMul", x, self.weight(kernel, name))
        own = np.maximum(np.abs(kernel).max(axis=0), _SMALLEST) / _LARGEST  # [O]
        integers, scales = self._quantize(x, len(kernel))
        out = self.op(
            "MatMulIntegerToFloat",
            integers,
            self.weight(np.rint(kernel / own).astype(np.int8), name),
            self.constant(1, np.float32),
            self.weight(own.astype(np.float32), f"{name}.scale"),
            self.constant(_ZERO, np.uint8),
            domain=MICROSOFT,
        )
        return self.op("Mul", out, scales)

    def _quantize(self, x: str, features: int) -> tuple[str, str]:
        """Returns x [..., I] as uint8 around _ZERO, and the scale of each token [..., 1].

        The scale of a token of zeros is 0: whatever integers it is given are multiplied by that.
        """
        sizes = self.op("ReduceMax", self.op("Abs", x), self.constant([-1]), keepdims=1)
        scales = self.op("Mul", sizes, self.constant(1 / _LARGEST, np.float32))
        zeros = self.op("Expand", self.constant(_ZERO, np.uint8), self.op("Shape", scales))
        # One block a token: a pass less over x than a division and a scale of all, 5% of a model.
        integers = self.op("QuantizeLinear", x, scales, zeros, axis=-1, block_size=features)
        return integers, scales

    def build(self) -> Graph:
        """Returns the graph."""
        needed = {value.name for value in self._outputs}
        nodes: list[onnx.NodeProto] = []
        for node in reversed(self._nodes):
            if not needed.isdisjoint(node.output):
                nodes.insert(0, node)
                needed.update(node.input)
        weights = {name: value for name, value in self._weights.items() if name in needed}
        constants = [value for name, value in self._constants.items() if name in needed]
        constants += [_outside(name, value) for name, value in weights.items()]
        graph = helper.make_graph(nodes, "stage", self._inputs, self._outputs, constants)
        opsets = [helper.make_opsetid(domain, version) for domain, version in _OPSETS]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
        return Graph(model.SerializeToString(), weights)


class _Size:
    """Computes with a size in a graph, int64 [1], by Python's operators."""

    def __init__(self, graph: GraphBuilder, name: str = ""):
        self.graph, self.name = graph, name

    def function(self, kind: str) -> Any:
        return lambda a, b: _Size(self.graph, self.graph.op(kind, *map(self._name, (a, b))))

    def _name(self, other: Any) -> str:
        return other.name if isinstance(other, _Size) else self.graph.constant([other])

    def __add__(self, other: Any) -> "_Size":
        return self.function("Add")(self, other)

    def __sub__(self, other: Any) -> "_Size":
        return self.function("Sub")(self, other)

    def __rsub__(self, other: Any) -> "_Size":
        return self.function("Sub")(other, self)

    def __mul__(self, other: Any) -> "_Size":
        return self.function("Mul")(self, other)

    def __neg__(self) -> "_Size":
        return self * -1

    def __pow__(self, power: int) -> "_Size":
        return self if power == 1 else self * self ** (power - 1)

    __radd__, __rmul__ = __add__, __mul__


def _outside(name: str, value: np.ndarray) -> onnx.TensorProto:
    """Declares a weight whose values are not in the graph."""
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    declared = TensorProto(name=name, data_type=kind, dims=value.shape)
    declared.data_location = TensorProto.EXTERNAL
    entry = declared.external_data.add()
    entry.key, entry.value = "location", "beside the graph"
    return declared
