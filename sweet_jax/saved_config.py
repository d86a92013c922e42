"""The config of a run as its directory keeps it, in config.json."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from sweet_jax.config import Config, UserError, from_mapping
from sweet_jax.files import read_json

# What to do where the data of a run, which its config names as its command did, are not found.
SAME_FOLDER = "run this in the folder where the run was trained, with the same files"


def config_values(config: Config, data_sha256: str) -> dict[str, Any]:
    """Returns what config.json holds: JSON has no infinity, which clip_norm may be."""
    values = dataclasses.asdict(config) | {"data_sha256": data_sha256}
    return {k: str(v) if v == math.inf else v for k, v in values.items()}


def read_saved_config(
    folder: Path, name: str = "", *, any_version: bool = False
) -> tuple[Config, str]:
    """Reads the config of a finished run.

    Args:
      folder: directory of the run.
      name: what errors call it; default its path.
      any_version: whether keys that this version does not know are left out, which will do to show
        a run; else they are refused.

    Returns:
      (the config, resolved as far as the run wrote it; the digest of the run's data).

    Raises UserError where there is no finished run.

    """
    name = name or repr(str(folder))
    try:
        values = read_json(folder / "config.json")
        digest = values.pop("data_sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{name} is not the directory of a run ({error!r})") from error
    if not (folder / "results.json").exists():
        raise UserError(f"{name} is not finished: run its command again, in its workdir")
    values.setdefault("pooling", "first")  # before there was the key, all runs had that
    for field in dataclasses.fields(Config):
        if isinstance(field.default, float) and values.get(field.name) == "inf":
            values[field.name] = math.inf
    if any_version:
        known = {field.name for field in dataclasses.fields(Config)}
        values = {key: value for key, value in values.items() if key in known}
    return from_mapping(values), digest
