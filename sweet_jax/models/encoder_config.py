"""Configuration of encoders, read from a Hugging Face `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from sweet_jax.errors import UserError
from sweet_jax.models.layers import ACTIVATIONS

_TOO_LARGE = 1 << 31  # for a number of rows, columns or layers


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Holds the values of a Hugging Face `config.json` that change the arithmetic of any encoder.

    Raises UserError for unsupported values; its message is worded to follow "checkpoint ... has".
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12

    # Keys of config.json with the only value that is implemented.
    FIXED: ClassVar[dict[str, Any]] = {"is_decoder": False, "add_cross_attention": False}
    # Keys of config.json, by field, if a family names them differently.
    KEYS: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        self.check_activation("hidden_act")
        self.check_positive("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        for field in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            value = getattr(self, field)
            if not 0 <= value < 1:
                raise UserError(f"{self.key(field)} {value}, which must be at least 0 and below 1")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"{self.key('hidden_size')} {self.hidden_size}, which must be a multiple of its "
                f"{self.key('num_attention_heads')} {self.num_attention_heads}"
            )

    @classmethod
    def key(cls, field: str) -> str:
        """Returns the key of config.json that a field is read from."""
        return cls.KEYS.get(field, field)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Returns the config that the contents of a config.json describe.

        Raises UserError for values that are not supported or have the wrong type.
        """
        for key, fixed in cls.FIXED.items():
            if values.get(key, fixed) not in (fixed, None):
                raise UserError(f"{key} {values[key]!r}; only {fixed!r} is supported")
        fields = {}
        for field in dataclasses.fields(cls):
            key, kind = cls.key(field.name), type(field.default)
            if key not in values or (values[key] is None and key == "pad_token_id"):
                continue  # null there means that nothing was set
            if not isinstance(values[key], (int, float) if kind is float else kind):
                raise UserError(
                    f"{key} {values[key]!r} in its config.json, which must be of type "
                    f"{kind.__name__}"
                )
            if isinstance(values[key], int) and abs(values[key]) >= _TOO_LARGE:
                raise UserError(f"{key} {str(values[key])[:20]}… in its config.json is too large")
            fields[field.name] = values[key]
        return cls(**fields)

    def to_values(self) -> dict[str, Any]:
        """Returns the fields by their keys in config.json."""
        return {self.key(field): value for field, value in dataclasses.asdict(self).items()}

    @classmethod
    def at_depth(cls, values: Mapping[str, Any], depth: int) -> dict[str, Any]:
        """Returns the contents of a config.json for a model with only the first `depth` layers."""
        return {**values, cls.key("num_hidden_layers"): depth}

    @property
    def positions(self) -> int | None:
        """The longest input, in tokens; None if there is no limit."""
        return self.max_position_embeddings

    @property
    def pooler_act(self) -> str:
        """The activation of the pooler that the checkpoint was trained with."""
        return "tanh"

    def check_positive(self, *fields: str) -> None:
        """Raises UserError if a field is less than 1."""
        for field in fields:
            value = getattr(self, field)
            if value < 1:
                raise UserError(f"{self.key(field)} {value}, which must be at least 1")

    def check_activation(self, field: str) -> None:
        """Raises UserError unless the value of a field is in ACTIVATIONS."""
        value = getattr(self, field)
        if value not in ACTIVATIONS:
            raise UserError(
                f"the activation {value!r} ({self.key(field)}); supported are "
                f"{', '.join(ACTIVATIONS)}"
            )
