"""ModernBERT (Warner et al. 2024, arXiv 2412.13663).

Each part of a layer begins with a norm, positions rotate queries and keys (Su et al. 2021, arXiv
2104.09864), most layers attend only to a window of neighbors, and the feed-forward network is gated
(Shazeer 2020, arXiv 2002.05202). At every exit, the final norm is applied before pooling.

Shape letters: B batch, L length, Q first tokens, H hidden, A attention heads, D = H / A head size.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sweet_jax.errors import UserError
from sweet_jax.models.dropout import dropout
from sweet_jax.models.encoder import (
    Attention,
    Encoder,
    LayerNorm,
    embedding_table,
    first_tokens,
    linear,
    token_dropout,
)
from sweet_jax.models.encoder_config import EncoderConfig
from sweet_jax.models.family import EncoderFamily
from sweet_jax.models.layers import ACTIVATIONS, derive_optional_key
from sweet_jax.models.positions import array_module
from sweet_jax.models.tensor_names import TensorNames

_GLOBAL, _LOCAL = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True)
class ModernBertConfig(EncoderConfig):
    """The config.json of model_type "modernbert", written by transformers 4 or 5."""

    vocab_size: int = 50368
    num_hidden_layers: int = 22
    intermediate_size: int = 1152
    hidden_dropout_prob: float = 0.0  # dropout rate in the feed-forward network
    attention_probs_dropout_prob: float = 0.0
    max_position_embeddings: int = 8192
    type_vocab_size: int = 0
    layer_norm_eps: float = 1e-5
    embedding_dropout: float = 0.0
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    classifier_activation: str = "gelu"
    local_attention: int = 128  # number of neighbors that a token attends to in a local layer
    global_attn_every_n_layers: int = 3
    layer_types: tuple[str, ...] = ()  # type of each layer; () uses global_attn_every_n_layers
    global_rope_theta: float = 160_000.0
    local_rope_theta: float = 10_000.0

    KEYS: ClassVar[dict[str, str]] = {
        "hidden_act": "hidden_activation",
        "hidden_dropout_prob": "mlp_dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "layer_norm_eps": "norm_eps",
    }
    FIXED: ClassVar[dict[str, Any]] = {**EncoderConfig.FIXED, "rope_scaling": None}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_activation("classifier_activation")
        self.check_positive(
            *("local_attention", "global_attn_every_n_layers"),
            *("global_rope_theta", "local_rope_theta"),
        )
        kinds = self.layer_types
        if not set(kinds) <= {_GLOBAL, _LOCAL} or 0 < len(kinds) < self.num_hidden_layers:
            raise UserError(
                f"layer_types {list(kinds)!r}; supported are {_GLOBAL!r} and {_LOCAL!r}, one for "
                f"each of the {self.num_hidden_layers} layers"
            )
        if self.hidden_size // self.num_attention_heads % 2:
            raise UserError(
                f"hidden_size {self.hidden_size} and num_attention_heads "
                f"{self.num_attention_heads}; only an even head size is supported"
            )

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Returns the config that the contents of a config.json describe.

        transformers 5 writes rope_parameters and layer_types. transformers 4 wrote
        global_rope_theta, local_rope_theta and global_attn_every_n_layers instead.
        """
        read = dict(values)
        rotations, kinds = read.get("rope_parameters") or {}, read.get("layer_types") or []
        if not isinstance(rotations, dict) or not isinstance(kinds, list):
            raise UserError(
                f"rope_parameters {rotations!r} and layer_types {kinds!r}, which must be an object "
                "and a list"
            )
        if not set(rotations) <= {_GLOBAL, _LOCAL}:
            raise UserError(
                f"rope_parameters {rotations!r}; only the keys {_GLOBAL!r} and {_LOCAL!r} are "
                "supported"
            )
        for kind, key in ((_GLOBAL, "global_rope_theta"), (_LOCAL, "local_rope_theta")):
            rotation = rotations.get(kind) or {}
            if not isinstance(rotation, dict) or _rope_type(rotation) != "default":
                raise UserError(
                    f"rope_parameters {rotation!r}; only rope_type 'default' is supported"
                )
            read[key] = rotation.get("rope_theta", read.get(key))
        if "local_rope_theta" in values and read["local_rope_theta"] is None:
            # As in transformers 4, null stands for that of the global layers.
            read["local_rope_theta"] = read["global_rope_theta"] or cls.global_rope_theta
        read = {key: value for key, value in read.items() if value is not None}
        config = super().from_values({**read, "layer_types": tuple(map(str, kinds))})
        # transformers 5 reads this key in place of local_attention, transformers 4 ignores it.
        if read.get("sliding_window", half := config.local_attention // 2) != half:
            raise UserError(
                f"sliding_window {read['sliding_window']!r}, but half of its local_attention "
                f"{config.local_attention} is {half}: remove sliding_window, or correct one of them"
            )
        return config

    @classmethod
    def at_depth(cls, values: Mapping[str, Any], depth: int) -> dict[str, Any]:
        cut = super().at_depth(values, depth)
        return cut | ({"layer_types": cut["layer_types"][:depth]} if cut.get("layer_types") else {})

    @property
    def pooler_act(self) -> str:
        """The activation in ModernBERT's classifiers."""
        return self.classifier_activation

    def is_global(self, number: int) -> bool:
        """Returns whether layer `number`, from 1, attends to all tokens."""
        if self.layer_types:
            return self.layer_types[number - 1] == _GLOBAL
        return (number - 1) % self.global_attn_every_n_layers == 0

    def norm(self) -> LayerNorm:
        """Returns a norm of hidden states."""
        return LayerNorm(self.hidden_size, self.layer_norm_eps, bias=self.norm_bias)


def _rope_type(rotation: Mapping[str, Any]) -> Any:
    """Returns the type of a rotation, under its old key or its new one."""
    return rotation.get("rope_type", rotation.get("type", "default"))


class ModernBertEmbeddings(nnx.Module):
    """Computes normalized word embeddings; positions are added only in the attention."""

    def __init__(self, config: ModernBertConfig, dtype, rngs: nnx.Rngs):
        self.word = embedding_table(config, config.vocab_size, config.hidden_size, dtype, rngs)
        self.norm = config.norm()
        self.dropout_rate = config.embedding_dropout

    def __call__(self, input_ids: jax.Array, token_type_ids: Any, mask: Any, key) -> jax.Array:
        h = self.norm(self.word(input_ids))  # [B, L, H]
        return dropout(key, h, self.dropout_rate, length_axes=(1,))


def rotate(x: jax.Array, theta: float) -> jax.Array:
    """Rotates x [B, L, A, D] by its positions (Su et al. 2021, section 3.2.2), in float32.

    Dimension d is paired with d + D/2; the angle is position / theta^(2d / D).
    """
    length, size = x.shape[1], x.shape[-1]
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    frequencies = np.float32(1) / np.float32(theta) ** exponents  # [D / 2]
    xp = array_module(length)
    angles = xp.arange(length, dtype=np.float32)[:, None] * frequencies[None]  # [L, D / 2]
    cos, sin = (f(angles)[None, :, None] for f in (xp.cos, xp.sin))  # [1, L, 1, D / 2]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class ModernBertAttention(Attention):
    """Attention over all tokens or a window, with a norm before it and the residual after it."""

    def __init__(self, config: ModernBertConfig, number: int, dtype, rngs: nnx.Rngs):
        hidden, bias = config.hidden_size, config.attention_bias
        super().__init__(config, dtype, rngs)
        self.packed = linear(config, hidden, 3 * hidden, dtype, rngs, bias=bias)
        self.output = linear(config, hidden, hidden, dtype, rngs, bias=bias)
        # The embeddings end with a norm, so the first layer has none, unlike in `Attention`.
        self.norm = config.norm() if number > 1 else None  # type: ignore[assignment]
        self.hidden_dropout = config.attention_probs_dropout_prob
        everywhere = config.is_global(number)
        self.reach = None if everywhere else config.local_attention // 2
        self.theta = config.global_rope_theta if everywhere else config.local_rope_theta

    def project(self, first: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        _, k, v = jnp.split(self.packed(x), 3, axis=-1)
        return jnp.split(self.packed(first), 3, axis=-1)[0], k, v

    def visible(self, mask: jax.Array, count: int) -> jax.Array:
        keys = super().visible(mask, count)  # [B, 1, 1, L]
        if self.reach is None:
            return keys
        length = mask.shape[1]
        xp = array_module(count, length)
        distance = xp.arange(count)[:, None] - xp.arange(length)[None]  # [Q, L]
        return keys & (xp.abs(distance) <= self.reach)[None, None]  # [B, 1, Q, L]

    def context(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, key, relative
    ) -> jax.Array:
        q, k = rotate(q, self.theta), rotate(k, self.theta)
        return super().context(q, k, v, mask, key, relative)

    def __call__(
        self, x: jax.Array, mask: jax.Array, key, relative=None, count: int | None = None
    ) -> jax.Array:
        batch = mask.shape[0]
        normed = x if self.norm is None else self.norm(x)  # [B*L, H]
        out = self.attend(first_tokens(normed, batch, count), normed, mask, key, relative)
        return first_tokens(x, batch, count) + out  # [B*Q, H]


class ModernBertLayer(nnx.Module):
    """Adds attention, then a gated feed-forward network, each with normalized input."""

    def __init__(self, config: ModernBertConfig, number: int, dtype, rngs: nnx.Rngs):
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.attention = ModernBertAttention(config, number, dtype, rngs)
        self.norm = config.norm()
        self.intermediate = linear(config, hidden, 2 * inner, dtype, rngs, bias=bias)
        self.output = linear(config, inner, hidden, dtype, rngs, bias=bias)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dropout_rate = config.hidden_dropout_prob

    def __call__(
        self, h: jax.Array, mask: jax.Array, key, relative=None, count: int | None = None
    ) -> jax.Array:
        batch, _, hidden = h.shape
        x = h.reshape(-1, hidden)  # [B*L, H]
        x = self.attention(x, mask, derive_optional_key(key, "attention"), relative, count)
        inner, gate = jnp.split(self.intermediate(self.norm(x)), 2, axis=-1)  # [B*Q, F] each
        inner = self.activation(inner) * gate
        inner = token_dropout(derive_optional_key(key, "inner"), inner, self.dropout_rate, batch)
        return (x + self.output(inner)).reshape(batch, -1, hidden)  # [B, Q, H]


class ModernBert(Encoder):
    """ModernBERT; takes a ModernBertConfig."""

    EMBEDDINGS = ModernBertEmbeddings
    ATTENTION = ModernBertAttention
    config: ModernBertConfig

    def make_layer(self, number: int, dtype, rngs: nnx.Rngs) -> ModernBertLayer:
        return ModernBertLayer(self.config, number, dtype, rngs)

    def make_final_norm(self) -> LayerNorm:
        return self.config.norm()


MODERNBERT = EncoderFamily(
    model_type="modernbert",
    architecture="ModernBertModel",
    config=ModernBertConfig,
    encoder=ModernBert,
    names=TensorNames(
        prefix="model",
        encoder={
            "embeddings/word": "embeddings.tok_embeddings",
            "embeddings/norm": "embeddings.norm",
            "final_norm": "final_norm",
        },
        layers="layers",
        layer={
            "attention/norm": "attn_norm",
            "attention/packed": "attn.Wqkv",
            "attention/output": "attn.Wo",
            "norm": "mlp_norm",
            "intermediate": "mlp.Wi",
            "output": "mlp.Wo",
        },
        ignored=(r"head\.", r"decoder\."),  # pretraining heads
    ),
    fused_attention_obstacle="most layers of ModernBERT attend only to a window of tokens",
)
