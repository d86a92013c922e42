"""Fuses groups of operations that ONNX Runtime has one operator for: attention, GELU, and others.

Each fusion inspects an operation and the operations that computed its inputs. It returns the
operations that replace it, or None if the group does not match. Operations that are then no longer
used are removed.

Shape letters: B batch, L length, Q first tokens, H hidden, A attention heads, D = H / A head size,
I and O input and output features.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from sweet_jax.inference.onnx_trace import Operation, Program, Value, as_constant, used

_SCORES = (([3], [3]), ([0, 1], [0, 1]))  # dot_general of queries and keys [B, A, Q or L, D]
_CONTEXT = (([3], [2]), ([0, 1], [0, 1]))  # of weights [B, A, Q, L] and values [B, A, L, D]


class Fuser:
    """Replaces operations of a program, one after the other.

    Args:
      program: program from `onnx_trace.trace`.
      mask: its input bool [B, L], True for tokens and False for padding.

    """

    def __init__(self, program: Program, mask: Value):
        self.program, self.mask = program, mask
        self.made: dict[Value, Operation] = {}
        self.uses = Counter(value for op in program.operations for value in op.inputs)
        self.uses.update(program.outputs)

    def run(self) -> Program:
        """Returns the program with its groups replaced."""
        operations: list[Operation] = []
        for operation in self.program.operations:
            fuse = FUSIONS.get(operation.kind)
            replacements = (fuse(self, operation) if fuse else None) or [operation]
            operations += replacements
            for replacement in replacements:
                self.made |= dict.fromkeys(replacement.outputs, replacement)
        return self.program._replace(operations=used(operations, self.program.outputs))

    def inputs(self, value: Any, *kinds: str, alone: bool = False) -> tuple[Any, Any, Any]:
        """Returns the first three inputs of the operation that computed a value.

        Missing inputs are None, and all three are None if the operation does not match.

        Args:
          value: the value.
          *kinds: kinds of operation that match.
          alone: whether to require that the value is used only once.

        """
        op = self.made.get(value)
        if op is None or op.kind not in kinds or (alone and self.uses[value] > 1):
            return (None, None, None)
        first, second, third = (*op.inputs, None, None, None)[:3]
        return first, second, third


def fuse_product(fuser: Fuser, dot: Operation) -> list[Operation] | None:
    """Matches the product of [..., I] and a constant [I, O], or the last product of attention."""
    x, kernel = dot.inputs
    dimensions = _dimensions(dot)
    if dimensions == _CONTEXT:
        return fuse_attention(fuser, dot)
    if kernel.constant is None or dimensions != (([len(x.shape) - 1], [0]), ([], [])):
        return None
    return [Operation("linear", dot.inputs, dot.outputs, {})] if len(kernel.shape) == 2 else None


def _dimensions(dot: Operation) -> Any:
    return tuple(tuple(list(axes) for axes in pair) for pair in dot.params["dimension_numbers"])


def fuse_bias(fuser: Fuser, add: Operation) -> list[Operation] | None:
    """Fuses a linear operation and the addition of its bias [1, ..., O]."""
    out, bias = add.inputs
    x, kernel, existing = fuser.inputs(out, "linear", alone=True)
    if x is None or existing is not None or bias.constant is None:
        return None
    if bias.constant.size != out.shape[-1]:
        return None
    vector = as_constant(bias.constant.reshape(-1), bias.name)
    return [Operation("linear", (x, kernel, vector), add.outputs, {})]


def fuse_split(fuser: Fuser, split: Operation) -> list[Operation] | None:
    """Replaces a split of a linear operation's features by one linear operation for each part."""
    linear = fuser.made.get(split.inputs[0])
    if linear is None or linear.kind != "linear":
        return None
    if split.params["axis"] != len(split.inputs[0].shape) - 1:
        return None
    operations, start = [], 0
    for size, out in zip(split.params["sizes"], split.outputs, strict=True):
        weights = [
            as_constant(value.constant[..., start : start + size], f"{value.name}[{start}:]")
            for value in linear.inputs[1:]
            if value.constant is not None
        ]
        operations.append(Operation("linear", (linear.inputs[0], *weights), (out,), {}))
        start += size
    return operations


def fuse_norm(_: Fuser, norm: Operation) -> list[Operation]:
    """Keeps a norm as one operation; returns it with its epsilon.

    The residual addition before it keeps its own node: ONNX Runtime 1.32 computes
    SkipLayerNormalization in a loop over elements, which takes 4 times as long on a CPU as Add and
    LayerNormalization do (a tenth of a whole model's time in float32, a sixth in int8).
    """
    return [norm._replace(params={"epsilon": _epsilon(norm.params["jaxpr"].jaxpr)})]


def _epsilon(jaxpr: Any) -> float:
    """Returns the constant that `layers.layer_norm` adds to the variance."""
    rsqrt = next(equation for equation in jaxpr.eqns if equation.primitive.name == "rsqrt")
    addition = next(equation for equation in jaxpr.eqns if rsqrt.invars[0] in equation.outvars)
    return next(float(atom.val) for atom in addition.invars if hasattr(atom, "val"))


