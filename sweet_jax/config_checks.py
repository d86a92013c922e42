"""Checks of the config: the type of each value, its range, and what does not go together."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sweet_jax.errors import UserError, check_choice, join_numbers
from sweet_jax.methods import LOSS_WEIGHTS, METHODS

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
_SCHEDULES = ", ".join(map(repr, LOSS_WEIGHTS))

# Keys, what holds of the value of each, and how messages and --help say it.
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
    (("warmup_fraction",), lambda v: 0 <= v < 1, "from 0 to below 1"),
    (("weight_decay",), lambda v: 0 <= v < math.inf, "0 or more"),
    (("clip_norm",), lambda v: v > 0, "positive (inf switches clipping off)"),
    (("focal_gamma", "distillation_weight"), lambda v: 0 <= v < math.inf, "0 or more"),
    (("layer_decay",), lambda v: 0 < v <= 1, "above 0 and at most 1"),
    (("layer_scaling",), lambda v: 0 <= v <= 1, "from 0 to 1"),
    (("last_exit_first",), lambda v: 0 <= v < 1, "from 0 to below 1"),
    (
        ("head_learning_rate", "distillation_temperature"),
        lambda v: 0 < v < math.inf,
        "positive and finite",
    ),
    (("task",), bool, "a name"),
    (("label_column",), bool, "a column name"),
)


def check_type(name: str, value: Any, default: Any) -> None:
    """Raises UserError unless a value is of the type of its key, whose default is given."""
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
                f"loss_weights must be one positive number for each exit, or one of {_SCHEDULES}; "
                f"got {value!r}"
            )
    elif type(value) is not type(default):
        raise UserError(f"{name} must be {_KINDS[type(default)]}; got {value!r}")


def check_values(config: "Config") -> None:
    """Raises UserError for a value out of its range, or values that do not go together."""
    for names, holds, wanted in RANGES:
        for name in names:
            value = getattr(config, name)
            if not holds(value):
                raise UserError(f"{name} must be {wanted}; got {value!r}")
    least = 0 if config.head_init == "probe" or config.head_refit else 1
    if isinstance(config.epochs, int) and config.epochs < least:
        raise UserError(
            'epochs must be 1 or more, or "auto" (0 only with head_init=probe or head_refit); '
            f"got {config.epochs!r}"
        )
    _check_layer_scaling(config)
    _check_isolation(config)
    _check_loss_weights(config)
    _check_last_exit(config)
    _check_conflict(config)
    _check_independent(config)
    _check_learning_to_exit(config)
    _check_objective(config)


def _check_objective(config: "Config") -> None:
    """Raises UserError for keys that are of another objective."""
    objective = config.objective
    for key, value, needed in (
        ("class_weights", config.class_weights, "single_label"),
        ("focal_gamma", config.focal_gamma, "single_label"),
        ("decision_thresholds", config.decision_thresholds, "multi_label"),
    ):
        if value and objective != needed:
            raise UserError(
                f"{key} is {value!r}, but is of objective {needed}, and this one is {objective}: "
                "leave it out"
            )
    if config.class_weights not in ("", "balanced"):
        weights = _as_numbers(config.class_weights)
        if not weights or not all(0 < w < math.inf for w in weights):
            raise UserError(
                'class_weights must be "balanced" or one positive number for each class, in their '
                f"order, such as 1,5; got {config.class_weights!r}"
            )
    if config.focal_gamma and config.head_refit:
        raise UserError(
            f"focal_gamma is {config.focal_gamma:g}, but head_refit replaces the classifiers by "
            "logistic regressions, which are fitted by the cross-entropy: set "
            "--config.head_refit=False"
        )
    if objective == "single_label" and config.confidence in ("min_confidence", "stability"):
        raise UserError(
            f"confidence is {config.confidence!r}, which is not of objective single_label: leave "
            "it out"
        )
    own = ":" in config.confidence
    if objective == "regression" and not own and config.confidence not in ("", "stability"):
        raise UserError(
            f"confidence is {config.confidence!r}, a probability, which objective regression has "
            "none of: leave it out"
        )


def _check_layer_scaling(config: "Config") -> None:
    """Raises UserError where layers are to be scaled that heads, or a deeper run, rely on."""
    if config.layer_scaling == 1:
        return
    if not config.head_refit:
        raise UserError(
            f"layer_scaling is {config.layer_scaling:g}, but the heads were trained on the layers "
            "as they were: set --config.head_refit=True with it"
        )
    if config.grow_from:
        raise UserError(
            f"layer_scaling is {config.layer_scaling:g}, but grow_from keeps a run's layers as "
            "they are: leave one of the two out"
        )


def _as_numbers(text: str) -> tuple[float, ...]:
    """Returns numbers separated by commas, () where one is none."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        return ()


