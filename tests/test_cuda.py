"""Training steps that XLA compiles for NVIDIA GPUs, on a machine that needs none."""

import importlib.util
import shutil

import pytest
from compiled_programs import SIZE, check_step, check_update, narrow_products, shape_of

from experiments.benchmarks import cuda_programs, tpu_programs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not importlib.util.find_spec("jax_cuda13_plugin") or not shutil.which("ptxas"),
        reason='no CUDA compiler (pip install "jax[cuda13]", ptxas in PATH)',
    ),
]


@pytest.mark.parametrize(
    ("method", "replicas", "dtype"),
    [("sweet", 2, "bfloat16"), ("early_exit", 1, "float32"), ("multi_model", 4, "bfloat16")],
)
def test_training_step_of_each_method_compiles_with_expected_exchange(method, replicas, dtype):
    shape = shape_of("bert", (2,) if method == "multi_model" else (1, 2))
    devices = cuda_programs.describe_devices(4)
    compiled = tpu_programs.compile_training_step(shape, method, SIZE, dtype, devices, replicas)
    check_step(compiled, shape, replicas, dtype, joined=True)


def test_segment_groups_compile_without_exchange_between_groups():
    shape = shape_of("bert")
    devices = cuda_programs.describe_devices(4)
    groups = tpu_programs.compile_segment_groups(shape, SIZE, "bfloat16", devices)
    check_update(groups, shape, joined=True)
    for group in groups:
        assert group.exchanged == []
        assert narrow_products(group.text) > 0.9
