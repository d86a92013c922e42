"""DeBERTa v2 and v3 (He et al. 2021, arXiv 2111.09543), one architecture with different options.

Shape letters: B batch, L length, Q first tokens, H hidden, W rows of the table of relative
positions that are used for distances up to L.
"""

import dataclasses

import jax
import numpy as np
from flax import nnx

from sweet_jax.errors import UserError
from sweet_jax.models.deberta import DEBERTA, NAMES, Deberta, DebertaConfig
from sweet_jax.models.disentangled_attention import DisentangledAttention
from sweet_jax.models.dropout import dropout
from sweet_jax.models.encoder import Layer, LayerNorm, linear
from sweet_jax.models.layers import ACTIVATIONS, derive_optional_key


@dataclasses.dataclass(frozen=True)
class DebertaV2Config(DebertaConfig):
    """The config.json of model_type "deberta-v2", which v3 checkpoints also use."""

    vocab_size: int = 128100
    hidden_size: int = 1536
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    intermediate_size: int = 6144
    attention_head_size: int = 0  # 0 means hidden_size / num_attention_heads
    position_buckets: int = -1  # if positive, far distances share logarithmic buckets
    share_att_key: bool = False  # positions use the same projections as contents
    norm_rel_ebd: str = "none"  # or "layer_norm": norm of the table of relative positions
    conv_kernel_size: int = 0  # size for a convolution parallel to the first layer; 0 means none
    conv_groups: int = 1
    conv_act: str = "tanh"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_activation("conv_act")
        size, heads = self.attention_head_size, self.num_attention_heads
        if size and size * heads != self.hidden_size:
            raise UserError(
                f"attention_head_size {size}; only hidden_size / num_attention_heads = "
                f"{self.hidden_size // heads} is supported"
            )
        if self.norm_rel_ebd not in ("none", "layer_norm"):
            raise UserError(
                f"norm_rel_ebd {self.norm_rel_ebd!r}; supported are 'none' and 'layer_norm'"
            )
        if self.conv_kernel_size > 0 and self.conv_kernel_size % 2 == 0:
            raise UserError(
                f"conv_kernel_size {self.conv_kernel_size}; only odd sizes are supported"
            )
        if self.position_buckets > 0 and not 2 <= self.position_buckets < 2 * (self.reach - 1):
            raise UserError(
                f"position_buckets {self.position_buckets}; supported are 2 to "
                f"{2 * (self.reach - 1) - 1}, less than twice the largest relative position"
            )

    @property
    def span(self) -> int:
        """Half the number of rows in the table of relative positions."""
        return self.position_buckets if self.position_buckets > 0 else self.reach

    @property
    def normed(self) -> bool:
        return self.norm_rel_ebd == "layer_norm"

    def rows(self, distance: np.ndarray) -> np.ndarray:
        if self.position_buckets > 0:
            distance = log_bucket(distance, self.position_buckets, self.reach)
        return super().rows(distance)


def log_bucket(distance: np.ndarray, buckets: int, reach: int) -> np.ndarray:
    """Returns the buckets of distances, int: exact up to buckets // 2, then logarithmic to `reach`.

    They are computed in float32, as in transformers' make_log_bucket_position.
    """
    middle = buckets // 2
    far = np.maximum(np.abs(distance), middle).astype(np.float32)
    share = np.log(far / np.float32(middle)) / np.log(np.float32((reach - 1) / middle))
    bucket = np.ceil(share * np.float32(middle - 1)) + middle
    return np.where(np.abs(distance) <= middle, distance, np.sign(distance) * bucket).astype(int)


