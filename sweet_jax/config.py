"""The configuration of a run: one frozen, validated dataclass."""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from sweet_jax.methods import LOSS_WEIGHTS, METHODS
from sweet_jax.presets import PRESETS


class UserError(ValueError):
    """Raised for wrong input of the user, in one line: what, with the value, and how to fix it."""


AUTO = "auto"  # of epochs
POOLING_NAMES = ("first", "mean")  # models/pooling.py has what they do
METRICS = ("accuracy", "matthews", "f1")
DTYPES = ("float32", "bfloat16")
ATTENTIONS = ("einsum", "xla", "cudnn")

CHOICES: dict[str, tuple[str, ...]] = {
    "method": tuple(METHODS),
    "isolation_schedule": ("linear", "step"),
    "dtype": DTYPES,
    "attention": ATTENTIONS,
    "attention_dropout": ("", "off"),
    "metric": ("", *METRICS),
    "preset": tuple(PRESETS),
    "pooler": ("", "per_exit", "shared"),
    "relative": ("", "first", "shared"),
    "clipping": ("", "owner", "global"),
    "subset": ("", "seed", "first"),
    "calibration": ("", "held_out", "validation", "validation_dropout"),
    "confidence": ("", "confidence", "confidence_float32"),
    "exit_score": ("", "learning_to_exit", "learning_to_exit_min_max"),
    "learning_to_exit": ("", "joint", "detached"),
    "pooling": ("", *POOLING_NAMES),
    "head_init": ("", "random", "probe"),
    "rate_search": ("full", "short"),
    "baselines": ("none", "quick", "full"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Holds the keys of a recipe, validated; `config_keys` says what each one means.

    Raises UserError for an impossible value.
    """

    task: str = "sst2"
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
    rate_search: str = "full"
    group_by_length: bool = False
    head_init: str = ""
    head_refit: bool = False
    head_learning_rate: float = 1.0
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
    dataset: str = ""
    splits: str = ""
    skip_invalid: bool = False
    text_columns: str = ""
    label_column: str = "label"
    checkpoint_every: int = 200
    conflict_every: int = 0
    segment_parallel: bool = False
    max_steps: int = 0

    def __post_init__(self) -> None:
        _check_types(self)
        for name, allowed in CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        _check_ranges(self)
        _check_isolation(self)
        _check_loss_weights(self)
        _check_conflict(self)
        _check_independent(self)
        _check_learning_to_exit(self)

    def resolved(self) -> "Config":
        """Returns the config with the choices of its preset and method where it has none."""
        choices: dict[str, Any] = {
            k: v for k, v in PRESETS[self.preset].items() if not getattr(self, k)
        }
        method = METHODS[self.method]
        choices["isolation"] = self.isolation or method.isolation
        choices["loss_weights"] = self.loss_weights or method.loss_weights
        return dataclasses.replace(self, **choices)

    @property
    def policy(self) -> str:
        """Returns the exit policy of a resolved config: learning-to-exit's where that is on."""
        return self.exit_score if self.learning_to_exit else self.confidence

    @property
    def tunes(self) -> bool:
        """Returns whether tuning rows are held out: for the probe, the rate or the last step."""
        searches = self.rate_search == "short" and len(self.learning_rates) > 1
        return self.epochs == AUTO or self.head_init == "probe" or self.head_refit or searches

    def replicas(self) -> tuple[tuple[int, float], ...]:
        """Returns (seed, learning rate) of every replica, in the order of the R axis."""
        return tuple((seed, rate) for seed in self.seeds for rate in self.learning_rates)


def from_mapping(values: Mapping[str, Any]) -> Config:
    """Builds a Config of keys and values; raises UserError for an unknown key, with the nearest."""
    names = [field.name for field in dataclasses.fields(Config)]
    for key in values:
        check_choice("config key", key, names)
    return Config(**{k: _as_field(k, v) for k, v in values.items()})


def check_choice(what: str, value: str, allowed: Iterable[str]) -> None:
    """Raises UserError naming the nearest allowed value unless value is one of them."""
    allowed = list(allowed)
    if value in allowed:
        return
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = (
        f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(map(repr, allowed))}"
    )
    raise UserError(f"unknown {what} {value!r}: {hint}")


def split_names(text: str) -> tuple[str, ...]:
    """Splits a comma-separated list of names, without blanks around them."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _as_field(name: str, value: Any) -> Any:
    """Converts a value of a file or a command line to the type of its field.

    Lists become tuples, one number a tuple of one, a tuple of names text.
    """
    default = getattr(Config, name)
    if name == "loss_weights":
        return _as_loss_weights(value)
    if name == "epochs" and isinstance(value, str) and value.strip().isdigit():
        return int(value)  # as a command line has it
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
    """Converts numbers, or text of numbers separated by commas, to a tuple; leaves a name as is."""
    if isinstance(value, str):
        names = split_names(value)
        try:
            return tuple(map(float, names)) if names else value
        except ValueError:
            return value
    values = value if isinstance(value, list | tuple) else (value,)
    return tuple(float(v) if type(v) is int else v for v in values)


def _check_types(config: Config) -> None:
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), field.default
        if isinstance(default, tuple):
            kind = int if field.name in ("exits", "seeds") else float
            if not isinstance(value, tuple) or any(type(v) is not kind for v in value):
                noun = "whole numbers" if kind is int else "numbers"
                raise UserError(
                    f"{field.name} must be {noun} separated by commas, such as "
                    f"--config.{field.name}={_EXAMPLES[field.name]}; got {value!r}"
                )
        elif field.name == "epochs":
            if value != AUTO and type(value) is not int:
                raise UserError(f'epochs must be a whole number or "auto"; got {value!r}')
        elif field.name == "loss_weights":
            pass  # see _check_loss_weights
        elif type(value) is not type(default):
            raise UserError(f"{field.name} must be of type {type(default).__name__}; got {value!r}")


_EXAMPLES = {
    "exits": "1,4,6,12",
    "seeds": "0,1,2",
    "learning_rates": "3e-4",
    "isolation": "0,1",
    "boundary_isolation": "1,0.5,0",
}


def _check_ranges(config: Config) -> None:
    def require(holds: bool, name: str, wanted: str) -> None:
        if not holds:
            raise UserError(f"{name} must be {wanted}; got {getattr(config, name)!r}")

    exits = config.exits
    require(len(exits) > 0, "exits", "at least one layer number")
    require(all(e >= 1 for e in exits), "exits", "layer numbers from 1")
    require(list(exits) == sorted(set(exits)), "exits", "ascending without repeats")
    require(len(config.seeds) > 0, "seeds", "at least one number")
    require(len(set(config.seeds)) == len(config.seeds), "seeds", "distinct")
    require(all(0 <= s < 2**31 for s in config.seeds), "seeds", "from 0 to 2147483647")
    rates = config.learning_rates
    require(len(rates) > 0, "learning_rates", "at least one number")
    require(len(set(rates)) == len(rates), "learning_rates", "distinct")
    require(all(0 < r < math.inf for r in rates), "learning_rates", "positive and finite")
    for name in ("train_size", "batch_size", "evaluation_batch_size", "checkpoint_every"):
        require(getattr(config, name) >= 1, name, "1 or more")
    least = 0 if config.head_init == "probe" or config.head_refit else 1
    epochs = config.epochs
    require(
        epochs == AUTO or (isinstance(epochs, int) and epochs >= least),
        "epochs",
        '1 or more, or "auto" (0 only with head_init=probe or head_refit)',
    )
    require(0 < config.head_learning_rate < math.inf, "head_learning_rate", "positive and finite")
    for name in ("conflict_every", "depth", "max_steps"):
        require(getattr(config, name) >= 0, name, "0 or more")
    require(config.max_length >= 8, "max_length", "8 tokens or more")
    require(0 <= config.split_seed < 2**31, "split_seed", "from 0 to 2147483647")
    for name in ("calibration_fraction", "tuning_fraction", "validation_fraction"):
        require(0 < getattr(config, name) < 1, name, "between 0 and 1, both excluded")
    require(0 <= config.warmup_fraction < 1, "warmup_fraction", "from 0 to below 1")
    require(0 <= config.weight_decay < math.inf, "weight_decay", "0 or more")
    require(config.clip_norm > 0, "clip_norm", "positive (inf switches clipping off)")
    require(config.task != "", "task", "a name")
    require(config.label_column != "", "label_column", "a column name")


def _check_loss_weights(config: Config) -> None:
    """Raises UserError unless each exit has a weight, or all have a schedule of that name."""
    weights = config.loss_weights
    if METHODS[config.method].model_per_exit and weights not in ("", "uniform"):
        raise UserError(
            f"loss_weights is {weights!r}, but every model of {config.method} has one exit: leave "
            "it out"
        )
    if isinstance(weights, str):
        check_choice("loss_weights", weights, ("", *LOSS_WEIGHTS))
        return
    sound = isinstance(weights, tuple) and all(type(w) is float for w in weights)
    if not sound or len(weights) != len(config.exits) or not all(0 < w < math.inf for w in weights):
        raise UserError(
            f"loss_weights must be one positive number for each of the {len(config.exits)} exits "
            f"{','.join(map(str, config.exits))}, or one of "
            f"{', '.join(map(repr, LOSS_WEIGHTS))}; got {weights!r}"
        )


def _check_conflict(config: Config) -> None:
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


def _check_isolation(config: Config) -> None:
    isolation, factors = config.isolation, config.boundary_isolation
    if len(isolation) > 2:
        raise UserError(f"isolation must be one number, or a pair from, to; got {isolation!r}")
    for name, values in (("isolation", isolation), ("boundary_isolation", factors)):
        if not all(0 <= a <= 1 for a in values):
            raise UserError(f"{name} must be from 0 to 1; got {values!r}")
    if config.isolation_schedule != "linear" and len(isolation) != 2:
        raise UserError(
            f"isolation_schedule {config.isolation_schedule!r} needs a pair, such as "
            f"--config.isolation=0,1; isolation is {isolation!r}"
        )
    method = METHODS[config.method]
    if method.model_per_exit:
        # A constant 0 is what the method resolves to.
        if factors or any(isolation):
            name = "boundary_isolation" if factors else "isolation"
            raise UserError(
                f"{name} is {factors or isolation!r}, but {method.name}'s models have no "
                "boundaries between exits: leave it out, or set --config.method=early_exit"
            )
    elif factors and not any(isolation or method.isolation):
        raise UserError(
            f"boundary_isolation is {factors!r}, but it is times isolation, which is 0: set "
            "--config.isolation=1 with it"
        )
    elif factors and len(factors) != len(config.exits) - 1:
        raise UserError(
            f"boundary_isolation must be one number for each of the {len(config.exits) - 1} "
            f"boundaries between the exits {','.join(map(str, config.exits))}; got {factors!r}"
        )


def _check_learning_to_exit(config: Config) -> None:
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


def _check_independent(config: Config) -> None:
    """Raises UserError where exits are coupled that are to be trained independently."""
    asked = "segment_parallel" if config.segment_parallel else "grow_from"
    if not (config.segment_parallel or config.grow_from):
        return
    wanted = {
        "method": tuple(m.name for m in METHODS.values() if m.trains_exits_independently),
        "isolation": ((), (1.0,), (1.0, 1.0)),
        "pooler": ("", "per_exit"),
        "relative": ("", "first"),
        "clipping": ("", "owner"),
    }
    for name, allowed in wanted.items():
        if getattr(config, name) not in allowed:
            raise UserError(
                f"{asked} needs exits that are trained independently, but {name} is "
                f"{getattr(config, name)!r}: leave one of the two out"
            )
    if any(a != 1 for a in config.boundary_isolation):
        raise UserError(
            f"{asked} needs exits that are trained independently, but boundary_isolation "
            f"is {config.boundary_isolation!r}: leave one of the two out"
        )
