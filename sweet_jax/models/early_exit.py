"""An encoder with a classifier at several depths.

A segment is the layers after the previous exit up to this one, with this exit's head; the
embeddings belong to the first segment (ownership.py). Between segments the hidden state is
isolated: SWEET lets no gradient through, Early-Exit all of it.

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

# Of all boundaries between segments, or of each of the E - 1.
Isolation = float | jax.Array | tuple[float | jax.Array, ...]
# What crosses a boundary: the hidden state [B, L, H], and the encoder's table of relative positions
# [S, H] (MPNet: [S, A heads]) or None.
SegmentState = tuple[jax.Array, jax.Array | None]


def isolate(h: jax.Array, isolation: float | jax.Array) -> jax.Array:
    """Returns h, an array of any shape, unchanged, with its gradient times (1 - isolation).

    1 is SWEET's stop_gradient, 0 is Early-Exit. Where isolation is one of these as a Python
    number, no product is made, so that SWEET's backward pass ends at the boundary and frees what
    lies below.
    """
    if not isinstance(isolation, jax.Array):
        if isolation == 0:
            return h
        if isolation == 1:
            return jax.lax.stop_gradient(h)
    held = jax.lax.stop_gradient(h)
    # The second term is zero but for its gradient: the value is h to the last bit.
    return held + (1 - jnp.asarray(isolation, h.dtype)) * (h - held)


class EarlyExit(nnx.Module):
    """Classifies at each of `exits` (layer numbers from 1, the last is the encoder's depth).

    Random parts of head e are derived from (key, "head", e), so that an exit does not depend on
    which others there are. The encoder is taken over, without its final norm: each head has one.
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

    @property
    def shared_relative(self) -> bool:
        """Whether every exit trains the table of relative positions."""
        return self.config.shared_relative

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

        An exit may read its last layer at the first token only (`Pooling.first_only`). Only that
        token is then computed where no gradient reaches the others: before a closed boundary, and
        at the last exit.

        Args:
          index: of the segment, from 0.
          carried: the state that the previous segment returned, None for the first.
          batch: input_ids and token_type_ids int32 [B, L], mask bool [B, L]; for a pooling of
            pairs also second_start int32 [B].
          isolation: of the returned state, 0 to 1.
          key: typed key of the dropout masks, None for inference.
          features: whether the output holds what the classifier reads.

        Returns:
          The state for the next segment, None after the last; and the exit's output, without E.

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
        """Returns where a pair's second text is, bool [B, L]; None where the pooling is of none."""
        if not self.config.reads.pairs or "second_start" not in batch:
            return None
        length = batch["mask"].shape[1]
        return array_module(length).arange(length)[None] >= batch["second_start"][:, None]

    def _layer(
        self, number: int, h: jax.Array, mask: jax.Array, key, relative, count: int | None = None
    ) -> jax.Array:
        """Applies `Encoder.layer`; with remat its activations are recomputed for the gradient."""
        # Without a key no gradient is taken: evaluation is the same program with remat or without.
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
        """Runs inference from layer `start` to the exit at `end`.

        Where the exit reads the first token only, layer `end` is computed at that token alone. The
        call that resumes from there, with start = end, for the rows that do not exit, computes the
        rest; the keys and values of that layer, a sixth of its work, are then computed twice.

        Args:
          start: the first layer to compute, from 1.
          end: the layer of the exit.
          h: the hidden state [B, L, H] before layer `start`; None for 1, where it is embedded.
          batch: mask bool [B, L]; where h is None also input_ids, token_type_ids int32 [B, L];
            for a pooling of pairs also second_start int32 [B].
          whole: computes all of layer `end`; needed where the exit reads all tokens and a call
            resumes from there.

        Returns:
          The hidden state [B, L, H] before layer `end` (after it, with `whole`), and the exit's
          output, without E.

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
        """Returns the outputs of every exit, of all segments in one pass.

        isolation: of all boundaries, or a tuple with one number for each of the E - 1; key and
        features as in `segment`.
        """
        boundaries = isolation if isinstance(isolation, tuple) else (isolation,) * len(self.exits)
        carried, each = None, []
        for index in range(len(self.exits)):
            # The last segment has no boundary above it.
            carried, output = self.segment(
                index, carried, batch, (*boundaries, 0.0)[index], key, features
            )
            each.append(output)
        return jax.tree.map(lambda *x: jnp.stack(x), *each)
