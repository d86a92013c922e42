"""The description of an encoder family: everything that the rest of the package needs to know.

A new family is a file that ends with such a description, and an entry in families.py. If the
family was pretrained with another tokenizer than transformers loads, it also needs an entry in
checkpoint_folder.py.
"""

import dataclasses
from collections.abc import Mapping

from sweet_jax.errors import UserError
from sweet_jax.models.encoder import Encoder
from sweet_jax.models.encoder_config import EncoderConfig
from sweet_jax.models.ownership import BUILT_IN_GROUPS, OWNERS
from sweet_jax.models.tensor_names import TensorNames
from sweet_jax.poolings import POOLINGS


@dataclasses.dataclass(frozen=True, eq=False)
class EncoderFamily:
    """Describes an encoder family.

    Raises UserError for a pooling that cannot be found, and ValueError for invalid owners and for
    names without the word embeddings.

    Attributes:
      model_type: model_type in the family's config.json.
      architecture: transformers class of the encoder alone, for a saved config.json.
      config: config class, which reads config.json and names its keys (`EncoderConfig.KEYS`).
      encoder: encoder class.
      names: names of tensors in a checkpoint.
      default_pooling: pooling of the exits if neither the run's config nor the checkpoint specifies
        one. The default is the mean because the first token of a low layer has hardly attended to
        the text (experiments/results/recipe).
      fused_attention_obstacle: reason why fused attention cannot compute the family's layers; "" if
        it can.
      isolation_obstacle: reason why exits cannot have their own layers, worded to follow "whose";
        "" if they can.
      owners: for each group of the encoder's parameters (a top-level attribute) other than
        `ownership.BUILT_IN_GROUPS`, which exits train it: "first", the first one, if only `embed`
        and `relative_table` read it; "shared", all of them, if layers do.

    """

    model_type: str
    architecture: str
    config: type[EncoderConfig]
    encoder: type[Encoder]
    names: TensorNames
    default_pooling: str = "mean"
    fused_attention_obstacle: str = ""
    isolation_obstacle: str = ""
    owners: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for group, owner in self.owners.items():
            if group in BUILT_IN_GROUPS or owner not in OWNERS:
                raise ValueError(
                    f"owners of {self.model_type}: {group!r}: {owner!r}; declare other groups than "
                    f"{', '.join(BUILT_IN_GROUPS)}, as one of {', '.join(map(repr, OWNERS))}"
                )
        if "embeddings/word" not in self.names.encoder:
            raise ValueError(
                f"names of {self.model_type}: add 'embeddings/word', the table of the token ids, "
                "to 'encoder' of its TensorNames"
            )
        _ = POOLINGS[self.default_pooling]

    def tensor_name(self, path: tuple[str | int, ...]) -> str:
        """Returns the Hugging Face name of the encoder's parameter at a path.

        Raises UserError if `names` does not have it.
        """
        try:
            return self.names.name(path)
        except UserError as error:
            raise UserError(f"the encoder family {self.model_type!r} {error}") from error