class DebertaV2Attention(DisentangledAttention):
    """Attention with three projections; positions use the same ones or have their own."""

    def __init__(self, config: DebertaV2Config, dtype, rngs: nnx.Rngs):
        def dense() -> nnx.Linear:
            return linear(config, config.hidden_size, config.hidden_size, dtype, rngs)

        self.query_proj, self.key_proj, self.value_proj = dense(), dense(), dense()
        super().__init__(config, dtype, rngs)
        self.shared = config.share_att_key
        if "c2p" in self.kinds and not self.shared:
            self.pos_key_proj = dense()
        if "p2c" in self.kinds and not self.shared:
            self.pos_query_proj = dense()

    def project(self, first: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.query_proj(first), self.key_proj(x), self.value_proj(x)

    def position_keys(self, relative: jax.Array) -> jax.Array:
        return (self.key_proj if self.shared else self.pos_key_proj)(relative)

    def position_queries(self, relative: jax.Array) -> jax.Array:
        return (self.query_proj if self.shared else self.pos_query_proj)(relative)


class Convolution(nnx.Module):
    """Convolves the embeddings over neighboring tokens and adds the result to the first layer's.

    Embeddings are zero at padding, as they are beyond the ends, so that padding changes nothing.
    """

    def __init__(self, config: DebertaV2Config, dtype, rngs: nnx.Rngs):
        hidden = config.hidden_size
        self.conv = nnx.Conv(
            hidden,
            hidden,
            (config.conv_kernel_size,),
            feature_group_count=config.conv_groups,
            kernel_init=nnx.initializers.normal(config.initializer_range),
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = LayerNorm(hidden, config.layer_norm_eps)
        self.activation = ACTIVATIONS[config.conv_act]
        self.dropout_rate = config.hidden_dropout_prob

    def __call__(self, embedded: jax.Array, h: jax.Array, mask: jax.Array, key) -> jax.Array:
        count = h.shape[1]
        # Output token i reads embeddings up to i + half the kernel, so later ones are not needed.
        out = self.conv(embedded[:, : count + self.conv.kernel_size[0] // 2])[:, :count]
        out = dropout(key, out, self.dropout_rate, length_axes=(1,))  # [B, Q, H]
        return self.norm(h + self.activation(out)) * mask[:, :count, None].astype(h.dtype)


class ConvolvedLayer(Layer):
    """The first layer of an encoder with a convolution."""

    def __init__(self, config: DebertaV2Config, dtype, rngs: nnx.Rngs):
        super().__init__(config, DebertaV2Attention, dtype, rngs)
        self.conv = Convolution(config, dtype, rngs)

    def __call__(
        self, h: jax.Array, mask: jax.Array, key, relative=None, count: int | None = None
    ) -> jax.Array:
        out = super().__call__(h, mask, key, relative, count)
        return self.conv(h, out, mask, derive_optional_key(key, "conv"))


class DebertaV2(Deberta):
    """DeBERTa v2 and v3; takes a DebertaV2Config."""

    ATTENTION = DebertaV2Attention

    def make_layer(self, number: int, dtype, rngs: nnx.Rngs) -> nnx.Module:
        config = self.config
        assert isinstance(config, DebertaV2Config)
        if number == 1 and config.conv_kernel_size > 0:
            return ConvolvedLayer(config, dtype, rngs)
        return super().make_layer(number, dtype, rngs)


DEBERTA_V2 = dataclasses.replace(
    DEBERTA,
    model_type="deberta-v2",
    architecture="DebertaV2Model",
    config=DebertaV2Config,
    encoder=DebertaV2,
    names=dataclasses.replace(
        NAMES,
        encoder={
            **NAMES.encoder,
            "layers/0/conv/conv": "encoder.conv.conv",
            "layers/0/conv/norm": "encoder.conv.LayerNorm",
        },
        layer={
            **NAMES.layer,
            "attention/query_proj": "attention.self.query_proj",
            "attention/key_proj": "attention.self.key_proj",
            "attention/value_proj": "attention.self.value_proj",
            "attention/pos_key_proj": "attention.self.pos_key_proj",
            "attention/pos_query_proj": "attention.self.pos_query_proj",
        },
    ),
)
