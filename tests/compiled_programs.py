"""Checks programs that were compiled for absent TPUs and GPUs: exchange, memory, products."""

import dataclasses
import re

import jax
from flax import nnx
from tiny import TINIES

from experiments.benchmarks import shapes
from experiments.benchmarks.tpu_programs import Compiled

SIZE = shapes.Size(16, 32)
_DEVICES = 4
_NONE = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def shape_of(kind: str, exits=(1, 2)) -> shapes.Shape:
    """A tiny encoder without dropout, whose generator is a third of compiling."""
    sizes = {"num_hidden_layers": exits[-1], "max_position_embeddings": SIZE.length + 2}
    return shapes.Shape(dataclasses.replace(TINIES[kind], **sizes, **_NONE), exits)


def parameters(shape: shapes.Shape):
    return nnx.to_pure_dict(nnx.split(shape.model())[1])


def sizes(shape: shapes.Shape) -> list[int]:
    """Returns the elements of all parameters; of a table of positions those that are read."""
    return [x.size for x in jax.tree.leaves(jax.eval_shape(lambda: parameters(shape)))]


def check_update(each: list[Compiled], shape: shapes.Shape, *, joined: bool = False) -> None:
    """Asserts that rows of a batch exchange gradients, updated parameters and a step's metrics.

    Gradients are summed: those of matrices, whose moments are spread, to each device's part, and
    the parameters are gathered from the parts. Of a table the part's columns of the hidden states'
    gradients are exchanged, and the tokens gathered, in place of the table's gradient.

    joined: XLA for GPUs puts several arrays into one, so that only their sum is known.
    """
    held, tokens = sizes(shape), SIZE.batch * SIZE.length
    check_reduced(each, shape, joined=joined)
    gathered = [count for found in each for count in found.gathered]
    assert joined or set(gathered) <= {*held, tokens}
    assert 0.7 * sum(held) <= sum(gathered) <= 1.1 * sum(held) + tokens
    for found in each:
        width = max(shape.config.hidden_size, getattr(shape.config, "embedding_size", 0))
        assert all(count <= tokens * width for count in found.transposed)
        # No more than for gradients that every device has whole, in float32.
        assert found.sent <= 2 * 4 * sum(held)


def check_reduced(each: list[Compiled], shape: shapes.Shape, *, joined: bool = False) -> None:
    """Asserts that what is summed over the rows of a batch are gradients, and a step's metrics."""
    hidden = shape.config.hidden_size
    width = getattr(shape.config, "embedding_size", 0) or hidden
    # Of a table of positions the rows that are read; DeBERTa's distances go through a projection.
    # A scatter over a table's columns compares 128 flags first.
    known = {*sizes(shape), SIZE.length * width, 2 * SIZE.length * hidden, 128}
    # Projections of DeBERTa's distances are the same for all rows: the compiler computes them in
    # parts as well, and sums these.
    distances = {2 * SIZE.length + 1, 2 * getattr(shape.config, "position_buckets", 0) - 1}
    projected = (
        {rows * hidden for rows in distances} if hasattr(shape.config, "pos_att_type") else set()
    )
    reduced = [count for found in each for count in found.reduced]
    counts = [count for count in reduced if count not in projected]
    assert joined or {count for count in counts if count > len(shape.exits)} <= known
    # Small sums are scattered part by part, one device after the other, on two devices or four.
    passed = [count for found in each for count in found.passed]
    assert set(passed) <= {count // devices for count in known for devices in (2, _DEVICES)}
    # A parameter that two products read, as ModernBERT's of the first token, has two gradients;
    # of the largest table, the hidden states' gradients may be exchanged instead, and where parts
    # are passed on, a device keeps its own: half of a sum, on two devices.
    least = 0.7 * (sum(sizes(shape)) - max(sizes(shape)))
    assert least <= sum(counts) + sum(passed) <= 1.6 * sum(sizes(shape))


def product_types(text: str) -> list[str]:
    """The types of the results of all matrix products, as "bf16" or "f32"."""
    return re.findall(r"= (\w+)\[[^=]*? (?:convolution|dot)\(", text)


def narrow_products(text: str) -> float:
    """The share of the matrix products whose result is bfloat16."""
    products = product_types(text)
    return products.count("bf16") / len(products)


def check_step(
    found: Compiled, shape: shapes.Shape, replicas: int, dtype: str, *, joined: bool = False
) -> None:
    """Asserts what a training step exchanges, how much memory it takes, and its products' type."""
    held = sum(sizes(shape))
    # Parameters, and of the two moments of AdamW a part; arrays are laid out in tiles, up to 8
    # times as wide.
    assert (4 + 8 * replicas / _DEVICES) * held <= found.arguments <= 8 * 12 * held
    assert found.temporaries < 16 * 2**20
    if replicas < _DEVICES:
        check_update([found], shape, joined=joined)
    else:
        assert found.collectives == 0
    # Replicas share nothing but the step's metrics, which every host reads.
    assert all(count <= replicas * len(shape.exits) for count in found.exchanged)
    narrow = narrow_products(found.text)
    assert narrow > 0.9 if dtype == "bfloat16" else narrow < 0.1
