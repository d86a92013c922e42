"""How what is written for one replica runs for many: vmap, and a mesh ("replica", "data").

Shape letters: R replica, B batch.
"""

import functools
import logging
import math
from collections.abc import Callable

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

log = logging.getLogger(__name__)


def make_mesh(replicas: int, batch_size: int) -> Mesh:
    """A mesh whose "replica" axis divides R and whose "data" axis divides B.

    Replicas are spread first: they need no communication. Devices that fit neither stay idle.
    """
    devices = jax.devices()
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


def by_replica(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays [R, ...]: state and metrics."""
    return NamedSharding(mesh, PartitionSpec("replica"))


def by_row(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays [R, B, ...]: batches."""
    return NamedSharding(mesh, PartitionSpec("replica", "data"))


def over_replicas(function: Callable, replicas: int) -> Callable:
    """`function` of one replica, over the leading axis R of all its arguments and results.

    A single replica is not batched: on a CPU, batched products over an axis of size 1 make a
    training step a tenth slower.
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
