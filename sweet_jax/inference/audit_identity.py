"""The identity of an audited model: written into its log, and compared where a log is read."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sweet_jax.config import UserError
from sweet_jax.files import read_json
from sweet_jax.inference.artifact import ModelArtifact

_TRAINING = ("task", "method", "seed", "learning_rate")  # keys of exits.json


def describe_audited(model: ModelArtifact, precision: str) -> dict[str, Any]:
    """Returns the identity of a model, in values of JSON, which `check_same_model` compares.

    Nothing of it is changed by recalibration: a log holds logits, before temperatures. The digest
    of the weights tells models apart that were trained in the same way on other texts.

    precision: that the model runs in.
    """
    exits = read_json(model.folder / "exits.json")
    weights = {key: exits[key] for key in _TRAINING if key in exits}
    files = [network.folder / "model.safetensors" for network in model.networks]
    if all(path.exists() for path in files):  # an exported model has graphs in their place
        weights["weights_sha256"] = _digest(files)
    return {
        "layers": list(model.layers),
        "classes": len(model.classes),
        "class_names": list(model.classes),
        "weights": weights,
        "precision": precision,
    }


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()[:16]


def check_same_model(line: Mapping[str, Any], model: Mapping[str, Any], where: str) -> None:
    """Raises UserError for the first line of a log of another model or precision.

    Args:
      line: the values of that line; older versions wrote fewer of them, which are compared alone.
      model: from `describe_audited`, with the version that is read.
      where: what errors call the line.

    Raises KeyError, TypeError or ValueError for a line that is damaged.

    """
    theirs, ours = _flatten(line), _flatten(model)
    differing = [key for key in ours if key in theirs and theirs[key] != ours[key]]
    if not differing:
        return
    key = differing[0]
    values = f"{key} is {theirs[key]!r} there and {ours[key]!r} here"
    if key != "precision":
        raise UserError(f"{where} is of another model: {values}")
    fix = f"serve the model in {ours[key]} for a log to refit it from"
    if theirs[key] == "int8":
        fix = (
            "thresholds of int8 are fitted by sweet-jax quantize --run=DIR and cannot be refitted "
            "from a log"
        )
    raise UserError(f"{where} is of another precision: {values}; {fix}")


def _flatten(about: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that are compared, by the names that errors give them.

    The precision is the last. Raises KeyError where version, layers or classes are missing.
    """
    found = {key: about[key] for key in ("version", "layers", "classes")}
    names = enumerate(about.get("class_names", ()))
    found |= {f"class_names[{place}]": name for place, name in names}
    found |= dict(about.get("weights", {}))
    return found | {key: about[key] for key in ("precision",) if key in about}
