"""Training steps compiled by XLA for NVIDIA GPUs that are not there."""

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
def test_a_step_of_each_method(method, replicas, dtype):
    shape = shape_of("bert", (2,) if method == "multi_model" else (1, 2))
    devices = cuda_programs.describe_devices(4)
    found = tpu_programs.compile_training_step(shape, method, SIZE, dtype, devices, replicas)
    check_step(found, shape, replicas, dtype, joined=True)


def test_groups_of_segment_parallel_training():
    shape = shape_of("bert")
    devices = cuda_programs.describe_devices(4)
    found = tpu_programs.compile_segment_groups(shape, SIZE, "bfloat16", devices)
    check_update(found, shape, joined=True)
    for each in found:
        assert each.exchanged == []
        assert narrow_products(each.text) > 0.9
