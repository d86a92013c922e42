"""ALBERT (Lan et al. 2020, arXiv 1909.11942): BERT whose layers all share one set of parameters.

No exit can have its own layers, so exits cannot be isolated from each other.

Shape letters: B batch, L length, H hidden.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from sweet_jax.models.bert import NAMES, BertAttention, BertConfig
from sweet_jax.models.electra import ElectraConfig, ElectraEmbeddings
from sweet_jax.models.encoder import Encoder, Layer
from sweet_jax.models.family import EncoderFamily
from sweet_jax.models.layers import derive_key

_LAYER = "encoder.albert_layer_groups.0.albert_layers.0"


@dataclasses.dataclass(frozen=True)
class AlbertConfig(ElectraConfig):
    """The config.json of model_type "albert"."""

    vocab_size: int = 30000
    hidden_size: int = 4096
    num_attention_heads: int = 64
    intermediate_size: int = 16384
    hidden_act: str = "gelu_new"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0

    FIXED: ClassVar[dict[str, Any]] = {
        **BertConfig.FIXED,
        "num_hidden_groups": 1,
        "inner_group_num": 1,
    }

    @property
    def projects(self) -> bool:
        """Whether the embeddings are projected to H: always, even if they have this width."""
        return True

    @property
    def pooler_act(self) -> str:
        """The activation of ALBERT's pooler."""
        return "tanh"


class AlbertLayer(Layer):
    """BERT's layer, without dropout after the feed-forward network."""

    def __init__(self, config: AlbertConfig, dtype, rngs: nnx.Rngs):
        super().__init__(config, BertAttention, dtype, rngs)
        self.dropout_rate = 0.0


class Albert(Encoder):
    """ALBERT; takes an AlbertConfig."""

    EMBEDDINGS = ElectraEmbeddings
    ATTENTION = BertAttention

    def __init__(self, config: AlbertConfig, key: jax.Array, dtype=jnp.float32):
        self.config = config
        self.embeddings = self.EMBEDDINGS(config, dtype, nnx.Rngs(derive_key(key, "embeddings")))
        self.shared_layer = AlbertLayer(config, dtype, nnx.Rngs(derive_key(key, "layer")))
        self.final_norm = None

    def layer_module(self, number: int) -> Any:
        return self.shared_layer


ALBERT = EncoderFamily(
    model_type="albert",
    architecture="AlbertModel",
    config=AlbertConfig,
    encoder=Albert,
    names=dataclasses.replace(
        NAMES,
        prefix="albert",
        encoder={
            **NAMES.encoder,
            "embeddings/project": "encoder.embedding_hidden_mapping_in",
            "shared_layer/attention/query": f"{_LAYER}.attention.query",
            "shared_layer/attention/key": f"{_LAYER}.attention.key",
            "shared_layer/attention/value": f"{_LAYER}.attention.value",
            "shared_layer/attention/output": f"{_LAYER}.attention.dense",
            "shared_layer/attention/norm": f"{_LAYER}.attention.LayerNorm",
            "shared_layer/intermediate": f"{_LAYER}.ffn",
            "shared_layer/output": f"{_LAYER}.ffn_output",
            "shared_layer/norm": f"{_LAYER}.full_layer_layer_norm",
        },
        layer={},
        pooler="pooler",
        ignored=(r"predictions\.", r"sop_classifier\."),  # pretraining heads
    ),
    isolation_obstacle="layers share one set of parameters",
)
