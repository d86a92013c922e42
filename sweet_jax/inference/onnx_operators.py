"""The ONNX nodes of each operation of a traced program: a function for each kind, and a table.

The functions in this module move or sum elements of arbitrary arrays, so that their axes have no
shape letters.
"""

import math
from typing import Any

import numpy as np

from sweet_jax.inference.onnx_elementwise import ELEMENTWISE
from sweet_jax.inference.onnx_fused import FUSED
from sweet_jax.inference.onnx_trace import Operation
from sweet_jax.inference.onnx_writer import GraphWriter, Operator, UnsupportedOperationError


def _reshape(writer: GraphWriter, operation: Operation) -> str:
    x, out = operation.inputs[0], operation.outputs[0]
    return writer.reshape(writer.full(x), x.shape, out.shape)


def _transpose(writer: GraphWriter, operation: Operation) -> str:
    (x,), order = operation.inputs, operation.params["permutation"]
    sizes = [writer.shape(x)[axis] for axis in order]
    return writer.give(operation.outputs[0], writer.transpose(writer.name(x), order), sizes)


def _broadcast_in_dim(writer: GraphWriter, operation: Operation) -> str:
    x, out = operation.inputs[0], operation.outputs[0]
    axes = operation.params["broadcast_dimensions"]
    sizes = [1] * len(out.shape)
    for dimension, size in zip(axes, writer.shape(x), strict=True):
        sizes[dimension] = size
    if x.constant is not None:
        return writer.give(out, writer.graph.weight(x.constant.reshape(sizes)), sizes)
    added = [axis for axis in range(len(sizes)) if axis not in axes]
    name = writer.name(x)
    if added:
        name = writer.graph.op("Unsqueeze", name, writer.graph.constant(added))
    return writer.give(out, name, sizes)


def _squeeze(writer: GraphWriter, operation: Operation) -> str:
    x, axes = operation.inputs[0], operation.params["dimensions"]
    return writer.graph.op("Squeeze", writer.full(x), writer.graph.constant(axes))


def _reduce(kind: str) -> Operator:
    def write(writer: GraphWriter, operation: Operation) -> str:
        axes = writer.graph.constant(operation.params["axes"])
        return writer.graph.op(kind, writer.full(operation.inputs[0]), axes, keepdims=0)

    return write


def _cumulative_sum(writer: GraphWriter, operation: Operation) -> str:
    axis = writer.graph.constant(operation.params["axis"])
    x = writer.full(operation.inputs[0])
    return writer.graph.op("CumSum", x, axis, reverse=int(operation.params["reverse"]))


def _iota(writer: GraphWriter, operation: Operation) -> str:
    graph, out, axis = writer.graph, operation.outputs[0], operation.params["dimension"]
    size = graph.op("Squeeze", graph.size(out.shape[axis]))
    name = graph.cast(graph.op("Range", graph.constant(0), size, graph.constant(1)), out.dtype)
    if others := [i for i in range(len(out.shape)) if i != axis]:
        name = graph.op("Unsqueeze", name, graph.constant(others))
    return writer.give(out, name, [n if i == axis else 1 for i, n in enumerate(out.shape)])


def _size_as_value(writer: GraphWriter, operation: Operation) -> str:
    graph, out = writer.graph, operation.outputs[0]
    return graph.cast(graph.op("Squeeze", graph.size(operation.params["dim"])), out.dtype)


def _concatenate(writer: GraphWriter, operation: Operation) -> str:
    axis = operation.params["dimension"]
    return writer.graph.op("Concat", *map(writer.full, operation.inputs), axis=axis)


def _cut(writer: GraphWriter, x: str, starts: Any, limits: Any, axes: Any, steps: Any = ()) -> str:
    graph = writer.graph
    if not axes:
        return x
    more = [graph.constant(steps)] if steps else []
    return graph.op(
        "Slice", x, graph.shape(starts), graph.shape(limits), graph.constant(axes), *more
    )


def _slice(writer: GraphWriter, operation: Operation) -> str:
    x, params = operation.inputs[0], operation.params
    starts, limits = params["start_indices"], params["limit_indices"]
    steps = params["strides"] or (1,) * len(starts)
    whole = [s == 0 and n == size for s, n, size in zip(starts, limits, x.shape, strict=True)]
    axes = [i for i, step in enumerate(steps) if not whole[i] or step != 1]
    first, last, step = ([each[i] for i in axes] for each in (starts, limits, steps))
    return _cut(writer, writer.full(x), first, last, axes, step)


def _split(writer: GraphWriter, operation: Operation) -> tuple[str, ...]:
    x, sizes = writer.full(operation.inputs[0]), writer.graph.constant(operation.params["sizes"])
    axis = operation.params["axis"]
    return writer.graph.ops("Split", len(operation.outputs), x, sizes, axis=axis)


def _pad(writer: GraphWriter, operation: Operation) -> str:
    x, value = operation.inputs
    low, high, inner = zip(*operation.params["padding_config"], strict=True)
    if any(inner) or any(isinstance(n, int) and n < 0 for n in (*low, *high)):
        raise UnsupportedOperationError("pad with interior or negative padding")
    sizes = writer.graph.shape((*low, *high))
    return writer.graph.op("Pad", writer.full(x), sizes, writer.name(value))


