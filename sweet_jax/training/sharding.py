"""How what is written for one replica runs for many: vmap, and a mesh ("replica", "data").

Shape letters: R replica, B batch.
"""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

log = logging.getLogger(__name__)


def make_mesh(replicas: int, batch_size: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh whose "replica" axis divides R and whose "data" axis divides B; of all devices.

    Replicas are spread first: they need no communication. Devices that fit neither stay idle.
    """
    devices = devices or jax.devices()
    spread = math.gcd(replicas, len(devices))
    data = math.gcd(batch_size, len(devices) // spread)
    if spread * data < len(devices):
        log.warning(
            "%d of %d devices are used: make batch_size (%d) or the number of replicas (%d) a "
            "multiple of the devices to use all",
            spread * data,
            len(devices),
            batch_size,
            replicas,
        )
    # Auto axes: under Explicit ones, jax's default, embedding look-ups raise.
    return jax.make_mesh(
        (spread, data),
        ("replica", "data"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices[: spread * data],
    )


def by_replica(mesh: Mesh, replicas: int = 2) -> NamedSharding:
    """Sharding of arrays [R, ...], state and metrics; of a single replica's, without the axis."""
    return NamedSharding(mesh, PartitionSpec("replica") if replicas > 1 else PartitionSpec())


def by_row(mesh: Mesh, replicas: int = 2) -> NamedSharding:
    """Sharding of batches [R, B, ...]; of a single replica's, [B, ...]."""
    axes = ("replica", "data") if replicas > 1 else ("data",)
    return NamedSharding(mesh, PartitionSpec(*axes))


def without_axis(tree: Any, replicas: int) -> Any:
    """Arrays [R, ...], or those of a single replica without the axis."""
    return tree if replicas > 1 else jax.tree.map(lambda x: x[0], tree)


def over_replicas(function: Callable, replicas: int) -> Callable:
    """`function` of one replica, over the leading axis R of all its arguments and results.

    A single replica is not batched: on a CPU, products batched over an axis of size 1 are slower.
    """
    if replicas > 1:
        return jax.vmap(function)

    def single(*args):
        result = function(*jax.tree.map(lambda x: x[0], args))
        return jax.tree.map(lambda x: x[None], result)

    return single


def traced_at_most(function: Callable, limit: int) -> Callable:
    """`function`, with an AssertionError at the trace after `limit`: a promise of compilations.

    chex.assert_max_traces counts by call stack, so that Multi-Model's second model would go on
    from the count of its first.
    """
    count = 0

    @functools.wraps(function)
    def counted(*args):
        nonlocal count
        count += 1
        assert count <= limit, f"{function.__name__} was traced more than {limit} times"
        return function(*args)

    return counted
