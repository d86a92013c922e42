"""Describes NVIDIA GPUs that are not present, so that XLA can compile programs for them.

XLA's GPU compiler accepts a description of a device instead of the device
(jax.experimental.topologies). Nothing runs, and kernels are not chosen by timing them. Needs
`pip install "jax[cuda13]"`, whose ptxas and libdevice it calls (set CUDA_ROOT if they are
elsewhere).
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from typing import Any

from jax.experimental import topologies

# XLA's GpuTargetConfigProto as text: compute capability 9.0, 132 multiprocessors, 80 GB.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def describe_devices(count: int) -> list[Any]:
    """Returns descriptions of `count` H100s, each in a process of its own."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=_H100, topology=f"1x{count}x1"
    )
    return list(topology.devices)
