"""ELECTRA (Clark et al. 2020, arXiv 2003.10555): BERT with embeddings narrower than its layers.

Shape letters: B batch, L length, H hidden.
"""

import dataclasses

import jax
from flax import nnx

from sweet_jax.models import bert
from sweet_jax.models.encoder import Encoder, linear
from sweet_jax.models.family import EncoderFamily


@dataclasses.dataclass(frozen=True)
class ElectraConfig(bert.BertConfig):
    """The config.json of model_type "electra"."""

    hidden_size: int = 256
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    embedding_size: int = 128  # width of the tables

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("embedding_size")

    @property
    def projects(self) -> bool:
        """Whether the embeddings are projected to H."""
        return self.embedding_size != self.hidden_size

    @property
    def pooler_act(self) -> str:
        """The activation in ELECTRA's classifiers."""
        return "gelu"


class ElectraEmbeddings(bert.BertEmbeddings):
    """Computes BERT's embeddings with width embedding_size and projects them to H."""

    def __init__(self, config: ElectraConfig, dtype, rngs: nnx.Rngs):
        width, hidden = config.embedding_size, config.hidden_size
        super().__init__(config, dtype, rngs, width)
        self.project = linear(config, width, hidden, dtype, rngs) if config.projects else None

    def __call__(self, input_ids: jax.Array, token_type_ids: jax.Array, mask, key) -> jax.Array:
        h = super().__call__(input_ids, token_type_ids, mask, key)  # [B, L, embedding_size]
        return h if self.project is None else self.project(h)  # [B, L, H]


class Electra(Encoder):
    """ELECTRA; takes an ElectraConfig."""

    EMBEDDINGS = ElectraEmbeddings
    ATTENTION = bert.BertAttention


ELECTRA = EncoderFamily(
    model_type="electra",
    architecture="ElectraModel",
    config=ElectraConfig,
    encoder=Electra,
    names=dataclasses.replace(
        bert.NAMES,
        prefix="electra",
        encoder={**bert.NAMES.encoder, "embeddings/project": "embeddings_project"},
        pooler="classifier.dense",
        ignored=(r"(discriminator|generator)_(predictions|lm_head)\.",),  # pretraining heads
    ),
)
