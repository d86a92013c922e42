"""Dropout with masks that do not depend on padding, using a generator that XLA compiles quickly."""

import functools

import jax
import jax.numpy as jnp

_MAX_LENGTH = 1 << 16  # positions are one 16-bit digit of a counter


def dropout(
    key: jax.Array | None,
    x: jax.Array,
    rate: float,
    *,
    length_axes: tuple[int, ...] = (),
    packed_axis: int = -1,
    start: int = 0,
) -> jax.Array:
    """Zeroes elements of x with probability `rate` and scales the others up.

    The mask of an element depends only on the key and on the element's own coordinates, never on
    the size of `length_axes`: with more padding, the same tokens get the same masks.
    `jax.random.bernoulli` does not guarantee this, and draws 32 bits per element where 16 suffice.

    Args:
      key: typed threefry key, or None for inference, which returns x unchanged.
      x: any floating array.
      rate: probability of a zero, rounded to a multiple of 2**-16.
      length_axes: axes along sequence positions, at most two.
      packed_axis: axis of fixed size; four of its elements share one 64-bit draw.
      start: coordinate of x's first element along length_axes, if x is part of a longer array.

    """
    threshold = round(rate * 65536)
    if key is None or threshold == 0:
        return x
    keep = _keep(key, x.shape, threshold, length_axes, packed_axis, start)
    return jnp.where(keep, x * (65536 / (65536 - threshold)), jnp.zeros((), x.dtype))


def _keep(
    key: jax.Array,
    shape: tuple[int, ...],
    threshold: int,
    length_axes: tuple[int, ...],
    packed_axis: int,
    start: int,
) -> jax.Array:
    """Returns whether the random 16-bit number of each element is at least `threshold`, as bool.

    For the backward pass, four bits are kept in each byte. They are computed in a loop of two
    iterations because XLA never fuses operations across the boundary of a loop. Otherwise every
    kernel that reads a mask would run the generator again for each of the four bits, which on a CPU
    takes 2.5 times as long to compile and up to 5 times as long to run.
    """
    rank = len(shape)
    packed, halved = packed_axis % rank, rank - 2
    lengths = {axis % rank for axis in length_axes}
    counted = [-(-size // 4) if axis == packed else size for axis, size in enumerate(shape)]
    half = [-(-size // 2) if axis == halved else size for axis, size in enumerate(counted)]
    words = jax.random.key_data(key)

    def draw(number: jax.Array) -> jax.Array:
        high = jnp.zeros(half, jnp.uint32)  # sequence positions
        low = jnp.zeros(half, jnp.uint32)  # everything else
        for axis in range(rank):
            index = jax.lax.broadcasted_iota(jnp.uint32, half, axis)
            if axis == halved:
                index += number * jnp.uint32(half[axis])
            if axis in lengths:
                high = high * _MAX_LENGTH + index + start
            else:
                low = low * counted[axis] + index
        drawn = threefry(words, high, low)
        halves = [part for word in drawn for part in (word & 0xFFFF, word >> 16)]
        bits = [(part >= threshold).astype(jnp.uint8) << i for i, part in enumerate(halves)]
        return bits[0] | bits[1] | bits[2] | bits[3]

    drawn = jax.lax.map(draw, jnp.arange(2, dtype=jnp.uint32))  # [2, *half]
    whole = [2 * size if axis == halved else size for axis, size in enumerate(half)]
    bits = jnp.moveaxis(drawn, 0, halved).reshape(whole)
    bits = jax.lax.slice_in_dim(bits, 0, counted[halved], axis=halved)
    # Element (part, group) of the packed axis is bit `part` of its group.
    bits = jnp.expand_dims(bits, packed)
    bits = jnp.broadcast_to(bits, [*counted[:packed], 4, *counted[packed:]])
    shifts = jax.lax.broadcasted_iota(jnp.uint8, bits.shape, packed)
    counted[packed] *= 4
    keep = ((bits >> shifts) & 1).astype(bool).reshape(counted)
    return jax.lax.slice_in_dim(keep, 0, shape[packed], axis=packed)


@functools.partial(jax.jit, inline=True)  # traced once for each shape, then inlined in its caller
def threefry(key: jax.Array, high: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes Threefry-2x32 with 20 rounds (Salmon et al. 2011, table 2), with an unrolled loop.

    The results are those of JAX's own implementation. On a CPU, JAX lowers that to a loop that
    copies every word in each round and is five times slower.

    Args:
      key: key, uint32 [2].
      high, low: two words of the counters, uint32 arrays of the same shape.

    Returns:
      Two words of random bits for each counter.

    """
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    x, y = high + keys[0], low + keys[1]
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = x + y
            y = ((y << turn) | (y >> (32 - turn))) ^ x
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y