def fuse_attention(fuser: Fuser, dot: Operation) -> list[Operation] | None:
    """Fuses the scores, softmax and context of attention.

    The inputs of the fused operation are q, k, v, then windows (bool) and terms added to the
    scores, both broadcastable to [B, A, Q, L]. The bias [3H] of the three projections is a
    parameter, if they are plain linear operations with a bias.
    """
    weights, v = dot.inputs
    scores, mask, _ = fuser.inputs(weights, "masked_softmax", alone=True)
    if scores is None:
        return None
    terms: list[Value] = []
    products: list[Value] = []
    for term in _leaves(fuser, scores, "add"):
        op = fuser.made.get(term)
        product = op is not None and op.kind == "dot_general" and _dimensions(op) == _SCORES
        (products if product else terms).append(term)
    masks = [_unbroadcast(fuser, each) for each in _leaves(fuser, mask, "and")]
    windows = [each for each in masks if each is not fuser.mask]
    if len(products) != 1 or len(windows) == len(masks):
        return None
    q, k = fuser.made[products[0]].inputs
    unscaled, factor, _ = fuser.inputs(q, "mul", alone=True)
    scale = 1.0
    if factor is not None and factor.constant is not None and factor.shape == ():
        q, scale = unscaled, float(factor.constant)
    params: dict[str, Any] = {"scale": scale, "windows": len(windows), "bias": None}
    projections = [_without_bias(fuser, each) for each in (q, k, v)]
    before = [operation for each in projections if each is not None for operation in each[0]]
    if len(before) == 9:
        (q, k, v), biases = zip(*[each[1:] for each in projections if each], strict=True)
        params["bias"] = as_constant(np.concatenate(biases), "attention.bias")
    else:
        before = []
    attention = Operation("attention", (q, k, v, *windows, *terms), dot.outputs, params)
    return [*before, attention]


def _without_bias(fuser: Fuser, heads: Value) -> tuple[list[Operation], Value, np.ndarray] | None:
    """Returns the operations, output [B, A, L, D] and bias of a projection without its bias."""
    wide, _, _ = fuser.inputs(heads, "transpose", alone=True)
    flat, _, _ = fuser.inputs(wide, "reshape", alone=True)
    x, kernel, bias = fuser.inputs(flat, "linear", alone=True)
    if bias is None:
        return None
    values = [Value(each.shape, each.dtype) for each in (flat, wide, heads)]
    turn = fuser.made[heads]._replace(inputs=(values[1],), outputs=(values[2],))
    operations = [
        Operation("linear", (x, kernel), (values[0],), {}),
        Operation("reshape", (values[0],), (values[1],), {}),
        turn,
    ]
    return operations, values[2], bias.constant


def _leaves(fuser: Fuser, value: Value, kind: str) -> list[Value]:
    """Returns the terms of a sum (kind "add") or of a conjunction (kind "and")."""
    whole = value if kind == "add" else _unbroadcast(fuser, value)
    first, second, _ = fuser.inputs(whole, kind)
    if first is None:
        return [value]
    return [*_leaves(fuser, first, kind), *_leaves(fuser, second, kind)]


def _unbroadcast(fuser: Fuser, value: Value) -> Value:
    """Returns the mask [B, L] if the value is it broadcast to [B, 1, Q or 1, L]; else the value."""
    below, axes = value, list(range(len(value.shape)))
    while (op := fuser.made.get(below)) and op.kind == "broadcast_in_dim":
        below, axes = op.inputs[0], [axes[i] for i in op.params["broadcast_dimensions"]]
    return below if below is fuser.mask and axes == [0, 3] else value


def fuse_gelu(fuser: Fuser, product: Operation) -> list[Operation] | None:
    """Matches `layers.tanh_gelu`, which JAX traces as nine operations."""
    x, half = product.inputs
    _, wide, _ = fuser.inputs(half, "mul", alone=True)
    _, bent, _ = fuser.inputs(wide, "add", alone=True)
    scaled, _, _ = fuser.inputs(bent, "tanh", alone=True)
    _, inner, _ = fuser.inputs(scaled, "mul", alone=True)
    again, cubic, _ = fuser.inputs(inner, "add", alone=True)
    _, cube, _ = fuser.inputs(cubic, "mul", alone=True)
    root, _, _ = fuser.inputs(cube, "integer_pow", alone=True)
    if x is not root or x is not again:
        return None
    return [Operation("tanh_gelu", (x,), product.outputs, {})]


def fuse_gather(fuser: Fuser, gather: Operation) -> list[Operation] | None:
    """Matches a lookup of rows, and removes JAX's handling of negative indices."""
    operand, indices = gather.inputs
    numbers = gather.params["dimension_numbers"]
    if len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        return None
    if numbers.collapsed_slice_dims != numbers.start_index_map:
        return None
    (axis,), rank = numbers.start_index_map, len(indices.shape) - 1
    sizes = (*operand.shape[:axis], 1, *operand.shape[axis + 1 :])
    offsets = (*range(axis), *range(axis + rank, len(operand.shape) - 1 + rank))
    if numbers.offset_dims != offsets or gather.params["slice_sizes"] != sizes:
        return None
    below = fuser.inputs(indices, "broadcast_in_dim", "reshape")[0]
    numbers_of = indices if below is None or below.shape != indices.shape[:-1] else below
    negative, plain, _ = fuser.inputs(numbers_of, "select_n")
    if negative is not None and fuser.inputs(negative, "lt")[0] is plain:
        numbers_of = plain
    params = {"axis": axis, "column": numbers_of is indices}
    return [Operation("take", (operand, numbers_of), gather.outputs, params)]


FUSIONS: dict[str, Callable[[Fuser, Operation], list[Operation] | None]] = {
    "dot_general": fuse_product,
    "add": fuse_bias,
    "split": fuse_split,
    "layer_norm": fuse_norm,
    "mul": fuse_gelu,
    "gather": fuse_gather,
}
