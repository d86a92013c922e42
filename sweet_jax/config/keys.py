"""All config keys, and their description for --help and the documentation."""

import dataclasses

from sweet_jax.config.data_keys import DataKeys
from sweet_jax.config.key import key_metadata
from sweet_jax.config.model_keys import HeadsKeys, MethodKeys, ModelKeys
from sweet_jax.config.run_keys import EvaluationKeys, HardwareKeys, RunKeys, TrainingKeys

# By the name that the group has in --help and the documentation, in their order.
GROUPS: dict[str, type] = {
    "Data": DataKeys,
    "Model": ModelKeys,
    "Method": MethodKeys,
    "Heads": HeadsKeys,
    "Training": TrainingKeys,
    "Evaluation": EvaluationKeys,
    "Hardware": HardwareKeys,
    "Run": RunKeys,
}


@dataclasses.dataclass(frozen=True)
class Keys(  # the fields of the last base class come first
    RunKeys,
    HardwareKeys,
    EvaluationKeys,
    TrainingKeys,
    HeadsKeys,
    MethodKeys,
    ModelKeys,
    DataKeys,
):
    """Holds all config keys, without checks."""


@dataclasses.dataclass(frozen=True)
class KeyDescription:
    """Describes one config key."""

    name: str
    group: str
    meaning: str
    allowed: str
    default: str


def describe_keys() -> list[KeyDescription]:
    """Returns a description of every config key, group by group."""
    return [
        KeyDescription(
            field.name,
            group,
            key_metadata(field).meaning,
            _allowed(field),
            _shown(field.default),
        )
        for group, keys in GROUPS.items()
        for field in dataclasses.fields(keys)
    ]


def _allowed(field: dataclasses.Field) -> str:
    metadata = key_metadata(field)
    if metadata.allowed:
        return metadata.allowed
    if metadata.conditions:
        return metadata.conditions[-1][1]
    names = [_shown(v) for v in metadata.names(field.default) or (True, False)]
    return ", ".join([*names, "module:OBJECT"] if metadata.allows_reference else names)


def _shown(value: object) -> str:
    """Returns a value as it is written on a command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none given"
    return '""' if value == "" else str(value)
