"""Lookup in tables of embeddings, with a gradient that is fast on an accelerator.

JAX's own gradient adds the tokens' gradients one by one to the rows they read. A GPU does this with
atomic additions, and those to the same row wait for each other. With a table of two token types, or
with thousands of padding tokens, this takes longer than the rest of a training step
(experiments/benchmarks/train_step.py).

Shape letters: V rows of the table, H width, N indices; "..." is the shape of the indices.
"""

import jax
import jax.numpy as jnp
from flax import nnx

_FEW = 16  # maximum number of rows of a table whose gradient is a matrix product


class Embedding(nnx.Embed):
    """A table of embeddings like `nnx.Embed`, with the gradient summed in the parameters' dtype."""

    def __call__(self, ids: jax.Array) -> jax.Array:  # type: ignore[override]  # no out_sharding
        """Returns the rows for integer ids, [..., H], in the activations' dtype."""
        return embedding_rows(self.embedding[...], ids).astype(self.dtype)


def token_type_rows(table: Embedding, ids: jax.Array) -> jax.Array:
    """Returns the rows of a table of token types at integer ids, [..., H].

    If the table has only one type, all tokens have it, even if the tokenizer numbers the texts of a
    pair differently.
    """
    return table(jnp.zeros_like(ids) if table.num_embeddings == 1 else ids)


@jax.custom_vjp
def embedding_rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns the rows [..., H] of a table [V, H] at integer ids [...]."""
    return jnp.take(table, ids, axis=0)


def _forward(table: jax.Array, ids: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return embedding_rows(table, ids), (table, ids)


def _backward(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, None]:
    table, ids = residuals
    fast = matmul_gradient if len(table) <= _FEW else sparse_gradient
    return jax.lax.platform_dependent(table, ids, g, cpu=take_gradient, default=fast), None


embedding_rows.defvjp(_forward, _backward)


def take_gradient(table: jax.Array, ids: jax.Array, g: jax.Array) -> jax.Array:
    """Returns the table's gradient [V, H], computed by JAX from the rows' gradients g [..., H].

    On a CPU this is the fastest way, as there are no atomic additions.
    """
    (gradient,) = jax.vjp(lambda table: jnp.take(table, ids, axis=0), table)[1](g)
    return gradient


def matmul_gradient(table: jax.Array, ids: jax.Array, g: jax.Array) -> jax.Array:
    """Returns the same up to rounding, as a product of one-hot ids and the rows' gradients."""
    hot = jax.nn.one_hot(ids.ravel(), len(table), dtype=table.dtype)  # [N, V]
    rows = g.reshape(-1, g.shape[-1])  # [N, H]
    return jnp.matmul(hot.T, rows, precision=jax.lax.Precision.HIGHEST)


def sparse_gradient(table: jax.Array, ids: jax.Array, g: jax.Array) -> jax.Array:
    """Returns the same up to rounding, skipping tokens whose gradient is zero, such as padding."""
    read = jnp.where((g != 0).any(axis=-1), ids, len(table))  # past the end: dropped
    return jnp.zeros_like(table).at[read].add(g, mode="drop")