def _check_isolation(config: "Config") -> None:
    method, factors = METHODS[config.method], config.boundary_isolation
    isolation = config.isolation or method.isolation
    if config.isolation_schedule != "linear" and len(isolation) != 2:
        raise UserError(
            f"isolation_schedule {config.isolation_schedule!r} needs a pair, such as "
            f"--config.isolation=0,1; isolation is {isolation!r}"
        )
    if method.model_per_exit:
        # A constant 0 is what the method resolves to.
        if factors or any(isolation):
            name = "boundary_isolation" if factors else "isolation"
            raise UserError(
                f"{name} is {factors or isolation!r}, but {method.name}'s models have no "
                "boundaries between exits: leave it out, or set --config.method=early_exit"
            )
    elif factors and not any(isolation):
        raise UserError(
            f"boundary_isolation is {factors!r}, but it is times isolation, which is 0: set "
            "--config.isolation=1 with it"
        )
    elif factors and len(factors) != len(config.exits) - 1:
        raise UserError(
            f"boundary_isolation must be one number for each of the {len(config.exits) - 1} "
            f"boundaries between the exits {join_numbers(config.exits)}; got {factors!r}"
        )


def _check_loss_weights(config: "Config") -> None:
    """Raises UserError unless each exit has a weight, or all have a schedule of that name."""
    weights = config.loss_weights
    if METHODS[config.method].model_per_exit and weights not in ("", "uniform"):
        raise UserError(
            f"loss_weights is {weights!r}, but every model of {config.method} has one exit: leave "
            "it out"
        )
    if isinstance(weights, str):
        check_choice("loss_weights", weights, ("", *LOSS_WEIGHTS))
    elif len(weights) != len(config.exits) or not all(0 < w < math.inf for w in weights):
        raise UserError(
            f"loss_weights must be one positive number for each of the {len(config.exits)} exits "
            f"{join_numbers(config.exits)}, or one of {_SCHEDULES}; got {weights!r}"
        )


def _check_last_exit(config: "Config") -> None:
    """Raises UserError where exits are to follow the last one that they have no part in."""
    several = len(config.exits) > 1 and not METHODS[config.method].model_per_exit
    for key in ("last_exit_first", "distillation_weight"):
        value = getattr(config, key)
        if value and not several:
            what = "the model has" if len(config.exits) == 1 else f"a {config.method} model has"
            raise UserError(f"{key} is {value:g}, but {what} one exit: leave it out")
    for key, default in (("unlabeled_files", ""), ("distillation_temperature", 1.0)):
        value = getattr(config, key)
        if value != default and not config.distillation_weight:
            raise UserError(
                f"{key} is {value!r}, but is of distillation, which is off: set "
                "--config.distillation_weight=1 with it"
            )
    if config.distillation_temperature != 1 and config.objective == "regression":
        raise UserError(
            f"distillation_temperature is {config.distillation_temperature:g}, but is of "
            "probabilities, which objective regression has none of: leave it out"
        )


def _check_conflict(config: "Config") -> None:
    """Raises UserError where gradients are to be compared that no two exits have in common."""
    method = METHODS[config.method]
    isolation = config.isolation or method.isolation
    closed = min(*isolation, *config.boundary_isolation, 1.0) == 1
    one = len(config.exits) == 1
    if config.conflict_every and (method.model_per_exit or closed or one):
        what = f"isolation {config.isolation!r}"
        if method.model_per_exit or (closed and not config.isolation):
            what = f"method {config.method!r}"
        elif one:
            what = "one exit"
        raise UserError(
            f"conflict_every is {config.conflict_every}, but with {what} no two exits train the "
            "same layer: leave it out, or use --config.method=early_exit with open boundaries"
        )


def _check_independent(config: "Config") -> None:
    """Raises UserError where exits are coupled that are to be trained independently."""
    if not (config.segment_parallel or config.grow_from):
        return
    asked = "segment_parallel" if config.segment_parallel else "grow_from"
    methods = [m.name for m in METHODS.values() if m.trains_exits_independently]
    for name, sound in (
        ("method", config.method in methods),
        ("isolation", set(config.isolation) <= {1.0}),
        ("pooler", config.pooler in ("", "per_exit")),
        ("relative", config.relative in ("", "first")),
        ("clipping", config.clipping in ("", "owner")),
        ("boundary_isolation", set(config.boundary_isolation) <= {1.0}),
        ("last_exit_first", not config.last_exit_first),
        ("distillation_weight", not config.distillation_weight),
    ):
        if not sound:
            raise UserError(
                f"{asked} needs exits that are trained independently, but {name} is "
                f"{getattr(config, name)!r}: leave one of the two out"
            )


def _check_learning_to_exit(config: "Config") -> None:
    """Raises UserError for learning-to-exit with classifiers that are not trained beside its heads.

    Such a head learns from the classifier of its exit, while that is trained.
    """
    if config.learning_to_exit and (config.epochs == 0 or config.head_refit):
        name = "epochs" if config.epochs == 0 else "head_refit"
        raise UserError(
            f"learning_to_exit is {config.learning_to_exit!r}, but {name} is "
            f"{getattr(config, name)!r}: its heads would judge classifiers that they did not see "
            "in training; leave one of the two out"
        )
