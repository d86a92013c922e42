"""The encoder families of this package. A new one is its own file and a line here."""

from sweet_jax.models.bert import BERT
from sweet_jax.models.deberta import DEBERTA
from sweet_jax.models.deberta_v2 import DEBERTA_V2
from sweet_jax.models.distilbert import DISTILBERT
from sweet_jax.models.family import EncoderFamily
from sweet_jax.models.roberta import ROBERTA

FAMILIES: dict[str, EncoderFamily] = {  # by model_type
    family.model_type: family
    for family in (
        BERT,
        ROBERTA,
        DEBERTA,
        DEBERTA_V2,
        DISTILBERT,
    )
}
