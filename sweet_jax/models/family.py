"""An encoder family: all that the rest of the package needs to know of one, as a value.

A new family is one file that ends with such a value, and its line in families.py; where
transformers' tokenizer is not what it was pretrained with, a line in checkpoint_folder.py.
"""

import dataclasses

from sweet_jax.models.encoder import Encoder
from sweet_jax.models.encoder_config import EncoderConfig
from sweet_jax.models.pooling import POOLINGS
from sweet_jax.models.tensor_names import TensorNames


@dataclasses.dataclass(frozen=True, eq=False)
class EncoderFamily:
    """Describes an encoder family.

    Raises ValueError for a pooling that does not exist.

    Attributes:
      model_type: that of the family's config.json.
      architecture: the transformers class of the encoder alone, for a saved config.json.
      config: reads config.json; also names its keys (`EncoderConfig.KEYS`).
      encoder: the modules.
      names: of tensors in a checkpoint.
      default_pooling: of exits where neither the run's config nor the checkpoint says. The mean,
        since the first token of a low layer has hardly seen the text
        (experiments/results/recipe).
      fused_attention_obstacle: why fused attention cannot compute the family's layers; "" where it
        can.
      isolation_obstacle: why no exit can have layers of its own, worded to follow "whose"; "" where
        each can.

    """

    model_type: str
    architecture: str
    config: type[EncoderConfig]
    encoder: type[Encoder]
    names: TensorNames
    default_pooling: str = "mean"
    fused_attention_obstacle: str = ""
    isolation_obstacle: str = ""

    def __post_init__(self) -> None:
        if self.default_pooling not in POOLINGS:
            raise ValueError(f"default_pooling {self.default_pooling!r} of {self.model_type}")
