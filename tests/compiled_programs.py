"""Checks what programs compiled for absent TPUs and GPUs exchange, hold and multiply."""

import dataclasses
import re

import jax
from flax import nnx
from tiny import TINIES

from experiments.benchmarks import shapes
from experiments.benchmarks.tpu_programs import Compiled

SIZE = shapes.Size(16, 32)
_DEVICES = 4
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def shape_of(kind: str, exits=(1, 2)) -> shapes.Shape:
    """Returns a tiny encoder with only the positions that SIZE needs.

    It has no dropout, whose generator takes a third of compiling.
    """
    sizes = {"num_hidden_layers": exits[-1], "max_position_embeddings": SIZE.length + 2}
    return shapes.Shape(dataclasses.replace(TINIES[kind], **sizes, **_NO_DROPOUT), exits)


def parameters(shape: shapes.Shape):
    """Returns the initialized parameters as a pure dict."""
    return nnx.to_pure_dict(nnx.split(shape.model())[1])


def sizes(shape: shapes.Shape) -> list[int]:
    """Returns the number of elements of every parameter array."""
    return [x.size for x in jax.tree.leaves(jax.eval_shape(lambda: parameters(shape)))]


def check_update(programs: list[Compiled], shape: shapes.Shape, *, joined: bool = False) -> None:
    """Asserts that devices exchange gradients, updated parameters and a step's metrics.

    Gradients are summed. Those of matrices, whose moments are sharded, are summed to each device's
    part, and the parameters are gathered from the parts. Instead of the gradient of an embedding
    table, the columns of the part are exchanged from the hidden states' gradients, and the tokens
    are gathered.

    joined: XLA for GPUs joins several arrays into one, so that only the sum of their sizes is
    known.
    """
    parameter_sizes, tokens = sizes(shape), SIZE.batch * SIZE.length
    check_reduced(programs, shape, joined=joined)
    gathered = [count for program in programs for count in program.gathered]
    assert joined or set(gathered) <= {*parameter_sizes, tokens}
    assert 0.7 * sum(parameter_sizes) <= sum(gathered) <= 1.1 * sum(parameter_sizes) + tokens
    for program in programs:
        width = max(shape.config.hidden_size, getattr(shape.config, "embedding_size", 0))
        assert all(count <= tokens * width for count in program.transposed)
        # At most the bytes of summing all gradients on every device, in float32.
        assert program.sent <= 2 * 4 * sum(parameter_sizes)


def check_reduced(programs: list[Compiled], shape: shapes.Shape, *, joined: bool = False) -> None:
    """Asserts that the arrays summed over devices are gradients and a step's metrics."""
    hidden = shape.config.hidden_size
    width = getattr(shape.config, "embedding_size", 0) or hidden
    # Of a table of positions, only the rows that are read have a gradient; DeBERTa's distances are
    # projected. A scatter over a table's columns first compares 128 flags.
    expected = {*sizes(shape), SIZE.length * width, 2 * SIZE.length * hidden, 128}
    # Projections of DeBERTa's distances are the same for all rows: the compiler computes parts of
    # them on each device and sums the parts.
    distances = {2 * SIZE.length + 1, 2 * getattr(shape.config, "position_buckets", 0) - 1}
    projected = (
        {rows * hidden for rows in distances} if hasattr(shape.config, "pos_att_type") else set()
    )
    reduced = [count for program in programs for count in program.reduced]
    counts = [count for count in reduced if count not in projected]
    assert joined or {count for count in counts if count > len(shape.exits)} <= expected
    # Small sums are scattered part by part from device to device, among two devices or four.
    passed = [count for program in programs for count in program.passed]
    assert set(passed) <= {count // devices for count in expected for devices in (2, _DEVICES)}
    # A parameter that two products read, such as ModernBERT's for the first token, has two
    # gradients. Instead of the largest table's, the hidden states' gradients may be exchanged, and
    # a device that passes parts on keeps its own: half of a sum, among two devices.
    minimum = 0.7 * (sum(sizes(shape)) - max(sizes(shape)))
    assert minimum <= sum(counts) + sum(passed) <= 1.6 * sum(sizes(shape))


def product_types(text: str) -> list[str]:
    """Returns the types of the results of all matrix products, such as "bf16" or "f32"."""
    return re.findall(r"= (\w+)\[[^=]*? (?:convolution|dot)\(", text)


def narrow_products(text: str) -> float:
    """Returns the share of matrix products whose result is bfloat16."""
    products = product_types(text)
    return products.count("bf16") / len(products)


def check_step(
    program: Compiled, shape: shapes.Shape, replicas: int, dtype: str, *, joined: bool = False
) -> None:
    """Asserts what a training step exchanges, its memory, and the type of its matrix products."""
    size = sum(sizes(shape))
    # The parameters and a part of AdamW's two moments; tiled layouts take up to 8 times as much.
    assert (4 + 8 * replicas / _DEVICES) * size <= program.arguments <= 8 * 12 * size
    assert program.temporaries < 16 * 2**20
    if replicas < _DEVICES:
        check_update([program], shape, joined=joined)
    else:
        assert program.collectives == 0
    # Replicas exchange only the step's metrics, which every host reads.
    assert all(count <= replicas * len(shape.exits) for count in program.exchanged)
    narrow = narrow_products(program.text)
    assert narrow > 0.9 if dtype == "bfloat16" else narrow < 0.1
