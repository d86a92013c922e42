"""Meshes with the axes ("replica", "data"), and the transfer of arrays to and from their devices.

Shape letters: R replica, B batch.
"""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sweet_jax.data.batches import Tokens
from sweet_jax.data.padding import pad_rows, padded_length
from sweet_jax.errors import UserError
from sweet_jax.training.optimizer import map_moments

log = logging.getLogger(__name__)

# Matrices with fewer rows or columns, such as classifiers, are not worth the communication.
_LEAST_WIDTH = 8
# Key of the embeddings in a model's parameters. Their tables are split by columns: each device then
# looks up, and sums into its part of the gradient, only parts of hidden states, and these are far
# fewer than the rows of the table.
_EMBEDDINGS = jax.tree_util.DictKey("embeddings")


def make_mesh(replicas: int, batch_size: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh whose "replica" axis divides R and whose "data" axis divides B.

    Replicas are spread first because they need no communication. Devices that fit neither axis stay
    idle. Raises UserError if all devices of a process would be idle.

    Args:
      replicas: number of replicas, R.
      batch_size: number of rows in a batch, B.
      devices: devices to use; None means all.

    """
    devices = devices or jax.devices()
    spread = math.gcd(replicas, len(devices))
    data = math.gcd(batch_size, len(devices) // spread)
    used = devices[: spread * data]
    idle = {d.process_index for d in devices} - {d.process_index for d in used}
    if idle:
        raise UserError(
            f"with {replicas} replicas and batch_size {batch_size}, process {min(idle)} would be "
            "idle: make one of these a multiple of the number of devices, or start fewer processes"
        )
    # The axes are Auto because embedding lookups raise an error with Explicit ones, JAX's default.
    # jax.make_mesh is not used: it requires cuboids of a TPU slice, and may reorder the devices.
    return Mesh(
        np.asarray(used).reshape(spread, data),
        ("replica", "data"),
        axis_types=(AxisType.Auto, AxisType.Auto),
    )


def replica_sharding(mesh: Mesh, replicas: int = 2) -> NamedSharding:
    """Returns the sharding of arrays [R, ...], or [...] for a single replica."""
    return NamedSharding(mesh, PartitionSpec("replica") if replicas > 1 else PartitionSpec())


def state_shardings(mesh: Mesh, state: Any, replicas: int = 2) -> Any:
    """Returns the shardings of a training state, as a tree of the same structure.

    The optimizer's moments of a matrix are spread over the devices that share its replica's batch:
    this is weight-update sharding (Xu et al. 2020, arXiv 2004.13336), also known as ZeRO stage 1.
    Everything else is replicated on all devices of its replica.

    Args:
      mesh: mesh of the devices.
      state: `State` with arrays or shapes [R, ...], or without the axis R for a single replica.
      replicas: number of replicas, R.

    """
    whole = replica_sharding(mesh, replicas)
    leading, data = whole.spec, mesh.shape["data"]

    def spread(path: tuple, moment: Any) -> NamedSharding:
        shape = moment.shape[len(leading) :]
        fitting = [axis for axis, size in enumerate(shape) if size % data == 0]
        if data == 1 or len(shape) < 2 or min(shape) < _LEAST_WIDTH or not fitting:
            return whole
        axis = fitting[-1] if _EMBEDDINGS in path else fitting[0]
        return NamedSharding(mesh, PartitionSpec(*leading, *[None] * axis, "data"))

    shardings = jax.tree.map(lambda _: whole, state)
    opt_state = map_moments(
        lambda _, moment: jax.tree.map_with_path(spread, moment),
        state.params,
        shardings.opt_state,
        state.opt_state,
    )
    return shardings._replace(opt_state=opt_state)


def spread_update(state: Any, shardings: Any) -> Any:
    """Returns a traced state after a step, with each parameter updated where its moments are.

    Each device then sums the gradients of its own part only and updates that part, and the
    parameters are gathered afterward. Otherwise every device would compute the whole update.

    Args:
      state: state after the step, inside a traced function.
      shardings: shardings of the state, from `state_shardings`.

    """
    if mesh_of_shardings(shardings).shape["data"] == 1:
        return state

    def constrain(sharding: NamedSharding | None, param: Any) -> Any:
        frozen = sharding is None or sharding.is_fully_replicated
        return param if frozen else jax.lax.with_sharding_constraint(param, sharding)

    moments: list[Any] = []
    map_moments(moments.append, state.params, shardings.opt_state)
    if not moments:
        return state
    params = jax.tree.map(constrain, moments[0], state.params, is_leaf=lambda x: x is None)
    return state._replace(params=params)


def batch_sharding(mesh: Mesh, replicas: int = 2) -> NamedSharding:
    """Returns the sharding of batches [R, B, ...], or [B, ...] for a single replica."""
    axes = ("replica", "data") if replicas > 1 else ("data",)
    return NamedSharding(mesh, PartitionSpec(*axes))


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays replicated on every device, which every process can read."""
    return NamedSharding(mesh, PartitionSpec())


def mesh_of(arrays: Any) -> Mesh:
    """Returns the mesh that arrays are on."""
    return mesh_of_shardings(jax.tree.leaves(arrays)[0].sharding)


def mesh_of_shardings(shardings: Any) -> Mesh:
    """Returns the mesh of a tree of shardings."""
    return jax.tree.leaves(shardings)[0].mesh


def put_batch(
    tokens: Tokens, rows: np.ndarray, lengths: tuple[int, ...], sharding: NamedSharding
) -> dict[str, jax.Array]:
    """Puts a batch of rows int [R, B] on devices; see `pad_rows`.

    Each process builds only the rows of its own devices, padded to the length of the whole batch.
    """
    length = padded_length(tokens, rows, lengths)
    indices = sharding.addressable_devices_indices_map(rows.shape)
    parts = {device: pad_rows(tokens, rows[at], (length,)) for device, at in indices.items()}

    def whole(*arrays: np.ndarray) -> jax.Array:
        shape = (*rows.shape, *arrays[0].shape[rows.ndim :])
        shards = [jax.device_put(x, d) for x, d in zip(arrays, parts, strict=True)]
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)

    return jax.tree.map(whole, *parts.values())


