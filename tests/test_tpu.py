"""Tests of programs that the TPU compiler makes for machines that are not present."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_programs import (
    SIZE,
    check_step,
    check_update,
    narrow_products,
    parameters,
    product_types,
    shape_of,
)
from flax import nnx
from tiny import ENCODERS, ISOLATED

from experiments.benchmarks import shapes

pytest.importorskip("libtpu", reason='libtpu is not installed (".[tpu-aot]")')

from experiments.benchmarks import tpu_collectives, tpu_programs
from sweet_jax.inference.engine_jax import JaxEngine
from sweet_jax.inference.network import Network

pytestmark = pytest.mark.slow
TOPOLOGIES = ("v5e:2x2", "v6e:2x2")


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(
    ("method", "replicas", "dtype"),
    [("sweet", 2, "bfloat16"), ("early_exit", 1, "float32"), ("multi_model", 4, "bfloat16")],
)
def test_training_step_program_of_each_method(topology, method, replicas, dtype):
    shape = shape_of("bert", (2,) if method == "multi_model" else (1, 2))
    devices = tpu_programs.describe_devices(topology)
    compiled = tpu_programs.compile_training_step(shape, method, SIZE, dtype, devices, replicas)
    check_step(compiled, shape, replicas, dtype)


@pytest.mark.parametrize(
    ("topology", "cores"), [("v4:2x2x1", 2), ("v5p:2x2x1", 2), ("v5e:2x2", 1), ("v6e:2x2", 1)]
)
def test_described_device_is_a_chip_with_all_its_cores(topology, cores):
    """Bounds are computed from published peaks, which are those of a chip with all its cores."""
    devices = tpu_programs.describe_devices(topology)
    assert len(devices) == len({tuple(device.coords) for device in devices}) == 4
    assert {device.num_cores for device in devices} == {cores}


@pytest.mark.parametrize("kind", [kind for kind in ENCODERS if kind != "bert"])
def test_training_step_program_of_each_encoder_family(kind):
    shape = shape_of(kind)
    devices = tpu_programs.describe_devices(TOPOLOGIES[ENCODERS.index(kind) % 2])
    method = "sweet" if kind in ISOLATED else "early_exit"
    compiled = tpu_programs.compile_training_step(shape, method, SIZE, "bfloat16", devices)
    check_step(compiled, shape, 1, "bfloat16")


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_segment_group_programs_sum_only_their_own_gradients(topology):
    shape = shape_of("bert")
    devices = tpu_programs.describe_devices(topology)
    groups = tpu_programs.compile_segment_groups(shape, SIZE, "bfloat16", devices)
    assert len(groups) == 2
    # Each group sums its own gradients, and together they sum all of the model's.
    check_update(groups, shape)
    for group in groups:
        assert group.exchanged == []
        assert narrow_products(group.text) > 0.9


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_evaluation_program_exchanges_only_its_outputs(topology, features):
    shape = shape_of("bert")
    devices = tpu_programs.describe_devices(topology)
    compiled = tpu_programs.compile_evaluation_step(
        shape, SIZE, "bfloat16", devices, features=features
    )
    # Every host reads the logits of all rows and, if requested, the inputs of the classifiers.
    vectors = len(shape.exits) * SIZE.batch
    outputs = vectors * shapes.CLASSES + (vectors * shape.config.hidden_size if features else 0)
    exchanged = [*compiled.reduced, *compiled.gathered, *compiled.transposed, *compiled.passed]
    assert 0 < sum(exchanged) <= outputs
    assert compiled.exchanged == []
    assert compiled.temporaries < 2**20
    assert narrow_products(compiled.text) > 0.9


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_inference_stage_programs_work_in_place_without_collectives(topology):
    shape = shape_of("bert", (1, 2, 3))
    params = parameters(shape)
    params["encoder"] = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), params["encoder"])
    graphdef = nnx.split(nnx.eval_shape(lambda: shape.model(0, "bfloat16")))[0]
    engine = JaxEngine([Network(shape.exits, graphdef, params)], 0)
    device, slots = tpu_programs.describe_devices(topology)[0], 8
    for stage in engine.stages():
        used = slots if stage.uses_states else 0
        program = engine.lower(stage, 4, SIZE.length, used, device).compile()
        text, memory = program.as_text(), program.memory_analysis()
        assert not list(tpu_collectives.collectives(text))
        assert product_types(text).count("f32") == 1  # the classifier's
        assert memory.temp_size_in_bytes < 4 * 2**20
        # The hidden states of a stage are written in place.
        states = 2 * slots * SIZE.length * shape.config.hidden_size
        assert (memory.alias_size_in_bytes >= states) == stage.writes_states
