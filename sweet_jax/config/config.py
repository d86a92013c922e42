"""The configuration of a run: one frozen, validated dataclass."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from sweet_jax.config.combinations import check_combinations
from sweet_jax.config.key import AUTO, check_conditions, check_name, check_type, convert_value
from sweet_jax.config.keys import Keys
from sweet_jax.config.presets import PRESETS
from sweet_jax.errors import check_choice
from sweet_jax.methods import METHODS
from sweet_jax.objectives import OBJECTIVES

log = logging.getLogger(__name__)

# Keys of the data and the model, which are no part of a protocol, and pooling, which a preset sets.
_NOT_PROTOCOL = ("task", "method", "checkpoint", "exits", "train_size", "pooling")
# Names of keys in files that earlier versions wrote, with today's.
_FORMER_KEYS = {"distillation_weight": "distillation"}


@dataclasses.dataclass(frozen=True)
class Config(Keys):
    """Holds the validated config of a run.

    Raises UserError for an invalid value.
    """

    def __post_init__(self) -> None:
        fields = dataclasses.fields(self)
        for check in (check_type, check_name, check_conditions):
            for field in fields:
                check(field, getattr(self, field.name))
        check_combinations(self)

    def resolved(self) -> "Config":
        """Returns the config with unset keys filled in by its preset, objective and method."""
        choices: dict[str, Any] = {
            k: v for k, v in PRESETS[self.preset].items() if not getattr(self, k)
        }
        if self.pooling == AUTO and PRESETS[self.preset]["pooling"]:
            choices["pooling"] = PRESETS[self.preset]["pooling"]
        if not self.confidence and OBJECTIVES[self.objective].default_policy:
            choices["confidence"] = OBJECTIVES[self.objective].default_policy
        method = METHODS[self.method]
        choices["isolation"] = self.isolation or method.isolation
        choices["loss_weights"] = self.loss_weights or method.loss_weights
        return dataclasses.replace(self, **choices)

    @property
    def policy(self) -> str:
        """Returns the exit policy of a resolved config: `exit_score` with learning-to-exit."""
        return self.exit_score if self.learning_to_exit else self.confidence

    @property
    def tunes(self) -> bool:
        """Returns whether tuning rows are held out.

        They are used for the probe, the refit, the search of the learning rate, and the choice of
        the kept state with epochs="auto".
        """
        fits = self.head_init == "probe" or self.head_refit
        return self.epochs == AUTO or fits or self.searches_rate

    @property
    def searches_rate(self) -> bool:
        """Returns whether short runs choose one of several learning rates."""
        return self.rate_search == "short" and len(self.learning_rates) > 1

    def replicas(self) -> tuple[tuple[int, float], ...]:
        """Returns the (seed, learning rate) of every replica, in the order of the R axis."""
        return tuple((seed, rate) for seed in self.seeds for rate in self.learning_rates)


def from_mapping(values: Mapping[str, Any]) -> Config:
    """Builds a Config from values by key; raises UserError for an unknown key or invalid value."""
    return Config(**convert_values(values))


def with_current_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a file that an earlier version may have written, by today's keys."""
    return {_FORMER_KEYS.get(key, key): value for key, value in values.items()}


def convert_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Converts values from a file or a command line to the types of their keys.

    See `key.convert_value`. Ranges and combinations of values are not checked, because other values
    may still replace these.

    Raises UserError for an unknown key, naming the nearest one, and for a value of the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(Config)}
    for key in values:
        check_choice("config key", key, fields)
    converted = {key: convert_value(fields[key], value) for key, value in values.items()}
    for key, value in converted.items():
        check_type(fields[key], value)
    return converted


def warn_of_recipe(config: Config, recipe: Mapping[str, Any]) -> None:
    """Warns of a recipe's values that a preset other than the default leaves as they are.

    Args:
      config: config that starts from the recipe; some keys may have been overridden.
      recipe: values of the recipe by key.

    """
    usual = Config()
    kept = [
        f"{key}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for key, value in recipe.items()
        if key not in _NOT_PROTOCOL and getattr(config, key) == value != getattr(usual, key)
    ]
    if config.preset and kept:
        log.warning(
            "preset=%s leaves the recipe's %s unchanged, which differ from its protocol: set them "
            "too, or start from --config=configs/glue.py:own",
            *(config.preset, ", ".join(kept)),
        )
