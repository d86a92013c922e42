"""MPNet (Song et al. 2020, arXiv 2004.09297): attention with a learned bias for each distance.

All layers share one table of these biases, with a row for each bucket of distances and a column for
each head, as in T5 (Raffel et al. 2020, arXiv 1910.10683, section 2.1).

Shape letters: B batch, L length, Q first tokens, H hidden, A attention heads.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sweet_jax.models.bert import BertAttention
from sweet_jax.models.disentangled_attention import along_diagonals
from sweet_jax.models.distilbert import DistilBertEmbeddings
from sweet_jax.models.encoder import Encoder, embedding_table
from sweet_jax.models.encoder_config import EncoderConfig
from sweet_jax.models.family import EncoderFamily
from sweet_jax.models.layers import derive_key
from sweet_jax.models.positions import rows_by_offset
from sweet_jax.models.roberta import count_positions
from sweet_jax.models.tensor_names import TensorNames

_BUCKETS = 32  # half of them are for keys after the query
_FARTHEST = 128  # distance from which on all offsets share the last bucket
_PAD = 1  # padding id that transformers uses to count positions, whatever config.json says


@dataclasses.dataclass(frozen=True)
class MPNetConfig(EncoderConfig):
    """The config.json of model_type "mpnet"."""

    vocab_size: int = 30527
    type_vocab_size: int = 0

    FIXED: ClassVar[dict[str, Any]] = {
        **EncoderConfig.FIXED,
        "relative_attention_num_buckets": _BUCKETS,  # transformers always uses this number
    }

    @property
    def positions(self) -> int:
        """The longest input, in tokens: its positions are counted from _PAD + 1."""
        return self.max_position_embeddings - _PAD - 1


class MPNetEmbeddings(DistilBertEmbeddings):
    """Sums word and position embeddings, with positions that skip padding."""

    def positions(self, input_ids: jax.Array) -> jax.Array:
        return count_positions(input_ids, _PAD)


def distance_bucket(offset: np.ndarray) -> np.ndarray:
    """Returns the bucket, int, of each offset (key minus query position).

    Buckets are exact up to 7 tokens, then logarithmic. They are computed in float32, as in
    transformers.
    """
    half = _BUCKETS // 2
    exact = half // 2
    far = np.maximum(np.abs(offset), 1).astype(np.float32)
    share = np.log(far / np.float32(exact)) / np.float32(np.log(_FARTHEST / exact))
    large = np.minimum(exact + (share * np.float32(half - exact)).astype(int), half - 1)
    return (offset > 0) * half + np.where(np.abs(offset) < exact, np.abs(offset), large)


class MPNetAttention(BertAttention):
    """BERT's attention with a bias for each distance added to the scores."""

    def scores(self, q: jax.Array, k: jax.Array, relative: jax.Array, key) -> jax.Array:
        count, length = q.shape[2], k.shape[2]
        # Column c of the input of `along_diagonals` is for the offset key - query = c - (L - 1).
        rows = relative[rows_by_offset(distance_bucket, length, _FARTHEST)]  # [2L, A]
        wide = jnp.broadcast_to(rows.T[:, None], (self.heads, count, 2 * length))
        return super().scores(q, k, relative, key) + along_diagonals(wide)[None]  # [B, A, Q, L]


class MPNet(Encoder):
    """MPNet; takes an MPNetConfig."""

    EMBEDDINGS = MPNetEmbeddings
    ATTENTION = MPNetAttention

    def __init__(self, config: MPNetConfig, key: jax.Array, dtype=jnp.float32):
        super().__init__(config, key, dtype)
        rngs = nnx.Rngs(derive_key(key, "relative"))
        self.relative = embedding_table(config, _BUCKETS, config.num_attention_heads, dtype, rngs)

    def relative_table(self) -> jax.Array:
        """Returns the biases of all buckets, [32, A]."""
        return self.relative.embedding[...].astype(self.relative.dtype)


MPNET = EncoderFamily(
    model_type="mpnet",
    architecture="MPNetModel",
    config=MPNetConfig,
    encoder=MPNet,
    names=TensorNames(
        prefix="mpnet",
        encoder={
            "embeddings/word": "embeddings.word_embeddings",
            "embeddings/position": "embeddings.position_embeddings",
            "embeddings/norm": "embeddings.LayerNorm",
            "relative": "encoder.relative_attention_bias",
        },
        layer={
            "attention/query": "attention.attn.q",
            "attention/key": "attention.attn.k",
            "attention/value": "attention.attn.v",
            "attention/output": "attention.attn.o",
            "attention/norm": "attention.LayerNorm",
            "intermediate": "intermediate.dense",
            "output": "output.dense",
            "norm": "output.LayerNorm",
        },
    ),
    fused_attention_obstacle="MPNet's attention scores have a term for relative positions",
)
