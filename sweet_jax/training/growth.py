"""Growing a run: its segments stay as they are, and deeper ones are trained on top of them.

Only where the method trains exits independently: no exit has trained a layer of the one before it.
"""

import dataclasses
from pathlib import Path
from typing import Any

from sweet_jax.config import Config, UserError
from sweet_jax.errors import join_numbers
from sweet_jax.files import expand_user, read_json
from sweet_jax.saved_config import read_saved_config

# Keys that the outputs of the exits, or the rows they are calibrated on, depend on.
_SAME = (
    *("task", "method", "preset", "checkpoint", "train_size", "calibration_fraction"),
    *("tuning_fraction", "validation_fraction", "split_seed", "max_length", "dtype", "attention"),
    *("learning_to_exit", "pooling", "pooler", "relative", "subset", "calibration", "metric"),
    *("objective", "class_weights", "focal_gamma", "decision_thresholds"),
)


@dataclasses.dataclass(frozen=True)
class BaseRun:
    """Holds what is read, once, of the finished run that another one grows from."""

    folder: Path
    config: Config  # resolved
    # (seed, learning rate) of each replica that it has parameters of: a search for the learning
    # rate leaves fewer than its config names.
    replicas: tuple[tuple[int, float], ...]
    learning_rate: float  # that it chose

    @property
    def exits(self) -> tuple[int, ...]:
        """Returns the layers of its exits, which stay as they are."""
        return self.config.exits

    def replica_of(self, seed: int, rate: float) -> int:
        """Returns the number of the replica that one of this seed and learning rate grows from.

        Where the run has no such rate, that of the rate it chose.
        """
        known = (seed, rate) in self.replicas
        return self.replicas.index((seed, rate if known else self.learning_rate))


def read_base_run(config: Config, data_sha256: str) -> BaseRun | None:
    """Reads the run that a resolved config grows from; None where it grows from none.

    data_sha256: digest of the new run's data.

    Raises UserError where that run is not finished, or the new one is not that run and more.
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
        raise UserError(f"{name} was trained on other data: give the same files")
    return BaseRun(folder, base, replicas, results["mean"]["learning_rate"])


def _check_grows(config: Config, base: Config, name: str) -> None:
    """Raises UserError unless a resolved config is that of the run `name`, and deeper exits."""
    count = len(base.exits)
    if config.exits[:count] != base.exits or len(config.exits) == count:
        raise UserError(
            f"{name} has the exits {join_numbers(base.exits)}: exits must be these and deeper "
            f"ones, such as {join_numbers((*base.exits, base.exits[-1] + 1))}; got "
            f"{join_numbers(config.exits)}"
        )
    for key in _SAME:
        if getattr(base, key) != getattr(config, key):
            raise UserError(
                f"{name} has {key} {getattr(base, key)!r}, and the new run "
                f"{getattr(config, key)!r}: its exits would not be the same; give the same value"
            )
    for key, off in (("unlabeled_files", ""), ("layer_scaling", 1.0)):
        if getattr(base, key) != off:
            raise UserError(
                f"{name} was trained with {key} {getattr(base, key)!r}: such a run cannot grow"
            )
    if base.tunes != config.tunes:
        raise UserError(
            f"{name} {'holds' if base.tunes else 'does not hold'} rows out for tuning, and the new "
            f"run {'does' if config.tunes else 'does not'}: rows that one trains on would choose "
            "for the other; give the same epochs, head_init, head_refit and rate_search"
        )
    absent = sorted(set(config.seeds) - set(base.seeds))
    if absent:
        raise UserError(
            f"{name} has the seeds {join_numbers(base.seeds)}, not {absent[0]}: a replica grows "
            "from that of its own seed"
        )


def merge_grown_params(params: Any, base: Any) -> Any:
    """Returns the tree `params` with the leaves of the smaller tree `base`, whose keys are text."""
    if not isinstance(params, dict):
        return base
    return {
        k: merge_grown_params(v, base[str(k)]) if str(k) in base else v for k, v in params.items()
    }
