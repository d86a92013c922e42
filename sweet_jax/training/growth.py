"""Growing a run: its segments are kept unchanged, and deeper ones are trained on top of them.

This requires a method that trains exits independently, so that no exit has trained a layer of an
earlier one.
"""

import dataclasses
from pathlib import Path
from typing import Any

from sweet_jax.config import Config
from sweet_jax.errors import UserError, join_numbers
from sweet_jax.files import read_json
from sweet_jax.paths import expand_user
from sweet_jax.saved_config import read_saved_config

# Keys that determine the outputs of the exits or the rows that they are calibrated on.
_SAME = (
    *("task", "method", "preset", "checkpoint", "train_size", "calibration_fraction"),
    *("tuning_fraction", "validation_fraction", "split_seed", "max_length", "dtype", "attention"),
    *("learning_to_exit", "pooling", "pooler", "relative", "subset", "calibration", "metric"),
    *("objective", "class_weights", "focal_gamma", "decision_thresholds"),
)


@dataclasses.dataclass(frozen=True)
class BaseRun:
    """Holds what is known about the finished run that another run grows from."""

    folder: Path
    config: Config  # resolved
    # (seed, learning rate) of each replica whose parameters were kept. After a learning-rate
    # search, these are fewer than its config names.
    replicas: tuple[tuple[int, float], ...]
    learning_rate: float  # the chosen one

    @property
    def exits(self) -> tuple[int, ...]:
        """Returns the layers of the run's exits, which are kept unchanged."""
        return self.config.exits

    def replica_of(self, seed: int, rate: float) -> int:
        """Returns the number of the replica that a replica with this seed and rate grows from.

        If the base run has no replica with this learning rate, the one it chose is used.
        """
        has_rate = (seed, rate) in self.replicas
        return self.replicas.index((seed, rate if has_rate else self.learning_rate))


def read_base_run(config: Config, data_sha256: str) -> BaseRun | None:
    """Reads the run that a resolved config grows from, or returns None if it grows from none.

    Args:
      config: resolved config of the new run.
      data_sha256: digest of the new run's data.

    Raises:
      UserError: if the base run is not finished, or the new run does not extend it.

    """
    if not config.grow_from:
        return None
    folder, name = expand_user(config.grow_from), f"grow_from {config.grow_from!r}"
    saved, digest = read_saved_config(folder, name)
    results = read_json(folder / "results.json")
    replicas = tuple((r["seed"], r["learning_rate"]) for r in results["replicas"])
    base = saved.resolved()
    _check_grows(config, base, name)
    if digest != data_sha256:
        raise UserError(f"{name} was trained on different data: pass the same files")
    return BaseRun(folder, base, replicas, results["mean"]["learning_rate"])


def _check_grows(config: Config, base: Config, name: str) -> None:
    """Raises UserError unless a resolved config matches the run `name` and adds deeper exits."""
    count = len(base.exits)
    if config.exits[:count] != base.exits or len(config.exits) == count:
        raise UserError(
            f"{name} has exits {join_numbers(base.exits)}: exits must be these and deeper "
            f"ones, such as {join_numbers((*base.exits, base.exits[-1] + 1))}; got "
            f"{join_numbers(config.exits)}"
        )
    for key in _SAME:
        if getattr(base, key) != getattr(config, key):
            raise UserError(
                f"{name} has {key}={getattr(base, key)!r}, but the new run has "
                f"{getattr(config, key)!r}, which would change its exits: set the same value"
            )
    for key, off in (("unlabeled_files", ""), ("layer_scaling", 1.0)):
        if getattr(base, key) != off:
            raise UserError(
                f"{name} was trained with {key}={getattr(base, key)!r}: such a run cannot be grown"
            )
    if base.tunes != config.tunes:
        raise UserError(
            f"{name} {'holds' if base.tunes else 'does not hold'} out tuning rows, but the new run "
            f"{'does' if config.tunes else 'does not'}: rows that one trains on would be tuning "
            "rows of the other; set the same epochs, head_init, head_refit and rate_search"
        )
    absent = sorted(set(config.seeds) - set(base.seeds))
    if absent:
        raise UserError(
            f"{name} has seeds {join_numbers(base.seeds)}, but not {absent[0]}: a replica grows "
            "from the one with the same seed, so use only these seeds"
        )


def merge_grown_params(params: Any, base: Any) -> Any:
    """Returns the tree `params` with the leaves of the smaller tree `base`, with string keys."""
    if not isinstance(params, dict):
        return base
    return {
        k: merge_grown_params(v, base[str(k)]) if str(k) in base else v for k, v in params.items()
    }