def _gather(writer: GraphWriter, operation: Operation) -> str:
    """Gathers one block of an array; `take` looks up rows by index."""
    x, indices = operation.inputs
    numbers, sizes = operation.params["dimension_numbers"], operation.params["slice_sizes"]
    if len(indices.shape) != 1 or numbers.operand_batching_dims:
        raise UnsupportedOperationError("gather of anything but rows or one block")
    starts = writer.graph.cast(writer.full(indices), np.int64)
    name = _block(writer, writer.full(x), x.shape, starts, sizes, numbers.start_index_map)
    if collapsed := numbers.collapsed_slice_dims:
        name = writer.graph.op("Squeeze", name, writer.graph.constant(collapsed))
    return name


def _dynamic_slice(writer: GraphWriter, operation: Operation) -> str:
    (x, *starts), sizes = operation.inputs, operation.params["slice_sizes"]
    graph = writer.graph
    offsets = [graph.op("Unsqueeze", writer.name(s), graph.constant([0])) for s in starts]
    vector = graph.cast(graph.op("Concat", *offsets, axis=0), np.int64)
    return _block(writer, writer.full(x), x.shape, vector, sizes, range(len(starts)))


def _block(writer: GraphWriter, x: str, shape: Any, starts: str, sizes: Any, axes: Any) -> str:
    """Slices a block out of x that begins at `starts` along `axes`, and at 0 along other axes."""
    graph, others = writer.graph, [i for i in range(len(sizes)) if i not in axes]
    ends = graph.op("Add", starts, graph.shape([sizes[i] for i in axes]))
    name = graph.op("Slice", x, starts, ends, graph.constant(list(axes))) if axes else x
    cut = [i for i in others if sizes[i] != shape[i]]
    return _cut(writer, name, [0] * len(cut), [sizes[i] for i in cut], cut)


def _take(writer: GraphWriter, operation: Operation) -> str:
    table, rows = operation.inputs
    out, axis, idx = operation.outputs[0], operation.params["axis"], writer.name(rows)
    if operation.params["column"]:
        idx = writer.graph.op("Squeeze", writer.full(rows), writer.graph.constant([-1]))
        return writer.graph.op("Gather", writer.full(table), idx, axis=axis)
    sizes = writer.shape(rows)
    shape = (*table.shape[:axis], *sizes, *table.shape[axis + 1 :])
    return writer.give(out, writer.graph.op("Gather", writer.full(table), idx, axis=axis), shape)


def _dot_general(writer: GraphWriter, operation: Operation) -> str:
    """Multiplies two arrays as matrices, [batch..., free, contracted] and the second transposed."""
    (a, b), out = operation.inputs, operation.outputs[0]
    contracted, batches = operation.params["dimension_numbers"]
    names, free = [], []
    # Both may be one and the same array, as in x x'.
    for first, value, over, batch in zip((True, False), (a, b), contracted, batches, strict=True):
        rest = [i for i in range(len(value.shape)) if i not in (*over, *batch)]
        order = [*batch, *rest, *over] if first else [*batch, *over, *rest]
        name = writer.transpose(writer.full(value), order)
        shape = tuple(value.shape[i] for i in order)
        groups = [tuple(value.shape[i] for i in axes) for axes in (rest, over)]
        merged = [math.prod(sizes) for sizes in (groups if first else groups[::-1])]
        matrix_shape = (*(value.shape[i] for i in batch), *merged)
        names.append(writer.reshape(name, shape, matrix_shape))
        free.append(groups[0])
    product = writer.graph.op("MatMul", *names)
    batch_sizes = tuple(a.shape[i] for i in batches[0])
    return writer.reshape(product, (*batch_sizes, *map(math.prod, free)), out.shape)


def _convolution(writer: GraphWriter, operation: Operation) -> str:
    x, kernel = operation.inputs
    params, numbers = operation.params, operation.params["dimension_numbers"]
    if any(step != 1 for step in (*params["lhs_dilation"], *params["window_strides"])):
        raise UnsupportedOperationError("conv_general_dilated with strides or input dilation")
    padding = [n for side in zip(*params["padding"], strict=True) for n in side]
    name = writer.graph.op(
        "Conv",
        writer.transpose(writer.full(x), numbers.lhs_spec),
        writer.transpose(writer.full(kernel), numbers.rhs_spec),
        group=params["feature_group_count"],
        dilations=list(params["rhs_dilation"]),
        pads=padding,
    )
    return writer.transpose(name, np.argsort(numbers.out_spec).tolist())


OPERATORS: dict[str, Operator] = {
    **ELEMENTWISE,
    **FUSED,
    "reshape": _reshape,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast_in_dim,
    "squeeze": _squeeze,
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "cumsum": _cumulative_sum,
    "iota": _iota,
    "dim_as_value": _size_as_value,
    "concatenate": _concatenate,
    "slice": _slice,
    "split": _split,
    "pad": _pad,
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
    "take": _take,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
}
