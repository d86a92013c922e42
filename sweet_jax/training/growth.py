"""Growing a run: its segments stay as they are, and deeper ones are trained on top of them.

Only where the method trains exits independently: no exit has trained a layer of the one before it.

Shape letters: R replica.
"""

import json
import math
from pathlib import Path
from typing import Any

from sweet_jax.config import Config, UserError, from_mapping
from sweet_jax.files import expand_user

# Keys that the outputs of the exits, or the rows they are calibrated on, depend on.
_SAME = (
    "task",
    "method",
    "preset",
    "checkpoint",
    "train_size",
    "calibration_fraction",
    "tuning_fraction",
    "validation_fraction",
    "split_seed",
    "max_length",
    "dtype",
    "attention",
    "learning_to_exit",
    "pooling",
    "pooler",
    "relative",
    "subset",
    "calibration",
    "metric",
)


def base_run_directory(config: Config) -> Path:
    """Returns the directory of the run that a config grows from; UserError for an unknown ~name."""
    return expand_user(config.grow_from)


def base_config(config: Config, data_sha256: str | None = None) -> Config | None:
    """Reads the resolved config of the run that a resolved config grows from, None for none.

    Args:
      config: of the new run.
      data_sha256: digest of its data, compared with the run's where it is given.

    Raises UserError where the run is not finished, or the new one is not that run and more.

    """
    if not config.grow_from:
        return None
    folder, name = base_run_directory(config), f"grow_from {config.grow_from!r}"
    try:
        values = json.loads((folder / "config.json").read_text())
        digest = values.pop("data_sha256")
        values.setdefault("pooling", "first")  # before there was the key, all runs had that
        values["clip_norm"] = math.inf if values["clip_norm"] == "inf" else values["clip_norm"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{name} is not the directory of a run ({error!r})") from error
    if not (folder / "results.json").exists():
        raise UserError(f"{name} is not finished: run its command again, in its workdir")
    base = from_mapping(values).resolved()
    count = len(base.exits)
    if config.exits[:count] != base.exits or len(config.exits) == count:
        raise UserError(
            f"{name} has the exits {_list(base.exits)}: exits must be these and deeper ones, such "
            f"as {_list((*base.exits, base.exits[-1] + 1))}; got {_list(config.exits)}"
        )
    differing = [key for key in _SAME if getattr(base, key) != getattr(config, key)]
    if differing:
        key = differing[0]
        raise UserError(
            f"{name} has {key} {getattr(base, key)!r}, and the new run {getattr(config, key)!r}: "
            "its exits would not be the same; give the same value"
        )
    if base.tunes != config.tunes:
        raise UserError(
            f"{name} {'holds' if base.tunes else 'does not hold'} rows out for tuning, and the new "
            f"run {'does' if config.tunes else 'does not'}: rows that one trains on would choose "
            "for the other; give the same epochs, head_init, head_refit and rate_search"
        )
    if data_sha256 is not None and digest != data_sha256:
        raise UserError(f"{name} was trained on other data: give the same files")
    absent = sorted(set(config.seeds) - set(base.seeds))
    if absent:
        raise UserError(
            f"{name} has the seeds {_list(base.seeds)}, not {absent[0]}: a replica grows from that "
            "of its own seed"
        )
    return base


def trained_replicas(config: Config) -> list[tuple[int, float]]:
    """Returns (seed, learning rate) of each replica that the base has parameters of.

    Read from its results: a search for the learning rate leaves fewer than its config names.
    """
    results = json.loads((base_run_directory(config) / "results.json").read_text())
    return [(r["seed"], r["learning_rate"]) for r in results["replicas"]]


def base_replicas(config: Config) -> list[int]:
    """Returns the number of the replica of the base that each replica grows from, R of them.

    The one of its seed and learning rate; where the base has no such rate, of the rate it chose.
    """
    results = json.loads((base_run_directory(config) / "results.json").read_text())
    chosen = results["mean"]["learning_rate"]
    known = trained_replicas(config)
    return [
        known.index((seed, rate if (seed, rate) in known else chosen))
        for seed, rate in config.replicas()
    ]


def merge_grown_params(params: Any, base: Any) -> Any:
    """Returns the tree `params` with the leaves of the smaller tree `base`, whose keys are text."""
    if not isinstance(params, dict):
        return base
    return {
        k: merge_grown_params(v, base[str(k)]) if str(k) in base else v for k, v in params.items()
    }


def _list(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))
