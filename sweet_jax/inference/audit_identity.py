"""The identity of an audited model: written to its log, and compared when a log is read."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sweet_jax.errors import UserError
from sweet_jax.files import read_json
from sweet_jax.inference.artifact import ModelArtifact

_TRAINING = ("task", "method", "seed", "learning_rate")  # keys of exits.json


def describe_audited(model: ModelArtifact, precision: str) -> dict[str, Any]:
    """Returns the identity of a model as JSON values, which `check_same_model` compares.

    Recalibration does not change the identity, since a log holds logits before temperature scaling.
    The digest of the weights distinguishes models trained with the same settings on different
    texts.

    Args:
      model: the saved model.
      precision: precision that the model runs in.

    """
    exits = read_json(model.folder / "exits.json")
    weights = {key: exits[key] for key in _TRAINING if key in exits}
    files = [network.folder / "model.safetensors" for network in model.networks]
    if all(path.exists() for path in files):  # an exported model has graphs instead
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
    """Raises UserError if the first line of a log is from another model or precision.

    Args:
      line: values of that line; older releases wrote fewer, and missing ones are not compared.
      model: identity from `describe_audited`, with the log version that this release reads.
      where: name of the line in error messages.

    Raises KeyError, TypeError or ValueError if the line is damaged.

    """
    theirs, ours = _flatten(line), _flatten(model)
    differing = [key for key in ours if key in theirs and theirs[key] != ours[key]]
    if not differing:
        return
    key = differing[0]
    values = f"{key} is {theirs[key]!r} there and {ours[key]!r} here"
    if key != "precision":
        raise UserError(f"{where} is from another model: {values}")
    fix = f"to refit from a log, write it while serving the model in {ours[key]}"
    if theirs[key] == "int8":
        fix = (
            "int8 thresholds are fitted by sweet-jax quantize --run=DIR and cannot be refitted "
            "from a log"
        )
    raise UserError(f"{where} is from another precision: {values}; {fix}")


def _flatten(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values to compare, by their names in error messages; precision comes last.

    Raises KeyError if version, layers or classes are missing.
    """
    values = {key: identity[key] for key in ("version", "layers", "classes")}
    names = enumerate(identity.get("class_names", ()))
    values |= {f"class_names[{index}]": name for index, name in names}
    values |= dict(identity.get("weights", {}))
    return values | {key: identity[key] for key in ("precision",) if key in identity}
