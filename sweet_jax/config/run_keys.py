"""The config keys of a run: training, evaluation, hardware and files."""

import dataclasses
import math
from typing import Any

from sweet_jax.config.key import (
    AT_LEAST_1,
    AUTO,
    DISTINCT,
    FRACTION,
    FROM_0_BELOW_1,
    NOT_EMPTY,
    NOT_NEGATIVE,
    SEED_RANGE,
    key,
)
from sweet_jax.exits.confidences import POLICIES
from sweet_jax.objectives import OBJECTIVES
from sweet_jax.optimizers import LEARNING_RATE_SCHEDULES, OPTIMIZERS
from sweet_jax.trackers import TRACKERS

DTYPES = ("float32", "bfloat16")


def _metrics() -> list[str]:
    """Returns the names of the metrics of all objectives, without repeats."""
    metrics = (metric for objective in OBJECTIVES.values() for metric in objective.metrics)
    return list(dict.fromkeys(metric.name for metric in metrics))


def _policies() -> list[str]:
    return [name for name, policy in POLICIES.items() if not policy.needs_exit_scores]


def _exit_score_policies() -> list[str]:
    return [name for name, policy in POLICIES.items() if policy.needs_exit_scores]


def _whole_number(value: Any) -> Any:
    """Converts a whole number, or the text of one as a command line passes it, to an int."""
    try:
        number = float(value) if isinstance(value, str | float) else value
    except ValueError:
        return value
    return int(number) if isinstance(number, float) and number.is_integer() else value


@dataclasses.dataclass(frozen=True)
class TrainingKeys:
    """Holds the keys of the training."""

    seeds: tuple[int, ...] = key(
        (0,),
        "Random seeds; each is a replica, and all replicas are trained together.",
        NOT_EMPTY,
        DISTINCT,
        (lambda v: all(0 <= x < 2**31 for x in v), SEED_RANGE),
        allowed="distinct whole numbers",
        example="0,1,2",
    )
    learning_rates: tuple[float, ...] = key(
        (5e-5,),
        "Learning rates; each is a replica for every seed, and the best one is reported.",
        NOT_EMPTY,
        DISTINCT,
        (lambda v: all(0 < x < math.inf for x in v), "positive and finite"),
        allowed="distinct positive numbers",
        example="3e-4",
    )
    layer_decay: float = key(
        1.0,
        (
            "Learning rate of a layer, as a multiple of that of the layer above it; 1 uses the "
            "same rate for all layers."
        ),
        (lambda v: 0 < v <= 1, "more than 0 and at most 1"),
    )
    layer_scaling: float = key(
        1.0,
        (
            "Fraction of the change made by training that is kept in layer 1. It rises linearly"
            " to 1 in the last layer. Needs head_refit; 1 switches it off."
        ),
        FRACTION,
    )
    epochs: int | str = key(
        2,
        'Passes over the training rows; "auto" is 96 sqrt(N) examples, at least one epoch.',
        allowed='1 or more, or "auto"; 0 with head_init=probe or head_refit',
        type_condition=(lambda v: v == AUTO or type(v) is int, 'a whole number or "auto"'),
        convert=_whole_number,
    )
    batch_size: int = key(16, "Training batch size.", AT_LEAST_1)
    evaluation_batch_size: int = key(32, "Evaluation batch size.", AT_LEAST_1)
    warmup_fraction: float = key(
        0.0, "Fraction of the steps used for linear warm-up.", FROM_0_BELOW_1
    )
    optimizer: str = key(
        "adamw",
        (
            "Optimizer; module:OBJECT is a transformation like optax.scale_by_adam(), without "
            "learning rate and sign. Lion needs learning rates 3 to 10 times smaller than AdamW."
        ),
        choices=lambda: OPTIMIZERS,
        allows_reference=True,
    )
    learning_rate_schedule: str = key(
        "linear",
        "Learning rate after warm-up; linear and cosine fall to 0.",
        choices=lambda: LEARNING_RATE_SCHEDULES,
        allows_reference=True,
    )
    weight_decay: float = key(0.0, "Decoupled weight decay of matrices.", NOT_NEGATIVE)
    clip_norm: float = key(
        1.0,
        "Gradient-norm clipping threshold.",
        (lambda v: v > 0, "positive (inf switches clipping off)"),
    )
    rate_search: str = key(
        "full",
        "Whether every learning rate is trained to the end, or one is chosen by short runs.",
        choices=("full", "short"),
    )
    group_by_length: bool = key(
        False, "Whether batches group texts of similar length, to reduce padding."
    )


@dataclasses.dataclass(frozen=True)
class EvaluationKeys:
    """Holds the keys of the evaluation."""

    baselines: str = key(
        "quick",
        (
            'Baselines: majority class, TF-IDF and probes; "full" also fine-tunes a plain '
            "model, with its own learning-rate search if rate_search is short."
        ),
        choices=("none", "quick", "full"),
    )
    calibration: str = key(
        "",
        'Rows on which temperatures and thresholds are fitted; "" uses the preset\'s choice.',
        choices=("held_out", "validation", "validation_dropout"),
    )
    confidence: str = key(
        "",
        (
            'Exit policy of the run; module:OBJECT is a policy of your own; "" uses the '
            "default of the objective, else the preset's choice."
        ),
        choices=_policies,
        allows_reference=True,
    )
    exit_score: str = key(
        "",
        'Exit policy of a run with learning_to_exit; "" uses the preset\'s choice.',
        choices=_exit_score_policies,
    )
    metric: str = key(
        "",
        "The reported metric, one of the objective's; \"\" uses the task's.",
        choices=_metrics,
        allows_reference=True,
    )


@dataclasses.dataclass(frozen=True)
class HardwareKeys:
    """Holds the keys of the use of the hardware."""

    dtype: str = key(
        "float32",
        "Data type of the encoder's activations; parameters and classifiers are float32.",
        choices=DTYPES,
    )
    attention: str = key(
        "einsum",
        (
            "Implementation of attention: einsum is this library's own; the others are those of"
            " jax.nn.dot_product_attention."
        ),
        choices=("einsum", "xla", "cudnn"),
    )
    attention_dropout: str = key(
        "", 'Dropout of the attention weights; "" uses the checkpoint\'s rate.', choices=("off",)
    )
    remat: bool = key(
        False,
        (
            "Whether the backward pass recomputes activations, which saves memory for about a "
            "third more computation."
        ),
    )
    segment_parallel: bool = key(
        False, "Whether each group of devices trains its own segments (sweet)."
    )


@dataclasses.dataclass(frozen=True)
class RunKeys:
    """Holds the keys of the files and logs of a run."""

    log_to: str = key(
        "tensorboard",
        (
            "Where losses, learning rates and the metrics on tuning rows are logged in addition"
            " to metrics.jsonl: one or several names separated by commas. wandb and mlflow also "
            "get the report and the model; module:OBJECT is a tracker of your own."
        ),
        choices=TRACKERS,
        allows_reference=True,
        several=True,
    )
    checkpoint_every: int = key(200, "Number of steps between checkpoints.", AT_LEAST_1)
    conflict_every: int = key(
        0,
        (
            "Number of steps between logs of how well the exits' gradients agree, for exits "
            "that share layers."
        ),
        NOT_NEGATIVE,
        allowed="0 (never) or more",
    )
    max_steps: int = key(
        0,
        (
            "Number of steps after which training stops early; the learning-rate schedule stays"
            " that of the full training."
        ),
        NOT_NEGATIVE,
        allowed="0 (all) or more",
    )
