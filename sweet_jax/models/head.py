"""The head of an exit: pooling, pooler, dropout, classifier and, optionally, learning-to-exit.

Shape letters: E exit, B batch, L length, H hidden, P width of a pooled vector, C classes.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sweet_jax.models.dropout import dropout
from sweet_jax.models.encoder import Encoder, linear
from sweet_jax.models.layers import ACTIVATIONS, derive_key
from sweet_jax.models.ownership import Owners
from sweet_jax.poolings import POOLINGS, Pooling


@dataclasses.dataclass(frozen=True)
class ExitConfig:
    """Describes the exits of a model.

    Raises UserError for a pooling that cannot be found, and ValueError for a learning-to-exit mode
    that does not exist.

    Attributes:
      pooling: name of the pooling in POOLINGS, which defines how an exit reads its layer.
      shared_pooler: whether the exits share one pooler; has no effect if the pooling has none.
      shared_relative: whether every exit trains the table of relative positions.
      learning_to_exit: mode of learning-to-exit: "" (none), "joint", or "detached", which passes no
        gradient to its input.
      remat: whether a layer's activations are recomputed in the backward pass.
      owners: exits that train the groups of parameters that the encoder's family declares.

    """

    pooling: str = "first"
    shared_pooler: bool = False
    shared_relative: bool = False
    learning_to_exit: str = ""
    remat: bool = False
    owners: Owners = ()

    def __post_init__(self) -> None:
        _ = POOLINGS[self.pooling]
        if self.learning_to_exit not in ("", "joint", "detached"):
            raise ValueError(f"learning_to_exit {self.learning_to_exit!r}")

    @property
    def reads(self) -> Pooling:
        """The `Pooling` with the name `pooling`."""
        return POOLINGS[self.pooling]


class ModelOutput(NamedTuple):
    """The outputs of every exit for a batch; the arrays of a single exit have no axis E."""

    logits: jax.Array  # float32 [E, B, C]
    exit_scores: jax.Array | None = None  # float32 [E, B], from learning-to-exit, between 0 and 1
    features: jax.Array | None = None  # float32 [E, B, P], inputs of the classifiers, if requested


class Head(nnx.Module):
    """Classifies at one exit: pooling, pooler (dense layer and activation), dropout, classifier.

    The head has no pooler if the exits share one or the pooling uses none. If the encoder's layers
    do not end with a norm, the head begins with one, which is initialized with the encoder's final
    norm. Learning-to-exit (Xin et al. 2021, BERxiT, section 3.3) adds a dense unit with a sigmoid
    that estimates the probability that this exit's class is right. Its input is that of the
    classifier, the pooled vector after dropout, with or without its gradient.
    """

    def __init__(self, encoder: Encoder, classes: int, config: ExitConfig, dtype, key: jax.Array):
        pooled = config.reads.width * encoder.config.hidden_size  # P

        def dense(name: str, width: int) -> nnx.Linear:
            # Always float32: in bfloat16, a regression target of 2003 would become 2000.
            rngs = nnx.Rngs(derive_key(key, name))
            return linear(encoder.config, pooled, width, jnp.float32, rngs)

        self.config = config
        learns = config.learning_to_exit != ""
        self.learning_to_exit = dense("learning_to_exit", 1) if learns else None
        if config.reads.dense and not config.shared_pooler:
            self.pooler = make_pooler(encoder, dtype, derive_key(key, "pooler"))
        self.norm = encoder.make_final_norm()
        self.classifier = dense("classifier", classes)
        self.activation = ACTIVATIONS[encoder.config.pooler_act]
        self.dropout_rate = encoder.config.hidden_dropout_prob

    def pooled(
        self,
        h: jax.Array,
        mask: jax.Array,
        pooler: nnx.Linear | None,
        second: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the input of the classifier before dropout, [B, P].

        Args:
          h: hidden state [B, L, H], or [B, 1, H] if the pooling reads only the first token.
          mask: True at tokens, bool [B, L].
          pooler: shared pooler, or None.
          second: for a pooling of pairs, True from the start of the second text on, bool [B, L].

        """
        normed = h if self.norm is None else self.norm(h)
        pooled = self.config.reads(normed, mask, second)  # [B, P]
        if not self.config.reads.dense:
            return pooled
        return self.activation((pooler or self.pooler)(pooled))

    def __call__(
        self,
        h: jax.Array,
        mask: jax.Array,
        pooler: nnx.Linear | None,
        key,
        features: bool = False,
        second: jax.Array | None = None,
    ) -> ModelOutput:
        """Returns the output of this exit, whose arrays have no axis E.

        Args:
          h, mask, pooler, second: see `pooled`.
          key: typed key for dropout, or None.
          features: whether to return the input of the classifier too.

        """
        pooled = self.pooled(h, mask, pooler, second)
        pooled = dropout(key, pooled, self.dropout_rate)  # [B, P]
        logits = self.classifier(pooled)  # [B, C]
        classifier_input = pooled.astype(jnp.float32) if features else None
        if self.learning_to_exit is None:
            return ModelOutput(logits, features=classifier_input)
        if self.config.learning_to_exit == "detached":
            pooled = jax.lax.stop_gradient(pooled)
        unit = self.learning_to_exit(pooled)[:, 0]  # [B]
        return ModelOutput(logits, jax.nn.sigmoid(unit), classifier_input)


def make_pooler(encoder: Encoder, dtype, key: jax.Array) -> nnx.Linear:
    """Returns a dense layer [H, H] with random parameters drawn from `key`."""
    hidden = encoder.config.hidden_size
    return linear(encoder.config, hidden, hidden, dtype, nnx.Rngs(key))
