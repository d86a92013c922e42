"""Training steps compiled by the TPU's own compiler, for machines that are not there."""

import dataclasses
import re

import jax
import pytest

from experiments.benchmarks import shapes

pytest.importorskip("libtpu", reason='libtpu is not installed (".[tpu-aot]")')

from experiments.benchmarks import tpu_aot

pytestmark = pytest.mark.slow
_NONE = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.mark.parametrize(
    ("topology", "method", "replicas", "dtype"),
    [("v5e:2x2", "sweet", 2, "bfloat16"), ("v6e:2x2", "early_exit", 1, "float32")],
)
def test_a_step_for_four_chips(topology, method, replicas, dtype):
    tiny = shapes.SHAPES["tiny"]  # without dropout, whose generator is a third of compiling
    shape = tiny._replace(config=dataclasses.replace(tiny.config, **_NONE))
    devices = tpu_aot.devices_of(topology)
    size = shapes.Size(8, 16)
    found = tpu_aot.compile_training_step(shape, method, size, dtype, devices, replicas)
    numbers = sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: _params(shape))))
    # Parameters and the two moments of AdamW; tables are laid out in tiles, a few rows too wide.
    assert 12 * numbers <= found.arguments <= 1.3 * 12 * numbers * (128 / 32)
    assert found.temporaries < found.arguments
    assert found.reductions >= 1  # of the gradients, over the rows of a batch
    # Replicas share nothing but the step's metrics, which every host reads.
    assert all(count <= replicas * len(shape.exits) for count in found.exchanged)
    products = re.findall(r"= (\w+)\[[^=]*? (?:convolution|dot)\(", found.text)
    narrow = products.count("bf16") / len(products)
    assert narrow > 0.9 if dtype == "bfloat16" else narrow < 0.1


def test_groups_of_devices_are_read_from_the_compiler_s_text():
    line = (
        "%a = (f32[2,3]{1,0}, s32[]) all-reduce(%x), replica_groups=mesh['axis_0'=2,'axis_1'=2] {"
    )
    (rows,) = tpu_aot.collectives(line + "'axis_1'}, x")
    assert rows == ({frozenset({0, 1}), frozenset({2, 3})}, 6)
    (across,) = tpu_aot.collectives(line + "'axis_0'}, x")
    assert across[0] == {frozenset({0, 2}), frozenset({1, 3})}
    (pairs,) = tpu_aot.collectives(
        "%a = f32[4]{0} collective-permute(%x), source_target_pairs={{0,1}}"
    )
    assert pairs[0] == {frozenset({-1})}  # no group of a mesh


def _params(shape):
    from flax import nnx

    return nnx.to_pure_dict(nnx.split(shape.model())[1])
