"""The settings of a run: the config keys, their checks, and the presets."""

from sweet_jax.config.config import (
    Config,
    convert_values,
    from_mapping,
    warn_of_recipe,
    with_current_keys,
)
from sweet_jax.config.key import AUTO, check_type, split_names
from sweet_jax.config.keys import describe_keys
from sweet_jax.config.run_keys import DTYPES

__all__ = [
    "AUTO",
    "DTYPES",
    "Config",
    "check_type",
    "convert_values",
    "describe_keys",
    "from_mapping",
    "split_names",
    "warn_of_recipe",
    "with_current_keys",
]