def reshard(tree: Any, shardings: Any) -> Any:
    """Moves a tree of arrays to `shardings`, a tree of the same structure.

    Arrays are moved through the host, one after the other. They may be on any devices, or on the
    host if they are the same in all processes.
    """

    def move(x: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        host = to_host(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(move, tree, shardings)


def to_host(x: Any) -> np.ndarray:
    """Returns a whole array as NumPy. All processes that hold parts of it must call this."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        x = jax.jit(_same, out_shardings=replicated_sharding(mesh_of(x)))(x)
    return np.asarray(x)


def _same(x: jax.Array) -> jax.Array:
    return x


def select_replica(tree: Any, number: int) -> Any:
    """Returns one replica of arrays [R, ...] on the host. All processes must call this."""
    pick = jax.jit(lambda x: x[number], out_shardings=replicated_sharding(mesh_of(tree)))
    return jax.tree.map(lambda x: np.asarray(pick(x)), tree)


def drop_replica_axis(tree: Any, replicas: int) -> Any:
    """Returns arrays [R, ...] unchanged, or without the axis R if there is a single replica."""
    return tree if replicas > 1 else jax.tree.map(lambda x: x[0], tree)


def add_replica_axis(tree: Any, replicas: int) -> Any:
    """Returns arrays [R, ...], given what `drop_replica_axis` returned."""
    return tree if replicas > 1 else jax.tree.map(lambda x: x[None], tree)


def vmap_replicas(function: Callable, replicas: int) -> Callable:
    """Maps a function of one replica over the leading axis R of all arguments and results.

    A single replica is not batched because matrix products that are batched over an axis of size 1
    are slower on a CPU.
    """
    if replicas > 1:
        return jax.vmap(function)

    def single(*args):
        result = function(*jax.tree.map(lambda x: x[0], args))
        return jax.tree.map(lambda x: x[None], result)

    return single


def warn_on_retrace(function: Callable) -> Callable:
    """Returns `function`, which then warns if it is traced a second time for the same shapes.

    If the compiled function was kept, such a trace is wasted, unless JAX's caches were cleared.
    """
    seen = set()

    @functools.wraps(function)
    def counted(*args):
        shapes = tuple((x.shape, x.dtype) for x in jax.tree.leaves(args))
        if shapes in seen:
            log.warning("%s was traced twice for the same shapes", function.__name__)
        seen.add(shapes)
        return function(*args)

    return counted
