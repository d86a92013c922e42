"""DistilBERT (Sanh et al. 2019, arXiv 1910.01108): BERT without token types and pooler."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from flax import nnx

from sweet_jax.models.bert import BertAttention, BertEmbeddings
from sweet_jax.models.encoder import Encoder
from sweet_jax.models.encoder_config import EncoderConfig
from sweet_jax.models.family import EncoderFamily
from sweet_jax.models.tensor_names import TensorNames


@dataclasses.dataclass(frozen=True)
class DistilBertConfig(EncoderConfig):
    """The config.json of model_type "distilbert".

    `sinusoidal_pos_embds` is not read: it states how the table of positions was initialized, and
    the checkpoint has the table in either case.
    """

    num_hidden_layers: int = 6
    type_vocab_size: int = 0

    KEYS: ClassVar[dict[str, str]] = {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
    }

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Returns the config of a config.json, without its layer_norm_eps.

        transformers does not read that key of a DistilBERT: its norms always have an epsilon of
        1e-12.
        """
        return super().from_values({k: v for k, v in values.items() if k != "layer_norm_eps"})

    @property
    def pooler_act(self) -> str:
        """The activation after `pre_classifier`, the pooler of DistilBERT's classifiers."""
        return "relu"


class DistilBertEmbeddings(BertEmbeddings):
    """Sums and normalizes word and position embeddings."""

    TOKEN_TYPES = False


class DistilBertAttention(BertAttention):
    """BERT's attention, without dropout after the output projection."""

    def __init__(self, config: DistilBertConfig, dtype, rngs: nnx.Rngs):
        super().__init__(config, dtype, rngs)
        self.hidden_dropout = 0.0


class DistilBert(Encoder):
    """DistilBERT; takes a DistilBertConfig."""

    EMBEDDINGS = DistilBertEmbeddings
    ATTENTION = DistilBertAttention


DISTILBERT = EncoderFamily(
    model_type="distilbert",
    architecture="DistilBertModel",
    config=DistilBertConfig,
    encoder=DistilBert,
    names=TensorNames(
        prefix="distilbert",
        encoder={
            "embeddings/word": "embeddings.word_embeddings",
            "embeddings/position": "embeddings.position_embeddings",
            "embeddings/norm": "embeddings.LayerNorm",
        },
        layers="transformer.layer",
        layer={
            "attention/query": "attention.q_lin",
            "attention/key": "attention.k_lin",
            "attention/value": "attention.v_lin",
            "attention/output": "attention.out_lin",
            "attention/norm": "sa_layer_norm",
            "intermediate": "ffn.lin1",
            "output": "ffn.lin2",
            "norm": "output_layer_norm",
        },
        pooler="pre_classifier",
        ignored=(r"vocab_(transform|layer_norm|projector)\.",),  # pretraining head
    ),
)
