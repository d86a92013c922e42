"""An encoder with a classifier at several depths.

A segment is the layers after the previous exit up to this one, with this exit's head; the
embeddings belong to the first segment (owners.py). Between segments the hidden state is isolated:
SWEET lets no gradient back across, Early-Exit lets all of it.

Shape letters: E exit, B batch, L length, H hidden, C classes.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sweet_jax.models.encoder import Encoder, linear
from sweet_jax.models.layers import (
    ACTIVATIONS,
    derive_key,
    derive_optional_key,
    dropout,
    rematerialize,
)
from sweet_jax.models.pooling import POOLINGS

# Of all boundaries between segments, or of each of the E - 1.
Isolation = float | jax.Array | tuple[float | jax.Array, ...]
# What crosses a boundary: the hidden state [B, L, H], and the encoder's table of relative positions
# [S, H] or None.
SegmentState = tuple[jax.Array, jax.Array | None]


class ModelOutput(NamedTuple):
    """What every exit says of a batch; of one exit, arrays without E."""

    logits: jax.Array  # float32 [E, B, C]
    exit_scores: jax.Array | None = None  # float32 [E, B], learning-to-exit's, from 0 to 1
    features: jax.Array | None = None  # float32 [E, B, H], what classifiers read, where asked for


def isolate(h: jax.Array, isolation: float | jax.Array) -> jax.Array:
    """The hidden state [B, L, H], or any array, itself, with its gradient times (1 - isolation).

    1 is SWEET's stop_gradient, 0 is Early-Exit.

    The two ends are taken literally when isolation is a Python number, so that SWEET's backward
    pass ends at the boundary and frees what lies below.
    """
    if not isinstance(isolation, jax.Array):
        if isolation == 0:
            return h
        if isolation == 1:
            return jax.lax.stop_gradient(h)
    held = jax.lax.stop_gradient(h)
    # The second term is zero but for its gradient: the value is h to the last bit at every dial.
    return held + (1 - jnp.asarray(isolation, h.dtype)) * (h - held)


class Head(nnx.Module):
    """Classifier of one exit: pooling, pooler (dense, activation), dropout, dense.

    With a shared pooler, or a pooling that has none, the head holds no pooler. Learning-to-exit
    (Xin et al. 2021, BERxiT) adds a dense unit with a sigmoid that says how likely this exit's
    class is right; it reads what the classifier reads, the pooled vector after dropout, or that
    vector cut off from its gradient.
    """

    def __init__(
        self,
        encoder: Encoder,
        classes: int,
        dtype,
        key: jax.Array,
        *,
        pooler: bool,
        pooling: str,
        learning_to_exit: str,
    ):
        config = encoder.config
        self.pooling = pooling
        rngs = nnx.Rngs(derive_key(key, "learning_to_exit"))
        on = learning_to_exit != ""
        self.learning_to_exit = linear(config, config.hidden_size, 1, dtype, rngs) if on else None
        self.detached = learning_to_exit == "detached"
        if pooler and POOLINGS[pooling].dense:
            self.pooler = make_pooler(encoder, dtype, derive_key(key, "pooler"))
        self.classifier = linear(
            config, config.hidden_size, classes, dtype, nnx.Rngs(derive_key(key, "classifier"))
        )
        self.activation = ACTIVATIONS[config.pooler_act]
        self.dropout_rate = config.hidden_dropout_prob

    def pooled(self, h: jax.Array, mask: jax.Array, pooler: nnx.Linear | None) -> jax.Array:
        """Returns what the classifier reads, before dropout: [B, H] of h [B, L, H].

        Of a pooling that reads the first token alone, h may be [B, 1, H].
        """
        pooled = POOLINGS[self.pooling].read(h, mask)  # [B, H]
        if not POOLINGS[self.pooling].dense:
            return pooled
        return self.activation((pooler or self.pooler)(pooled))

    def __call__(
        self,
        h: jax.Array,
        mask: jax.Array,
        pooler: nnx.Linear | None,
        key,
        features: bool = False,
    ) -> ModelOutput:
        """The answer of this exit (arrays without E); arguments as in `pooled`."""
        pooled = self.pooled(h, mask, pooler)  # [B, H]
        pooled = dropout(key, pooled, self.dropout_rate)
        logits = self.classifier(pooled).astype(jnp.float32)  # [B, C]
        kept = pooled.astype(jnp.float32) if features else None
        if self.learning_to_exit is None:
            return ModelOutput(logits, features=kept)
        if self.detached:
            pooled = jax.lax.stop_gradient(pooled)
        unit = self.learning_to_exit(pooled)[:, 0].astype(jnp.float32)  # [B]
        return ModelOutput(logits, jax.nn.sigmoid(unit), kept)


class EarlyExit(nnx.Module):
    """An encoder and a head at each of `exits` (layer numbers from 1, the last is the depth).

    Random parts of head e are derived from (key, "head", e): what an exit is does not depend on
    which others there are.
    """

    def __init__(
        self,
        encoder: Encoder,
        exits: Sequence[int],
        classes: int,
        key: jax.Array,
        *,
        shared_pooler: bool = False,
        shared_relative: bool = False,
        learning_to_exit: str = "",
        pooling: str = "first",
        remat: bool = False,
        dtype=jnp.float32,
    ):
        shared_pooler = shared_pooler and POOLINGS[pooling].dense
        self.encoder = encoder
        self.first_only = POOLINGS[pooling].first_only
        self.remat = remat
        self.exits = tuple(exits)
        self.shared_relative = shared_relative
        self.pooler = (
            make_pooler(encoder, dtype, derive_key(key, "pooler")) if shared_pooler else None
        )
        self.heads = nnx.Dict(
            {
                str(e): Head(
                    encoder,
                    classes,
                    dtype,
                    derive_key(key, "head", e),
                    pooler=not shared_pooler,
                    pooling=pooling,
                    learning_to_exit=learning_to_exit,
                )
                for e in self.exits
            }
        )

    def segment(
        self,
        index: int,
        carried: SegmentState | None,
        batch: dict[str, jax.Array],
        isolation: float | jax.Array = 0.0,
        key: jax.Array | None = None,
        features: bool = False,
    ) -> tuple[SegmentState | None, ModelOutput]:
        """One segment: (what it hands on, its exit's answer, without E).

        An exit may read its last layer at the first token only (`Pooling.first_only`). That token
        alone is then computed where no gradient reaches the others: before a closed boundary, and
        at the last exit.

        Args:
          index: of the segment, from 0.
          carried: what the segment before handed on, None for the first.
          batch: input_ids and token_type_ids int32 [B, L], mask bool [B, L].
          isolation: of what is handed on, 0 to 1. The last segment hands on nothing.
          key: typed key of the dropout masks, None for inference.
          features: whether the answer has what the classifier reads.

        """
        ids, types, mask = batch["input_ids"], batch["token_type_ids"], batch["mask"]
        if carried is None:
            h, relative = self.encoder.embed(ids, types, mask, key), self.encoder.relative_table()
        else:
            h, relative = carried
            if self.shared_relative:
                relative = self.encoder.relative_table()
        start, end = (0, *self.exits)[index : index + 2]
        for number in range(start + 1, end):
            h = self._layer(number, h, mask, key, relative)
        layer = functools.partial(self._layer, end, h, mask, key, relative)
        head = functools.partial(
            self.heads[str(end)],
            mask=mask,
            pooler=self.pooler,
            key=derive_optional_key(key, "head", end),
            features=features,
        )
        if end == self.exits[-1]:
            return None, head(layer(count=1 if self.first_only else None))
        whole = layer()  # [B, L, H]
        closed = not isinstance(isolation, jax.Array) and isolation == 1
        answer = head(layer(count=1) if closed and self.first_only else whole)
        return jax.tree.map(lambda x: isolate(x, isolation), (whole, relative)), answer

    def _layer(
        self, number: int, h: jax.Array, mask: jax.Array, key, relative, count: int | None = None
    ) -> jax.Array:
        """`Encoder.layer`; with remat, what a backward pass needs of it is computed again there."""
        # Without a key no gradient is taken: evaluation is the same program with remat or without.
        if not self.remat or key is None:
            return self.encoder.layer(number, h, mask, key, relative, count=count)
        graphdef, params = nnx.split(self.encoder.layers[number - 1])

        def run(h: jax.Array, params, relative: jax.Array | None) -> jax.Array:
            layer = nnx.merge(graphdef, params)
            return layer(h, mask, derive_key(key, "layer", number), relative, count)

        return rematerialize(run, h, params, relative)

    def forward_from(
        self,
        start: int,
        end: int,
        h: jax.Array | None,
        batch: dict[str, jax.Array],
        *,
        whole: bool = False,
    ) -> tuple[jax.Array, ModelOutput]:
        """Inference from layer `start` to the exit at `end`: (state before that layer, answer).

        Where the exit reads the first token only, that is computed alone: the rest of layer `end`
        is left to the call that resumes there, with start = end, for the rows that do not
        leave. It computes the keys and values of that layer a second time, a sixth of it.

        With `whole`, all of layer `end` is computed and its state returned: to be asked for where
        the exit reads all tokens, unless no call resumes there.

        Args:
          start: of the layers to compute, from 1.
          end: the layer of the exit.
          h: the hidden state [B, L, H] before layer `start`; None for 1, where it is embedded.
          batch: mask bool [B, L]; where h is None also input_ids, token_type_ids int32 [B, L].

        """
        mask, relative = batch["mask"], self.encoder.relative_table()
        if h is None:
            h = self.encoder.embed(batch["input_ids"], batch["token_type_ids"], mask)
        for number in range(start, end):
            h = self.encoder.layer(number, h, mask, relative=relative)
        count = 1 if self.first_only and not whole else None
        last = self.encoder.layer(end, h, mask, relative=relative, count=count)
        return last if whole else h, self.heads[str(end)](last, mask, self.pooler, None)

    def __call__(
        self,
        batch: dict[str, jax.Array],
        isolation: Isolation = 0.0,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of every exit, float32 [E, B, C]; see `forward`."""
        return self.forward(batch, isolation, key).logits

    def forward(
        self,
        batch: dict[str, jax.Array],
        isolation: Isolation = 0.0,
        key: jax.Array | None = None,
        features: bool = False,
    ) -> ModelOutput:
        """What every exit says: all segments in one pass.

        isolation: of all boundaries, or a tuple with one number for each of the E - 1.
        features: as in `segment`.
        """
        boundaries = isolation if isinstance(isolation, tuple) else (isolation,) * len(self.exits)
        carried, each = None, []
        for index in range(len(self.exits)):
            # The last segment has no boundary above it.
            carried, answer = self.segment(
                index, carried, batch, (*boundaries, 0.0)[index], key, features
            )
            each.append(answer)
        return jax.tree.map(lambda *x: jnp.stack(x), *each)


def make_pooler(encoder: Encoder, dtype, key: jax.Array) -> nnx.Linear:
    """A dense [H, H] layer with random parameters from `key`."""
    hidden = encoder.config.hidden_size
    return linear(encoder.config, hidden, hidden, dtype, nnx.Rngs(key))
