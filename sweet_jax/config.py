"""The configuration of a run: one frozen, validated dataclass."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from sweet_jax.config_checks import check_values
from sweet_jax.config_values import check_type
from sweet_jax.errors import UserError as UserError  # most of the package imports it from here
from sweet_jax.errors import check_choice
from sweet_jax.methods import METHODS
from sweet_jax.poolings import POOLING_INPUTS
from sweet_jax.presets import PRESETS

AUTO = "auto"  # a value of epochs and of pooling
METRICS = ("accuracy", "matthews", "f1", "macro_f1", "balanced_accuracy")
# Implemented in objectives/.
OBJECTIVE_METRICS = {
    "single_label": METRICS,
    "multi_label": ("micro_f1", "macro_f1", "subset_accuracy", "neg_hamming_loss"),
    "regression": ("neg_mean_absolute_error", "pearson"),
}
# The exit policy of each objective if the config names none.
OBJECTIVE_POLICIES = {
    "single_label": "",  # the preset's
    "multi_label": "min_confidence",
    "regression": "stability",
}
DTYPES = ("float32", "bfloat16")
ATTENTIONS = ("einsum", "xla", "cudnn")

CHOICES: dict[str, tuple[str, ...]] = {
    "method": tuple(METHODS),
    "isolation_schedule": ("linear", "step"),
    "dtype": DTYPES,
    "attention": ATTENTIONS,
    "attention_dropout": ("", "off"),
    "metric": ("", *dict.fromkeys(itertools.chain(*OBJECTIVE_METRICS.values()))),
    "preset": tuple(PRESETS),
    "pooler": ("", "per_exit", "shared"),
    "relative": ("", "first", "shared"),
    "clipping": ("", "owner", "global"),
    "subset": ("", "seed", "first"),
    "objective": tuple(OBJECTIVE_POLICIES),
    "decision_thresholds": ("", "half", "f1"),
    "calibration": ("", "held_out", "validation", "validation_dropout"),
    "confidence": ("", "confidence", "confidence_float32", "min_confidence", "stability"),
    "exit_score": ("", "learning_to_exit", "learning_to_exit_min_max"),
    "learning_to_exit": ("", "joint", "detached"),
    "pooling": ("", AUTO, *POOLING_INPUTS),
    "head_init": ("", "random", "probe"),
    "rate_search": ("full", "short"),
    "baselines": ("none", "quick", "full"),
    "log_to": ("tensorboard", "wandb", "mlflow"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Holds the validated config of a run; `config_keys` describes each key.

    Raises UserError for an invalid value.
    """

    task: str = "sst2"
    objective: str = "single_label"
    method: str = "sweet"
    preset: str = ""
    checkpoint: str = "bert-base-uncased"
    exits: tuple[int, ...] = (1, 4, 6, 12)
    depth: int = 0
    grow_from: str = ""
    seeds: tuple[int, ...] = (0,)
    learning_rates: tuple[float, ...] = (5e-5,)
    train_size: int = 6000
    calibration_fraction: float = 0.1
    tuning_fraction: float = 0.1
    validation_fraction: float = 0.2
    split_seed: int = 0
    epochs: int | str = 2
    batch_size: int = 16
    evaluation_batch_size: int = 32
    max_length: int = 256
    warmup_fraction: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    dtype: str = "float32"
    attention: str = "einsum"
    attention_dropout: str = ""
    remat: bool = False
    isolation: tuple[float, ...] = ()
    isolation_schedule: str = "linear"
    boundary_isolation: tuple[float, ...] = ()
    loss_weights: str | tuple[float, ...] = ""
    last_exit_first: float = 0.0
    distillation_weight: float = 0.0
    distillation_temperature: float = 1.0
    rate_search: str = "full"
    group_by_length: bool = False
    head_init: str = ""
    head_refit: bool = False
    class_weights: str = ""
    focal_gamma: float = 0.0
    decision_thresholds: str = ""
    head_learning_rate: float = 1.0
    layer_decay: float = 1.0
    layer_scaling: float = 1.0
    pooling: str = ""
    baselines: str = "quick"
    learning_to_exit: str = ""
    pooler: str = ""
    relative: str = ""
    clipping: str = ""
    subset: str = ""
    calibration: str = ""
    confidence: str = ""
    exit_score: str = ""
    metric: str = ""
    data_dir: str = ""
    data_files: str = ""
    unlabeled_files: str = ""
    dataset: str = ""
    splits: str = ""
    skip_invalid: bool = False
    report_texts: bool = True
    log_to: str = "tensorboard"
    text_columns: str = ""
    label_column: str = "label"
    checkpoint_every: int = 200
    conflict_every: int = 0
    segment_parallel: bool = False
    max_steps: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_type(field.name, getattr(self, field.name), field.default)
        for name, allowed in CHOICES.items():
            if name != "confidence" or ":" not in self.confidence:  # module:function
                check_choice(name, getattr(self, name), allowed)
        check_values(self)

    def resolved(self) -> "Config":
        """Returns the config with unset keys filled in by its preset, objective and method."""
        choices: dict[str, Any] = {
            k: v for k, v in PRESETS[self.preset].items() if not getattr(self, k)
        }
        if self.pooling == AUTO and PRESETS[self.preset]["pooling"]:
            choices["pooling"] = PRESETS[self.preset]["pooling"]
        if not self.confidence and OBJECTIVE_POLICIES[self.objective]:
            choices["confidence"] = OBJECTIVE_POLICIES[self.objective]
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


def convert_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Converts values from a file or a command line to the types of their keys.

    For a key that takes several numbers, a list or a single number becomes a tuple; for a key that
    takes text, a list of names becomes comma-separated text. Ranges and combinations of values are
    not checked, because other values may still replace these.

    Raises UserError for an unknown key, naming the nearest one, and for a value of the wrong type.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    for key in values:
        check_choice("config key", key, defaults)
    found = {key: _as_field(key, value) for key, value in values.items()}
    for key, value in found.items():
        check_type(key, value, defaults[key])
    return found


def split_names(text: str) -> tuple[str, ...]:
    """Splits a comma-separated list of names, and strips the blanks around them."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _as_field(name: str, value: Any) -> Any:
    default = getattr(Config, name)
    if name == "loss_weights":
        return _as_loss_weights(value)
    if name == "epochs" and isinstance(value, str) and value.strip().isdigit():
        return int(value)  # a command line passes it as text
    if isinstance(default, tuple):
        values = tuple(value) if isinstance(value, list | tuple) else (value,)
        whole = name in ("exits", "seeds")
        return tuple(float(v) if type(v) is int and not whole else v for v in values)
    if isinstance(default, str) and isinstance(value, list | tuple):
        return ",".join(map(str, value))
    if isinstance(default, float) and type(value) is int:
        return float(value)
    return value


def _as_loss_weights(value: Any) -> Any:
    """Converts numbers, or text of comma-separated numbers, to a tuple; returns names unchanged."""
    if isinstance(value, str):
        names = split_names(value)
        try:
            return tuple(map(float, names)) if names else value
        except ValueError:
            return value
    values = value if isinstance(value, list | tuple) else (value,)
    return tuple(float(v) if type(v) is int else v for v in values)
