"""RoBERTa (Liu et al. 2019, arXiv 1907.11692): BERT with positions that skip padding.

XLM-RoBERTa (Conneau et al. 2020, arXiv 1911.02116) and CamemBERT (Martin et al. 2020, arXiv
1911.03894) are RoBERTa models with other tokenizers and other pretraining.

Shape letters: B batch, L length, H hidden.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from sweet_jax.models import bert
from sweet_jax.models.encoder import Encoder
from sweet_jax.models.family import EncoderFamily


@dataclasses.dataclass(frozen=True)
class RobertaConfig(bert.BertConfig):
    """The config.json of model_type "roberta"."""

    vocab_size: int = 50265
    pad_token_id: int = 1

    @property
    def positions(self) -> int:
        """The longest input, in tokens: its positions are counted from pad_token_id + 1."""
        return self.max_position_embeddings - self.pad_token_id - 1


@dataclasses.dataclass(frozen=True)
class XlmRobertaConfig(RobertaConfig):
    """The config.json of model_type "xlm-roberta" or "camembert"."""

    vocab_size: int = 30522


def count_positions(input_ids: jax.Array, pad: int) -> jax.Array:
    """Returns positions counted from pad + 1 that skip padding, and pad at padding, int32 [B, L].

    As in transformers, padding is recognized by its id, not by a mask.
    """
    present = (input_ids != pad).astype(jnp.int32)  # [B, L]
    return pad + jnp.cumsum(present, axis=1) * present


class RobertaEmbeddings(bert.BertEmbeddings):
    """BERT's embeddings, with positions that are counted from pad_token_id + 1 and skip padding."""

    def __init__(self, config: RobertaConfig, dtype, rngs: nnx.Rngs):
        super().__init__(config, dtype, rngs)
        self.pad = config.pad_token_id

    def positions(self, input_ids: jax.Array) -> jax.Array:
        return count_positions(input_ids, self.pad)


class Roberta(Encoder):
    """RoBERTa; takes a RobertaConfig."""

    EMBEDDINGS = RobertaEmbeddings
    ATTENTION = bert.BertAttention


ROBERTA = EncoderFamily(
    model_type="roberta",
    architecture="RobertaModel",
    config=RobertaConfig,
    encoder=Roberta,
    names=dataclasses.replace(bert.NAMES, prefix="roberta"),
)

XLM_ROBERTA = dataclasses.replace(
    ROBERTA,
    model_type="xlm-roberta",
    architecture="XLMRobertaModel",
    config=XlmRobertaConfig,
)

CAMEMBERT = dataclasses.replace(XLM_ROBERTA, model_type="camembert", architecture="CamembertModel")
