"""An encoder with classifiers at several depths.

A segment consists of the layers between the previous exit and this one, and this exit's head; the
embeddings belong to the first segment (see ownership.py). Between segments, the hidden state is
isolated: SWEET lets no gradient through, and Early-Exit all of it.

Shape letters: E exit, B batch, L length, H hidden, C classes, S rows of a table of relative
positions.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from sweet_jax.models.encoder import Encoder
from sweet_jax.models.head import ExitConfig, Head, ModelOutput, make_pooler
from sweet_jax.models.layers import derive_key, derive_optional_key, rematerialize
from sweet_jax.models.positions import array_module

# One isolation for all boundaries between segments, or a tuple with one for each of the E - 1.
Isolation = float | jax.Array | tuple[float | jax.Array, ...]
# What crosses a boundary: the hidden state [B, L, H], and the encoder's table of relative positions
# [S, H] (MPNet: [S, A heads]) or None.
SegmentState = tuple[jax.Array, jax.Array | None]


def isolate(h: jax.Array, isolation: float | jax.Array) -> jax.Array:
    """Returns h, an array of any shape, unchanged, but multiplies its gradient by (1 - isolation).

    1 is SWEET's stop_gradient, and 0 is Early-Exit. If isolation is a Python number equal to 1 or
    0, there is no product, so that SWEET's backward pass ends at the boundary and the memory for
    what lies below is freed.
    """
    if not isinstance(isolation, jax.Array):
        if isolation == 0:
            return h
        if isolation == 1:
            return jax.lax.stop_gradient(h)
    held = jax.lax.stop_gradient(h)
    # The second term is zero except for its gradient, so the value is exactly h.
    return held + (1 - jnp.asarray(isolation, h.dtype)) * (h - held)


class EarlyExit(nnx.Module):
    """Classifies at each of `exits`, which are layer numbers from 1; the last is the depth.

    Random parameters of head e are derived from (key, "head", e), so that an exit does not depend
    on which other exits there are. The final norm of `encoder` is removed, since each head has one.
    """

    def __init__(
        self,
        encoder: Encoder,
        exits: Sequence[int],
        classes: int,
        key: jax.Array,
        config: ExitConfig | None = None,
        dtype=jnp.float32,
    ):
        self.encoder = encoder
        encoder.final_norm = None
        self.exits = tuple(exits)
        self.config = config = config or ExitConfig()
        shared = config.shared_pooler and config.reads.dense
        self.pooler = make_pooler(encoder, dtype, derive_key(key, "pooler")) if shared else None
        self.heads = nnx.Dict(
            {
                str(e): Head(encoder, classes, config, dtype, derive_key(key, "head", e))
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
        """Computes one segment.

        An exit may read only the first token of its layer (`Pooling.first_only`). Then only that
        token is computed if no gradient reaches the others, which is so before a closed boundary
        and at the last exit.

        Args:
          index: number of the segment, from 0.
          carried: state that the previous segment returned, None for the first segment.
          batch: input_ids and token_type_ids int32 [B, L], and mask bool [B, L]; for a pooling of
            pairs also second_start int32 [B].
          isolation: isolation of the returned state, from 0 to 1.
          key: typed key for the dropout masks, None for inference.
          features: whether the output includes the input of the classifier.

        Returns:
          The state for the next segment, or None after the last one, and the exit's output, whose
          arrays have no axis E.

        """
        ids, types, mask = batch["input_ids"], batch["token_type_ids"], batch["mask"]
        if carried is None:
            h, relative = self.encoder.embed(ids, types, mask, key), self.encoder.relative_table()
        else:
            h, relative = carried
            if self.config.shared_relative:
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
            second=self._second(batch),
        )
        if end == self.exits[-1]:
            return None, head(layer(count=1 if self.config.reads.first_only else None))
        whole = layer()  # [B, L, H]
        closed = not isinstance(isolation, jax.Array) and isolation == 1
        output = head(layer(count=1) if closed and self.config.reads.first_only else whole)
        return jax.tree.map(lambda x: isolate(x, isolation), (whole, relative)), output

    def _second(self, batch: dict[str, jax.Array]) -> jax.Array | None:
        """Returns True from the first token of a pair's second text on, bool [B, L].

        Returns None if the pooling does not read pairs.
        """
        if not self.config.reads.pairs or "second_start" not in batch:
            return None
        length = batch["mask"].shape[1]
        return array_module(length).arange(length)[None] >= batch["second_start"][:, None]

    def _layer(
        self, number: int, h: jax.Array, mask: jax.Array, key, relative, count: int | None = None
    ) -> jax.Array:
        """Applies `Encoder.layer`; with remat, its activations are recomputed for the gradient."""
        # Without a key no gradient is taken, so evaluation uses the same program in either case.
        if not self.config.remat or key is None:
            return self.encoder.layer(number, h, mask, key, relative, count=count)
        graphdef, params = nnx.split(self.encoder.layer_module(number))

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
        """Runs inference from layer `start` to the exit at layer `end`.

        If the exit reads only the first token, layer `end` is computed at that token alone. For
        rows that do not exit, the next call starts again with start = end. The keys and values of
        that layer, a sixth of its work, are then computed twice.

        Args:
          start: first layer to compute, from 1.
          end: layer of the exit.
          h: hidden state [B, L, H] before layer `start`; None to compute the embeddings, with
            start = 1.
          batch: mask bool [B, L]; if h is None also input_ids and token_type_ids int32 [B, L];
            for a pooling of pairs also second_start int32 [B].
          whole: whether to compute layer `end` at all tokens; required if the exit reads all
            tokens and another call continues after it.

        Returns:
          The hidden state [B, L, H] before layer `end` (after it, with `whole`), and the exit's
          output, whose arrays have no axis E.

        """
        mask, relative = batch["mask"], self.encoder.relative_table()
        if h is None:
            h = self.encoder.embed(batch["input_ids"], batch["token_type_ids"], mask)
        for number in range(start, end):
            h = self.encoder.layer(number, h, mask, relative=relative)
        count = 1 if self.config.reads.first_only and not whole else None
        last = self.encoder.layer(end, h, mask, relative=relative, count=count)
        output = self.heads[str(end)](last, mask, self.pooler, None, second=self._second(batch))
        return last if whole else h, output

    def __call__(
        self,
        batch: dict[str, jax.Array],
        isolation: Isolation = 0.0,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the logits of every exit, float32 [E, B, C]; see `forward`."""
        return self.forward(batch, isolation, key).logits

    def forward(
        self,
        batch: dict[str, jax.Array],
        isolation: Isolation = 0.0,
        key: jax.Array | None = None,
        features: bool = False,
    ) -> ModelOutput:
        """Returns the outputs of every exit, computing all segments in one pass.

        Args:
          batch: batch as in `segment`.
          isolation: isolation of all boundaries, or a tuple with one for each of the E - 1.
          key, features: see `segment`.

        """
        boundaries = isolation if isinstance(isolation, tuple) else (isolation,) * len(self.exits)
        carried, outputs = None, []
        for index in range(len(self.exits)):
            # The last segment has no boundary above it.
            carried, output = self.segment(
                index, carried, batch, (*boundaries, 0.0)[index], key, features
            )
            outputs.append(output)
        return jax.tree.map(lambda *x: jnp.stack(x), *outputs)
