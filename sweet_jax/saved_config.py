"""The config of a run as saved in config.json."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from sweet_jax.config import Config, from_mapping, with_current_keys
from sweet_jax.errors import UserError
from sweet_jax.files import read_json

# Advice if the data of a run are not found: its config may have relative paths.
SAME_FOLDER = "run this in the folder where the run was trained, with the same files"


def config_values(config: Config, data_sha256: str) -> dict[str, Any]:
    """Returns the contents of config.json; infinity (clip_norm), which JSON lacks, is text."""
    values = dataclasses.asdict(config) | {"data_sha256": data_sha256}
    return {k: str(v) if v == math.inf else v for k, v in values.items()}


def read_saved_config(
    folder: Path, name: str = "", *, any_version: bool = False
) -> tuple[Config, str]:
    """Reads the config of a finished run.

    Args:
      folder: directory of the run.
      name: name of the run in error messages; default its path.
      any_version: whether to ignore keys that this version does not know, which suffices to show a
        run; otherwise they are refused.

    Returns:
      (the config, with the keys that the run resolved; the digest of the run's data).

    Raises UserError if there is no finished run.

    """
    name = name or repr(str(folder))
    try:
        values = with_current_keys(read_json(folder / "config.json"))
        digest = values.pop("data_sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{name} is not the directory of a run ({error!r})") from error
    if not (folder / "results.json").exists():
        raise UserError(f"{name} is not finished: run its command again, in its workdir")
    values.setdefault("pooling", "first")  # the only pooling of versions without this key
    for field in dataclasses.fields(Config):
        if isinstance(field.default, float) and values.get(field.name) == "inf":
            values[field.name] = math.inf
    if any_version:
        known = {field.name for field in dataclasses.fields(Config)}
        values = {key: value for key, value in values.items() if key in known}
    return from_mapping(values), digest
