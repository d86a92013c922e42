"""The encoder families, by model_type. A family of this package has its own file."""

from sweet_jax.models.albert import ALBERT
from sweet_jax.models.bert import BERT
from sweet_jax.models.deberta import DEBERTA
from sweet_jax.models.deberta_v2 import DEBERTA_V2
from sweet_jax.models.distilbert import DISTILBERT
from sweet_jax.models.electra import ELECTRA
from sweet_jax.models.family import EncoderFamily
from sweet_jax.models.modernbert import MODERNBERT
from sweet_jax.models.mpnet import MPNET
from sweet_jax.models.roberta import CAMEMBERT, ROBERTA, XLM_ROBERTA
from sweet_jax.registry import Registry

FAMILIES = Registry(
    "model_type",
    EncoderFamily,
    {
        family.model_type: family
        for family in (
            BERT,
            ROBERTA,
            DEBERTA,
            DEBERTA_V2,
            DISTILBERT,
            XLM_ROBERTA,
            CAMEMBERT,
            ELECTRA,
            MPNET,
            MODERNBERT,
            ALBERT,
        )
    },
    "sweet_jax.families",
)
