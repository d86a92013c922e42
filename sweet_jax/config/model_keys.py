"""The config keys of the model: the encoder, the training method and the heads."""

import dataclasses
from typing import Any

from sweet_jax.config.key import (
    ALL_FRACTIONS,
    AUTO,
    FROM_0_BELOW_1,
    NOT_NEGATIVE,
    POSITIVE,
    key,
    split_names,
)
from sweet_jax.config.presets import PRESETS
from sweet_jax.methods import METHODS
from sweet_jax.poolings import POOLINGS


def _numbers_or_name(value: Any) -> Any:
    """Converts numbers, or text of comma-separated numbers, to a tuple; returns names unchanged."""
    if isinstance(value, str):
        names = split_names(value)
        try:
            return tuple(map(float, names)) if names else value
        except ValueError:
            return value
    values = value if isinstance(value, list | tuple) else (value,)
    return tuple(float(v) if type(v) is int else v for v in values)


def _are_numbers_or_name(value: Any) -> bool:
    numbers = isinstance(value, tuple) and value and all(type(v) is float for v in value)
    return isinstance(value, str) or bool(numbers)


@dataclasses.dataclass(frozen=True)
class ModelKeys:
    """Holds the keys of the encoder and its exits."""

    checkpoint: str = key(
        "bert-base-uncased",
        "The pretrained encoder.",
        allowed="hub id, local directory, or pkg://package/path",
    )
    exits: tuple[int, ...] = key(
        (1, 4, 6, 12),
        "Layers followed by an exit, numbered from 1.",
        (len, "at least one layer number"),
        (lambda v: min(v) >= 1, "layer numbers from 1"),
        (lambda v: list(v) == sorted(set(v)), "ascending without repeats"),
        allowed="ascending; the last one is the depth of the encoder",
        example="1,4,6,12",
    )
    depth: int = key(
        0,
        "Number of encoder layers to use; the layers above are dropped.",
        NOT_NEGATIVE,
        allowed="0 (all) or more",
    )


@dataclasses.dataclass(frozen=True)
class MethodKeys:
    """Holds the keys of the training method."""

    method: str = key(
        "sweet",
        (
            "Which exits train a layer: only the next one (sweet), all exits above it "
            "(early_exit), or one exit in a model of its own (multi_model)."
        ),
        choices=METHODS,
        allows_reference=True,
    )
    preset: str = key(
        "",
        "Protocol that sets keys left empty: the default, the paper's, or the authors' release.",
        choices=PRESETS,
    )
    grow_from: str = key(
        "",
        "Directory of a SWEET run, which is kept unchanged while deeper exits are trained.",
        allowed='a run directory; "" trains from the checkpoint',
    )
    isolation: tuple[float, ...] = key(
        (),
        (
            "Fraction of the gradient stopped at a boundary between exits: 1 is SWEET, 0 is "
            "Early-Exit."
        ),
        (lambda v: len(v) <= 2, "one number, or a pair from, to"),
        ALL_FRACTIONS,
        allowed="a number from 0 to 1, or a pair from,to; empty for the method's",
        example="0,1",
    )
    isolation_schedule: str = key(
        "linear",
        (
            'How isolation moves from the first to the second number of a pair; "step" switches'
            " halfway through training."
        ),
        choices=("linear", "step"),
    )
    boundary_isolation: tuple[float, ...] = key(
        (),
        "Factor by which isolation is multiplied at each boundary between exits.",
        ALL_FRACTIONS,
        allowed="a number from 0 to 1 for each boundary; empty for 1",
        example="1,0.5,0",
    )
    loss_weights: str | tuple[float, ...] = key(
        "",
        (
            "Weight of each exit's loss, for exits that share layers: numbers, or a schedule: "
            '"uniform", "depth" (proportional to the layer, as in PABEE) or "shallow_deep" '
            "(rising during training). Under SWEET the weights have little effect: each "
            "parameter gets the gradient of one exit only, and Adam does not depend on its "
            "scale; a weight only changes which steps are clipped."
        ),
        allowed=(
            "a positive number for each exit, a schedule, or module:OBJECT; empty for the method's"
        ),
        type_condition=(
            _are_numbers_or_name,
            "one positive number for each exit, or the name of a schedule",
        ),
        convert=_numbers_or_name,
    )
    last_exit_first: float = key(
        0.0,
        (
            "Fraction of the steps, at the start, that minimize only the last exit's loss with "
            "all boundaries open; the remaining steps train as usual."
        ),
        FROM_0_BELOW_1,
    )
    distillation: float = key(
        0.0,
        (
            "Weight of the divergence from the last exit's prediction, in the loss of each other "
            "exit; 0 switches distillation off."
        ),
        NOT_NEGATIVE,
    )
    distillation_temperature: float = key(
        1.0, "Temperature of both predictions in that divergence.", POSITIVE
    )
    pooler: str = key(
        "",
        (
            'One copy of the pretrained pooler for each exit, or one shared by all; "" uses the'
            " preset's choice."
        ),
        choices=("per_exit", "shared"),
    )
    relative: str = key(
        "",
        (
            "Owner of the relative-position table (DeBERTa, MPNet): the first exit, or all "
            'exits; "" uses the preset\'s choice.'
        ),
        choices=("first", "shared"),
    )
    clipping: str = key(
        "",
        (
            "Gradient clipping with a norm for each exit's own parameters, or one global norm; "
            '"" uses the preset\'s choice.'
        ),
        choices=("owner", "global"),
    )


@dataclasses.dataclass(frozen=True)
class HeadsKeys:
    """Holds the keys of the heads of the exits."""

    head_init: str = key(
        "",
        (
            "Initialization of the classifiers: random, or logistic regressions fitted on the "
            "frozen encoder, which holds out tuning rows from training."
        ),
        choices=("random", "probe"),
    )
    head_refit: bool = key(
        False,
        (
            "Whether logistic regressions fitted on the trained encoder replace the classifiers, "
            "which holds out tuning rows from training."
        ),
    )
    class_weights: str = key(
        "",
        "Weights of the classes in the loss, for rare classes (single_label).",
        allowed='balanced, or one positive number for each class in their order; "" is 1',
    )
    focal_gamma: float = key(
        0.0, "Exponent of the focal loss, for rare classes; 0 is the cross-entropy.", NOT_NEGATIVE
    )
    decision_thresholds: str = key(
        "",
        (
            "Minimum probability at which a label is predicted (multi_label): one half, or the "
            'threshold with the best F1 on calibration rows; "" is "f1" if the metric is an F1,'
            ' else "half".'
        ),
        choices=("half", "f1"),
    )
    head_learning_rate: float = key(
        1.0, "Learning rate of the heads, as a multiple of learning_rates.", POSITIVE
    )
    pooling: str = key(
        "",
        (
            "What an exit reads: the first token through the pretrained pooler, the mean of all"
            " tokens, or, for a pair of texts, both means, their difference and their product"
            ' ("pair"; "aligned_pair" adds the distances between aligned tokens). "" uses the'
            " preset's choice, else the checkpoint's, else the mean; \"auto\" does the same, but"
            ' uses "aligned_pair" instead of the mean for pairs of texts. "module:OBJECT" is a'
            " Pooling of your own."
        ),
        choices=lambda: (AUTO, *POOLINGS),
        allows_reference=True,
    )
    learning_to_exit: str = key(
        "",
        (
            'Whether to train heads that predict if their exit is right; with "detached" '
            'everything else is trained as without them, and "" trains none.'
        ),
        choices=("joint", "detached"),
    )
