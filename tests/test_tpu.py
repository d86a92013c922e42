"""Programs compiled by the TPU's own compiler, for machines that are not there."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import ENCODERS, ISOLATED, TINIES

from experiments.benchmarks import shapes

pytest.importorskip("libtpu", reason='libtpu is not installed (".[tpu-aot]")')

from experiments.benchmarks import tpu_programs
from sweet_jax.inference.engine_jax import JaxEngine
from sweet_jax.inference.network import Network

pytestmark = pytest.mark.slow
TOPOLOGIES = ("v5e:2x2", "v6e:2x2")
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


def check_update(each: list[tpu_programs.Compiled], shape: shapes.Shape) -> None:
    """Asserts that rows of a batch exchange gradients, updated parameters and a step's metrics.

    Gradients are summed: those of matrices, whose moments are spread, to each device's part, and
    the parameters are gathered from the parts. Of a table the part's columns of the hidden states'
    gradients are exchanged, and the tokens gathered, in place of the table's gradient.
    """
    held, tokens = sizes(shape), SIZE.batch * SIZE.length
    check_reduced(each, shape)
    gathered = [count for found in each for count in found.gathered]
    assert set(gathered) <= {*held, tokens}
    assert 0.7 * sum(held) <= sum(gathered) <= 1.1 * sum(held) + tokens
    for found in each:
        width = max(shape.config.hidden_size, getattr(shape.config, "embedding_size", 0))
        assert all(count <= tokens * width for count in found.transposed)
        # No more than for gradients that every device has whole, in float32.
        assert found.sent <= 2 * 4 * sum(held)


def check_reduced(each: list[tpu_programs.Compiled], shape: shapes.Shape) -> None:
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
    assert {count for count in counts if count > len(shape.exits)} <= known
    # Small sums are scattered part by part, one device after the other, on two devices or four.
    passed = [count for found in each for count in found.passed]
    assert set(passed) <= {count // devices for count in known for devices in (2, _DEVICES)}
    # A parameter that two products read, as ModernBERT's of the first token, has two gradients;
    # of the largest table, the hidden states' gradients may be exchanged instead, and where parts
    # are passed on, a device keeps its own: half of a sum, on two devices.
    least = 0.7 * (sum(sizes(shape)) - max(sizes(shape)))
    assert least <= sum(counts) + sum(passed) <= 1.6 * sum(sizes(shape))


def narrow_products(text: str) -> float:
    """The share of the matrix products whose result is bfloat16."""
    products = re.findall(r"= (\w+)\[[^=]*? (?:convolution|dot)\(", text)
    return products.count("bf16") / len(products)


def check_step(found: tpu_programs.Compiled, shape: shapes.Shape, replicas: int, dtype) -> None:
    held = sum(sizes(shape))
    # Parameters, and of the two moments of AdamW a part; arrays are laid out in tiles, up to 8
    # times as wide.
    assert (4 + 8 * replicas / _DEVICES) * held <= found.arguments <= 8 * 12 * held
    assert found.temporaries < 16 * 2**20
    if replicas < _DEVICES:
        check_update([found], shape)
    else:
        assert found.collectives == 0
    # Replicas share nothing but the step's metrics, which every host reads.
    assert all(count <= replicas * len(shape.exits) for count in found.exchanged)
    narrow = narrow_products(found.text)
    assert narrow > 0.9 if dtype == "bfloat16" else narrow < 0.1


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(
    ("method", "replicas", "dtype"),
    [("sweet", 2, "bfloat16"), ("early_exit", 1, "float32"), ("multi_model", 4, "bfloat16")],
)
def test_a_step_of_each_method(topology, method, replicas, dtype):
    shape = shape_of("bert", (2,) if method == "multi_model" else (1, 2))
    devices = tpu_programs.devices_of(topology)
    found = tpu_programs.compile_training_step(shape, method, SIZE, dtype, devices, replicas)
    check_step(found, shape, replicas, dtype)


@pytest.mark.parametrize("kind", [kind for kind in ENCODERS if kind != "bert"])
def test_a_step_of_every_family(kind):
    shape = shape_of(kind)
    devices = tpu_programs.devices_of(TOPOLOGIES[ENCODERS.index(kind) % 2])
    method = "sweet" if kind in ISOLATED else "early_exit"
    found = tpu_programs.compile_training_step(shape, method, SIZE, "bfloat16", devices)
    check_step(found, shape, 1, "bfloat16")


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_groups_of_segment_parallel_training(topology):
    shape = shape_of("bert")
    devices = tpu_programs.devices_of(topology)
    found = tpu_programs.compile_segment_groups(shape, SIZE, "bfloat16", devices)
    assert len(found) == 2
    # Each group sums its own gradients; together they are all of the model's.
    check_update(found, shape)
    for each in found:
        assert each.exchanged == []
        assert narrow_products(each.text) > 0.9


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_evaluation_and_the_probe_s_features(topology, features):
    shape = shape_of("bert")
    devices = tpu_programs.devices_of(topology)
    found = tpu_programs.compile_evaluation_step(
        shape, SIZE, "bfloat16", devices, features=features
    )
    # What every host reads of all rows: logits, and the vectors that the classifiers read.
    each = len(shape.exits) * SIZE.batch
    outputs = each * shapes.CLASSES + (each * shape.config.hidden_size if features else 0)
    exchanged = [*found.reduced, *found.gathered, *found.transposed, *found.passed]
    assert 0 < sum(exchanged) <= outputs
    assert found.exchanged == []
    assert found.temporaries < 2**20
    assert narrow_products(found.text) > 0.9


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_stage_of_serving(topology):
    shape = shape_of("bert", (1, 2, 3))
    params = jax.tree.map(lambda x: np.asarray(x, jax.numpy.bfloat16), parameters(shape))
    graphdef = nnx.split(nnx.eval_shape(lambda: shape.model(0, "bfloat16")))[0]
    engine = JaxEngine([Network(shape.exits, graphdef, params)], 0)
    device, slots = tpu_programs.devices_of(topology)[0], 8
    for stage in engine.stages():
        used = slots if stage.uses_states else 0
        program = engine.lower(stage, 4, SIZE.length, used, device).compile()
        text, memory = program.as_text(), program.memory_analysis()
        assert not list(tpu_programs.collectives(text))
        assert narrow_products(text) > 0.9
        assert memory.temp_size_in_bytes < 4 * 2**20
        # The hidden states of a stage are written in place.
        states = 2 * slots * SIZE.length * shape.config.hidden_size
        assert (memory.alias_size_in_bytes >= states) == stage.writes_states
