"""The ONNX nodes of the operations that `onnx_fusions` makes: linear layers, norms and attention.

Shape letters: B batch, L length, Q first tokens, H hidden, A attention heads, D = H / A head size.
"""

import numpy as np

from sweet_jax.inference.onnx_graph import MICROSOFT
from sweet_jax.inference.onnx_trace import Operation
from sweet_jax.inference.onnx_writer import GraphWriter, Operator

_HIDDEN = -1e30  # added to scores outside a window; larger than the score of a padding token


def _linear(writer: GraphWriter, operation: Operation) -> str:
    x, kernel, *bias = operation.inputs
    assert kernel.constant is not None
    exact = not kernel.name.startswith("encoder/")  # the heads
    name = writer.graph.matmul(writer.full(x), kernel.constant, kernel.name, exact=exact)
    return writer.graph.op("Add", name, writer.name(bias[0])) if bias else name


def _softmax(writer: GraphWriter, operation: Operation) -> str:
    scores, mask = operation.inputs
    least = writer.graph.constant(np.finfo(np.float32).min, np.float32)
    hidden = writer.graph.op("Where", writer.name(mask), writer.full(scores), least)
    return writer.graph.op("Softmax", hidden, axis=-1)


def _layer_norm(writer: GraphWriter, operation: Operation) -> str:
    x, *weights = operation.inputs
    epsilon = operation.params["epsilon"]
    names = [writer.full(x), *map(writer.name, weights)]
    return writer.graph.op("LayerNormalization", *names, epsilon=epsilon)


def _attention(writer: GraphWriter, operation: Operation) -> str:
    """Adds MultiHeadAttention, whose inputs and output hold all heads concatenated, [B, L, H]."""
    (q, k, v, *others), out = operation.inputs, operation.outputs[0]
    graph, windows = writer.graph, operation.params["windows"]
    batch, heads, count, size = out.shape
    sides = []
    for value in (q, k, v):
        turned = writer.transpose(writer.full(value), (0, 2, 1, 3))  # [B, Q or L, A, D]
        wide = (batch, value.shape[2], heads * size)
        sides.append(writer.reshape(turned, (batch, value.shape[2], heads, size), wide))
    hidden, read = (graph.constant(value, np.float32) for value in (_HIDDEN, 0))
    terms = [graph.op("Where", writer.name(x), read, hidden) for x in others[:windows]]
    terms += [writer.name(x) for x in others[windows:]]
    shapes = [writer.shape(x) for x in others]
    bias = terms[0] if terms else ""
    for term in terms[1:]:
        bias = graph.op("Add", bias, term)
    projection_bias = operation.params["bias"]
    added = "" if projection_bias is None else writer.name(projection_bias)
    lengths = (count, k.shape[2])
    if terms and not any(tuple(shape[2:]) == lengths for shape in shapes):
        bias = graph.op("Expand", bias, graph.shape((1, 1, *lengths)))
    name = graph.op(
        "MultiHeadAttention",
        *(*sides, added, writer.tokens, bias),
        domain=MICROSOFT,
        num_heads=heads,
        scale=operation.params["scale"],
        mask_filter_value=float(np.finfo(np.float32).min),
    )
    split = writer.reshape(name, (batch, count, heads * size), (batch, count, heads, size))
    return writer.transpose(split, (0, 2, 1, 3))


FUSED: dict[str, Operator] = {
    "linear": _linear,
    "masked_softmax": _softmax,
    "layer_norm": _layer_norm,
    "attention": _attention,
}
