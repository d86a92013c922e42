"""The type and the range of each config key."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sweet_jax.errors import UserError
from sweet_jax.methods import LOSS_WEIGHTS

if TYPE_CHECKING:
    from sweet_jax.config import Config

_EXAMPLES = {
    "exits": "1,4,6,12",
    "seeds": "0,1,2",
    "learning_rates": "3e-4",
    "isolation": "0,1",
    "boundary_isolation": "1,0.5,0",
}
_KINDS = {
    int: "a whole number (int)",
    float: "a number (float)",
    bool: "True or False",
    str: "text (str)",
}
SCHEDULES = ", ".join(map(repr, LOSS_WEIGHTS))

# (keys, condition on the value of each, the condition in words for messages and --help).
RANGES: tuple[tuple[tuple[str, ...], Callable[[Any], Any], str], ...] = (
    (("exits",), len, "at least one layer number"),
    (("exits",), lambda v: min(v) >= 1, "layer numbers from 1"),
    (("exits",), lambda v: list(v) == sorted(set(v)), "ascending without repeats"),
    (("seeds", "learning_rates"), len, "at least one number"),
    (("seeds", "learning_rates"), lambda v: len(set(v)) == len(v), "distinct"),
    (("seeds",), lambda v: all(0 <= x < 2**31 for x in v), "from 0 to 2147483647"),
    (("learning_rates",), lambda v: all(0 < x < math.inf for x in v), "positive and finite"),
    (("isolation",), lambda v: len(v) <= 2, "one number, or a pair from, to"),
    (("isolation", "boundary_isolation"), lambda v: all(0 <= x <= 1 for x in v), "from 0 to 1"),
    (("train_size", "batch_size", "evaluation_batch_size"), lambda v: v >= 1, "1 or more"),
    (("checkpoint_every",), lambda v: v >= 1, "1 or more"),
    (("conflict_every", "depth", "max_steps"), lambda v: v >= 0, "0 or more"),
    (("max_length",), lambda v: v >= 8, "8 tokens or more"),
    (("split_seed",), lambda v: 0 <= v < 2**31, "from 0 to 2147483647"),
    (
        ("calibration_fraction", "tuning_fraction", "validation_fraction"),
        lambda v: 0 < v < 1,
        "between 0 and 1, both excluded",
    ),
    (("warmup_fraction",), lambda v: 0 <= v < 1, "at least 0 and less than 1"),
    (("weight_decay",), lambda v: 0 <= v < math.inf, "0 or more"),
    (("clip_norm",), lambda v: v > 0, "positive (inf switches clipping off)"),
    (("focal_gamma", "distillation_weight"), lambda v: 0 <= v < math.inf, "0 or more"),
    (("layer_decay",), lambda v: 0 < v <= 1, "more than 0 and at most 1"),
    (("layer_scaling",), lambda v: 0 <= v <= 1, "from 0 to 1"),
    (("last_exit_first",), lambda v: 0 <= v < 1, "at least 0 and less than 1"),
    (
        ("head_learning_rate", "distillation_temperature"),
        lambda v: 0 < v < math.inf,
        "positive and finite",
    ),
    (("task",), bool, "a name"),
    (("label_column",), bool, "a column name"),
)


def check_type(name: str, value: Any, default: Any) -> None:
    """Raises UserError unless a value has the type of its key, given the key's default."""
    if isinstance(default, tuple):
        kind = int if name in ("exits", "seeds") else float
        if not isinstance(value, tuple) or any(type(v) is not kind for v in value):
            noun = "whole numbers" if kind is int else "numbers"
            raise UserError(
                f"{name} must be {noun} separated by commas, such as "
                f"--config.{name}={_EXAMPLES[name]}; got {value!r}"
            )
    elif name == "epochs":
        if value != "auto" and type(value) is not int:
            raise UserError(f'epochs must be a whole number or "auto"; got {value!r}')
    elif name == "loss_weights":
        numbers = isinstance(value, tuple) and value and all(type(v) is float for v in value)
        if not isinstance(value, str) and not numbers:
            raise UserError(
                f"loss_weights must be one positive number for each exit, or one of {SCHEDULES}; "
                f"got {value!r}"
            )
    elif type(value) is not type(default):
        raise UserError(f"{name} must be {_KINDS[type(default)]}; got {value!r}")


def check_ranges(config: "Config") -> None:
    """Raises UserError for a value out of its range."""
    for names, holds, wanted in RANGES:
        for name in names:
            value = getattr(config, name)
            if not holds(value):
                raise UserError(f"{name} must be {wanted}; got {value!r}")
