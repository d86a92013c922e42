"""A builder of ONNX graphs: nodes are added one by one, and weights stay outside the graph.

Nodes of the domain com.microsoft are ONNX Runtime's own, which it would otherwise substitute for
groups of standard nodes: multi-head attention and integer matrix products.

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
_IR_VERSION = 10  # the version that ONNX Runtime 1.22 reads
_SMALL = 512  # maximum size in bytes of an array that is stored in the graph
_LARGEST, _ZERO = 127, 128  # the largest int8; the uint8 that represents 0
_SMALLEST = 1e-12  # minimum range of a kernel's scale, so that a feature of zeros has one too


class Graph(NamedTuple):
    """Holds a graph, and its weights separately."""

    model: bytes  # a serialized onnx.ModelProto
    weights: Mapping[str, np.ndarray]  # by name


class GraphBuilder:
    """Collects the nodes of a graph; identical nodes are added only once.

    Methods that add to the graph return the name of a value.

    Args:
      precision: "float32", or "int8" for integer matrix products. Kernels are quantized here, with
        a scale for each output feature. Activations are quantized when they are computed, with a
        scale for each token, so that no text affects the prediction of another.
      exact: prefixes of the names of kernels that are multiplied in float32 even so.

    """

    def __init__(self, precision: str = "float32", exact: Sequence[str] = ()):
        self._precision, self._exact = precision, tuple(exact)
        self._nodes: list[onnx.NodeProto] = []
        self._named: dict[tuple[Any, ...], tuple[str, ...]] = {}  # outputs of nodes, to reuse them
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._weights: dict[str, np.ndarray] = {}
        self._sizes: dict[str, str] = {}

    def input(self, name: str, dtype: Any, shape: Sequence[Any]) -> str:
        """Adds an input, whose symbolic sizes are then available to `size`."""
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        sizes = [size if isinstance(size, int) else str(size) for size in shape]
        self._inputs.append(helper.make_tensor_value_info(name, kind, sizes))
        for axis, size in enumerate(sizes):
            if isinstance(size, str) and size not in self._sizes:
                self._sizes[size] = self.op("Shape", name, start=axis, end=axis + 1)
        return name

    def size_input(self, name: str, size: Any) -> str:
        """Adds an input that is the value of a symbolic size, int64 [1]."""
        self._inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, [1]))
        self._sizes[str(size)] = name
        return name

    def output(self, name: str, value: str, shape: Sequence[Any]) -> None:
        """Adds a float32 output with this name."""
        sizes = [size if isinstance(size, int) else str(size) for size in shape]
        self._nodes.append(helper.make_node("Identity", [value], [name]))
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes))

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Adds a node with one output. An input "" stands for an optional input that is omitted."""
        return self.ops(kind, 1, *inputs, domain=domain, **attributes)[0]

    def ops(
        self, kind: str, count: int, *inputs: str, domain: str = "", **attributes: Any
    ) -> tuple[str, ...]:
        """Adds a node with `count` outputs; returns their names."""
        key = (kind, domain, inputs, repr(sorted(attributes.items())))
        if key not in self._named:
            names = tuple(f"{kind}_{len(self._nodes)}_{index}" for index in range(count))
            node = helper.make_node(kind, inputs, names, domain=domain, **attributes)
            self._nodes.append(node)
            self._named[key] = names
        return self._named[key]

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """Adds an array whose values are stored in the graph."""
        array = np.asarray(value, dtype)
        name = f"constant_{array.dtype}_{array.shape}_{array.tobytes().hex()}"
        self._constants.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def weight(self, array: np.ndarray, name: str = "") -> str:
        """Adds an array, outside the graph if it is large; equal arrays are stored once."""
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
        # JAX prints symbolic sizes as expressions that jax.export.symbolic_shape can parse.
        names: dict[str, Any] = {name: _Size(self, value) for name, value in self._sizes.items()}
        two = {"max": "Max", "min": "Min", "floordiv": "Div", "mod": "Mod"}
        names |= {name: _Size(self).function(kind) for name, kind in two.items()}
        result = eval(str(size).replace("^", "**"), {"__builtins__": {}}, names)
        return result.name if isinstance(result, _Size) else self.constant([result])

    def shape(self, shape: Sequence[Any]) -> str:
        """Returns a shape whose sizes may be symbolic, int64 [number of sizes]."""
        if all(isinstance(size, int) for size in shape):
            return self.constant(shape)
        return self.op("Concat", *map(self.size, shape), axis=0)

    def matmul(self, x: str, kernel: np.ndarray, name: str = "", *, exact: bool = False) -> str:
        """Multiplies x [..., I] by a kernel [I, O]; `exact` forces float32."""
        if exact or self._precision == "float32" or name.startswith(self._exact):
            return self.op("MatMul", x, self.weight(kernel, name))
        kernel_scales = np.maximum(np.abs(kernel).max(axis=0), _SMALLEST) / _LARGEST  # [O]
        integers, scales = self._quantize(x, len(kernel))
        out = self.op(
            "MatMulIntegerToFloat",
            integers,
            self.weight(np.rint(kernel / kernel_scales).astype(np.int8), name),
            self.constant(1, np.float32),
            self.weight(kernel_scales.astype(np.float32), f"{name}.scale"),
            self.constant(_ZERO, np.uint8),
            domain=MICROSOFT,
        )
        return self.op("Mul", out, scales)

    def _quantize(self, x: str, features: int) -> tuple[str, str]:
        """Returns x [..., I] as uint8 around _ZERO, and the scale of each token [..., 1].

        The scale of a token of zeros is 0, so that its integers do not matter.
        """
        sizes = self.op("ReduceMax", self.op("Abs", x), self.constant([-1]), keepdims=1)
        scales = self.op("Mul", sizes, self.constant(1 / _LARGEST, np.float32))
        zeros = self.op("Expand", self.constant(_ZERO, np.uint8), self.op("Shape", scales))
        # One block per token needs one pass less over x than a division followed by a quantization
        # with a single scale, which saves 5% of a model's time.
        integers = self.op("QuantizeLinear", x, scales, zeros, axis=-1, block_size=features)
        return integers, scales

    def build(self) -> Graph:
        """Returns the graph, without nodes and weights that no output needs."""
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
    """Represents a size in a graph, int64 [1], that Python's operators can compute with."""

    def __init__(self, graph: GraphBuilder, name: str = ""):
        self.graph, self.name = graph, name

    def function(self, kind: str) -> Any:
        return lambda a, b: _Size(self.graph, self.graph.op(kind, *map(self._name, (a, b))))

    def _name(self, value: Any) -> str:
        return value.name if isinstance(value, _Size) else self.graph.constant([value])

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
    """Declares a weight whose values are stored outside the graph."""
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    declared = TensorProto(name=name, data_type=kind, dims=value.shape)
    declared.data_location = TensorProto.EXTERNAL
    entry = declared.external_data.add()
    entry.key, entry.value = "location", "beside the graph"
    return declared
